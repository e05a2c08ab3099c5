"""A rank that stands still is named by all others within the time they are told to wait; row 31."""

import os
import signal
import time
from contextlib import nullcontext

import pytest
import torch
from rank_processes import run_on_ranks
from test_runs import run_faulty
from tiny_run import TINY

from contrastive.distributed.collectives import all_gather_rows, all_reduce_sum, every_block
from contrastive.distributed.runtime import Runtime
from contrastive.errors import UserError


def in_a_step():
    list(every_block(torch.ones(2, 3)))  # the ring: sent from one rank to the next
    all_reduce_sum(torch.ones(3))


def in_an_evaluation():
    all_gather_rows(torch.ones(2, 3))


def run_rank(rank, folder, exchange, frozen, ends, port):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    runtime = Runtime("fp32")
    exchange()
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    runtime.summed([1], 0, 30)
    if rank == frozen:
        if ends:
            os._exit(0)
        os.kill(os.getpid(), signal.SIGSTOP)
        return
    began = time.monotonic()
    with pytest.raises(UserError) as caught, runtime.reaching("the end of it", 1):
        exchange()
        exchange()  # what is small may have left already
    (folder / f"told{rank}").write_text(str(caught.value))
    (folder / f"took{rank}").write_text(str(time.monotonic() - began))
    if not ends:
        while not all((folder / f"told{other}").exists() for other in {0, 1, 2} - {frozen}):
            time.sleep(0.1)
        os.kill(int((folder / f"pid{frozen}").read_text()), signal.SIGKILL)
    os._exit(0)


@pytest.mark.parametrize("exchange", [in_a_step, in_an_evaluation])
@pytest.mark.parametrize(("frozen", "ends"), [(0, False), (1, False), (2, True)])
def test_row_31_who_stands_still_or_ends_is_named(exchange, frozen, ends, tmp_path, free_port):
    with pytest.raises(Exception, match="SIGKILL") if not ends else nullcontext():
        run_on_ranks(3, run_rank, tmp_path, exchange, frozen, ends, free_port, seconds=60)
    for rank in {0, 1, 2} - {frozen}:
        what = "ended before the end of it" if ends else "did not reach the end of it within 1 seconds"
        assert f"rank {frozen} {what}" in (tmp_path / f"told{rank}").read_text()
        assert float((tmp_path / f"took{rank}").read_text()) < (1 if ends else 5)


@pytest.mark.slow_fault
def test_row_31_all_ranks_write_where_they_hang(tmp_path, free_port):
    (tmp_path / "tiny.yaml").write_text(TINY)
    run = tmp_path / "run"
    flags = ("--config", tmp_path / "tiny.yaml", "--run_folder", run, "--data.train", "faulty:train")
    status, told, _ = run_faulty(
        "sleep,1,20,1000", 2, free_port, *flags, "--data.timeout", "4", "--health.hang_after", "1"
    )
    assert status and "rank 1 did not reach step 3" in told
    assert told.count("no step, evaluation or save has ended for 1 seconds") == 1 and str(run / "stacks") in told
    stacks = [(run / "stacks" / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert "in summed" in stacks[0] and "in slow" in stacks[1] and "hang watch" not in told
    assert all(text.count("Thread") >= 2 for text in stacks), "all threads"
