"""Launchers start a run again, which ends as if nothing had happened; one that dies takes its ranks along."""

import subprocess
import sys
import time

import psutil
import pytest
from launching import ACCELERATE, ON_CPU, ROOT, command, environment, ranks, rows
from rank_processes import script_on_ranks
from safetensors.torch import load_file

from contrastive.files import read_json
from contrastive.train.launches import LOCK, STARTS, STOPPED

FLAGS = ("--train.steps", "60", "--checkpoint.every", "5", "--checkpoint.keep", "20", "--evaluation.every", "60")
# Neither does without the other: a group that is started again hangs in what the first one left in a store they share.
RESTARTING = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ONE_STORE_EACH = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.fixture
def start(tiny, tmp_path):
    """Start a run in a session of its own, and end it with the test."""
    started = []

    def start(launcher, *flags, **variables):
        words = command("--config", tiny, "--run_folder", tmp_path / "run", *flags, launcher=launcher)
        with (tmp_path / "told").open("w") as told:
            started.append(subprocess.Popen(words, env=environment() | variables, stderr=told, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            left = [process, *psutil.Process(process.pid).children(recursive=True)]  # ranks have sessions of their own
            for other in left:
                other.kill()


def wait_for(what, process, seconds=180):
    limit = time.monotonic() + seconds
    while not what():
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.01)


def rank_processes(launcher):
    """The ranks: what the launcher or its child has started, workers of theirs left out."""
    found = [p for p in psutil.Process(launcher.pid).children(recursive=True) if "RANK" in p.environ()]
    return [p for p in found if p.ppid() not in [other.pid for other in found]]


@pytest.mark.parametrize("kind", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_one_rank_is_killed_and_the_launcher_starts_all_again(kind, start, tiny, tmp_path, free_port):
    run = tmp_path / "run"
    if kind == "torchrun":
        launcher, variables = (*RESTARTING, "--max-restarts", "2"), ON_CPU | ONE_STORE_EACH
    else:
        port = ("--main_process_port", str(free_port))
        launcher, variables = (*ACCELERATE, "--cpu", "--num_processes", "2", "--max_restarts", "2", *port), {}
    process = start(launcher, *FLAGS, "--resume", "auto", **variables)
    wait_for(lambda: (run / "checkpoints/step-00000010").exists(), process)
    rank_processes(process)[1].kill()
    assert process.wait(120) == 0, (tmp_path / "told").read_text()
    last = read_json(run / STARTS)
    assert last["start"] == 2 and last["step"] >= 10
    assert not (run / LOCK).exists() and not [path for path in run.rglob(".*") if path.name != ".hang"]
    script = ROOT / "scripts" / "pretrain.py"
    words = ("--config", tiny, "--run_folder", tmp_path / "whole", *FLAGS)
    statuses, told = script_on_ranks(2, free_port, script, *words, folder=tmp_path / "out")
    assert statuses == [0, 0], told
    assert [row["loss"].hex() for row in rows(run)] == [row["loss"].hex() for row in rows(tmp_path / "whole")]
    ours, theirs = (load_file(folder / "final/model.safetensors") for folder in (run, tmp_path / "whole"))
    assert all((ours[name] == theirs[name]).all() for name in theirs)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_ranks_of_a_killed_launcher_save_and_are_gone(start, tmp_path, free_port):
    run = tmp_path / "run"
    process = start(ranks(2, free_port), "--train.steps", "100000", "--checkpoint.every", "50000", **ON_CPU)
    wait_for(lambda: (run / "metrics.jsonl").exists() and rows(run), process)
    left = rank_processes(process)
    process.kill()
    _, alive = psutil.wait_procs(left, timeout=20)  # a second or less, on a machine that has nothing else to do
    assert len(left) == 2 and not alive
    assert read_json(run / STOPPED)["signal"] == "SIGTERM" and not (run / LOCK).exists()
