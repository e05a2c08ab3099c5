"""A loader worker that is killed is one line, whenever it happens."""

import multiprocessing
import subprocess
import sys
import time

import pytest
from test_loader import Memory, pairs
from torch.utils.data import DataLoader

from contrastive.data.loader import eval_loader, train_loader
from contrastive.data.preprocess import Preprocess, PreprocessConfig
from contrastive.data.tokenizer import train_bpe
from contrastive.errors import UserError


@pytest.mark.parametrize(
    ("fault", "workers", "expected"),
    [
        (ConnectionResetError(104, "Connection reset by peer"), 1, UserError),
        (EOFError(), 1, UserError),
        (ConnectionResetError("Caught ConnectionResetError in DataLoader worker process 0."), 1, ConnectionResetError),
        (ConnectionResetError("of the data's own"), 0, ConnectionResetError),
    ],
)
def test_a_worker_that_dies_while_its_batch_is_sent(fault, workers, expected, monkeypatch):
    def fail(self):
        raise fault

    monkeypatch.setattr(DataLoader, "__iter__", fail)
    batches = eval_loader(Memory(), Preprocess(PreprocessConfig(image_size=16)), [0], 1, num_workers=workers)
    with pytest.raises(expected, match="a loader worker was killed" if expected is UserError else None):
        next(iter(batches))


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGCHLD")
def test_a_worker_that_dies_between_two_batches_is_told_at_the_next():
    batches = iter(train_loader(pairs(train_bpe(["red thing"], 259, 12)), num_steps=1000, num_workers=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    worker.join()
    time.sleep(0.05)  # what comes in here is not ours to end
    with pytest.raises(UserError, match="a loader worker was killed"):
        while True:  # some batches were ready
            next(batches)


@pytest.mark.skipif(sys.platform != "linux", reason="who sent a signal")
def test_a_worker_is_asked_to_end_by_its_trainer_alone():
    """scancel signals every process of a job: the trainer needs batches until it has saved."""
    batches = iter(train_loader(pairs(train_bpe(["red thing"], 259, 12)), num_steps=1000, num_workers=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    subprocess.run(["sh", "-c", f"kill -TERM {worker.pid}"], check=True)
    worker.join(1)
    assert worker.is_alive()
    for _ in range(20):
        next(batches)
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
