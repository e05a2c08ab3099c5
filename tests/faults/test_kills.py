"""Rows of the fault matrix about processes that are killed or asked to stop: what went on ends as if nothing was."""

import itertools
import random
import re
import signal
import subprocess
import time

import psutil
import pytest
from launching import ON_CPU, ROOT, assert_same_run, command, environment, pretrain_here, ranks, rows
from rank_processes import script_on_mortal_ranks, script_on_ranks, start_script

from contrastive.errors import UserError
from contrastive.files import problem, sha256
from contrastive.train.checkpoint import find_checkpoint
from contrastive.train.launches import LOCK

FAULTY = ROOT / "tests" / "faults" / "faulty.py"
LONG = ("--train.steps", "60")


class Ranks:
    """Runs on ranks that are forked, each with a port and a folder for what it tells."""

    def __init__(self, number, port, folder):
        self.number, self.port, self.folder, self.runs = number, port, folder, 0

    def _places(self):
        self.runs += 1
        return self.folder / f"told-{self.runs}", self.port + self.runs

    def __call__(self, *args, fault="none,0,0,0"):
        """Run to the end; return what was told."""
        told, port = self._places()
        statuses, message = script_on_ranks(self.number, port, FAULTY, *args, folder=told, FAULT=fault)
        assert not any(statuses), message
        return message

    def with_fault(self, fault, *args):
        told, port = self._places()
        return script_on_mortal_ranks(self.number, port, FAULTY, *args, folder=told, FAULT=fault)


@pytest.fixture
def on_ranks(tmp_path, free_port):
    return lambda number: Ranks(number, free_port, tmp_path)


def launched(run, port, *args):
    """Start two ranks as a user does."""
    return subprocess.Popen(
        command(*args, "--run_folder", run, launcher=ranks(2, port)),
        env=environment() | ON_CPU | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_step(process, run, step):
    limit = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or not any(row["step"] >= step for row in rows(run)):
        assert process.poll() is None and time.monotonic() < limit, process.communicate()[1]
        time.sleep(0.002)


def wait_for_end(processes, seconds):
    _, alive = psutil.wait_procs(processes, seconds)
    alive = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    for process in alive:
        process.kill()
    assert not alive, f"{len(alive)} processes are left after {seconds} seconds"


def end_all(launcher):
    for process in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
        process.kill()


@pytest.mark.slow_fault
def test_row_1_all_processes_are_killed_at_random_steps(tiny, tmp_path, on_ranks, free_port):
    seed = random.randrange(1000)
    steps = sorted(random.Random(seed).sample(range(1, 59), 8))
    on_ranks(2)("--config", tiny, "--run_folder", tmp_path / "whole", *LONG)
    run = tmp_path / "run"
    flags = ("--config", tiny, *LONG)
    for number, step in enumerate(steps):
        launcher = launched(run, free_port + 10 + number, *flags)
        wait_for_step(launcher, run, step)
        end_all(launcher)
        launcher.communicate()
        flags = ("--resume",)
    assert not (run / "final").exists(), f"seed {seed}: steps {steps}"
    launcher = launched(run, free_port + 20, "--resume")
    assert "resuming" in launcher.communicate()[1] and launcher.returncode == 0
    assert_same_run(run, tmp_path / "whole")


@pytest.mark.parametrize("every", [40, pytest.param(1, marks=pytest.mark.slow_fault)])
def test_row_2_killed_at_each_thing_that_a_save_does_to_the_disk(every, tiny, tmp_path, on_ranks):
    """Each run goes on from what the one before left, and is killed an operation later in its first save."""
    go, run = on_ranks(2), tmp_path / "run"
    flags = ("--config", tiny, "--loss", "faulty", "--train.steps", "90", "--checkpoint.keep", "1")
    go(*flags, "--run_folder", tmp_path / "whole")
    go.with_fault("term,0,5,1", *flags, "--run_folder", run)  # stopped after a save, so that the next has another name
    seen = []
    for operation in itertools.count(1, every):
        expected = find_checkpoint(run / "checkpoints")
        assert re.fullmatch(r"step-\d{8}", expected.name) and problem(expected) is None
        statuses, told = go.with_fault(f"save-die,0,{operation},1", "--run_folder", run, "--resume")
        assert f"from {expected.name}" in told
        if not any(statuses):
            break  # a save does less than that
        seen.append(re.search(r"fault: operation \d+: (.*) at", told)[1])
        assert statuses[0] == -signal.SIGKILL and statuses[1] not in (0, None)
    if every == 1:
        for pattern in (r"mkdir .tmp-step", "open .*model.safetensors", "open .*manifest", r"rename .tmp-step-\d+$"):
            assert any(re.search(pattern, what) for what in seen), f"never killed at {pattern}"
    assert_same_run(run, tmp_path / "whole")
    assert not list(run.rglob(".tmp-*")) and not list(run.rglob("*.partial"))


def test_row_3_one_rank_is_killed(tiny, tmp_path, on_ranks):
    """Without a launcher that would end the others."""
    go, run = on_ranks(2), tmp_path / "run"
    flags = ("--config", tiny, "--loss", "faulty")
    go(*flags, "--run_folder", tmp_path / "whole")
    statuses, told = go.with_fault("die,1,5,1", *flags, "--run_folder", run)
    assert statuses[1] == -signal.SIGKILL and statuses[0] not in (0, None)
    assert "from step-00000003" in go("--run_folder", run, "--resume")
    assert_same_run(run, tmp_path / "whole")


@pytest.mark.slow_fault
@pytest.mark.parametrize("rank", [0, 1])
def test_row_3_one_rank_is_killed_under_torchrun(rank, tiny, tmp_path, on_ranks, free_port):
    run = tmp_path / "run"
    flags = ("--config", tiny, *LONG)
    on_ranks(2)(*flags, "--run_folder", tmp_path / "whole")
    launcher = launched(run, free_port + 10, *flags)
    wait_for_step(launcher, run, 20)
    children = psutil.Process(launcher.pid).children(recursive=True)
    (one,) = (child for child in children if child.environ().get("RANK") == str(rank) and child.ppid() == launcher.pid)
    one.kill()
    began = time.monotonic()
    launcher.communicate()
    wait_for_end(children, 1)
    assert launcher.returncode != 0 and time.monotonic() - began < 10
    launcher = launched(run, free_port + 11, "--resume")
    assert "resuming" in launcher.communicate()[1] and launcher.returncode == 0
    assert_same_run(run, tmp_path / "whole")


@pytest.mark.slow_fault
def test_row_4_the_launcher_is_killed(tiny, tmp_path, free_port):
    run = tmp_path / "run"
    launcher = launched(run, free_port, "--config", tiny, "--train.steps", "100000", "--data.num_workers", "1")
    wait_for_step(launcher, run, 5)
    children = psutil.Process(launcher.pid).children(recursive=True)
    assert len(children) >= 4, "two ranks and their loader workers"
    launcher.kill()
    wait_for_end(children, 3)
    assert problem(find_checkpoint(run / "checkpoints")) is None


@pytest.mark.slow_fault
@pytest.mark.parametrize("seconds", [0, 2, 4])
def test_row_4_the_launcher_is_killed_while_its_ranks_start(seconds, tiny, tmp_path, free_port):
    """They wait for each other at a place that it has kept, and where Python hears of no signal."""
    launcher = launched(tmp_path / "run", free_port, "--config", tiny, "--train.steps", "100000")
    limit = time.monotonic() + 60
    while len(children := psutil.Process(launcher.pid).children(recursive=True)) < 2:
        assert launcher.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    time.sleep(seconds)
    launcher.kill()
    wait_for_end(children, 20)  # to where they have imported torch


def test_row_5_a_second_launch_is_refused_and_changes_nothing(tiny, tmp_path, free_port):
    run, told = tmp_path / "run", tmp_path / "told/stderr0"
    start = ("--config", tiny, "--data.train", "faulty:train", "--train.steps", "1000", "--run_folder", run)
    # A run that stands still, for its files to be the same, and is alive.
    (first,) = start_script(1, free_port, FAULTY, *start, folder=told.parent, FAULT="sleep,0,500,1")
    told.touch()
    try:
        limit = time.monotonic() + 60
        while "fault: sleep" not in told.read_text() or list(run.glob("checkpoints/.tmp-*")):
            assert first.is_alive() and time.monotonic() < limit, told.read_text()
            time.sleep(0.02)
        before = {path: sha256(path) for path in run.rglob("*") if path.is_file() and path.name != LOCK}
        assert len(rows(run)) > 4
        again = ("--run_folder", run, "--data.train", "digits:train")
        for flags, words in (
            ((*again, "--config", tiny), "exists; continue it with --resume"),
            ((*again, "--resume"), "another process is training in"),
            ((*again, "--resume", "auto"), "another process is training in"),
        ):
            with pytest.raises(UserError, match=words):
                pretrain_here(*flags)
        now = {path: sha256(path) for path in run.rglob("*") if path.is_file() and path.name != LOCK}
        assert before == now and first.is_alive()
    finally:
        first.kill()
        first.join()


def stop_and_resume(fault, number, flags, tmp_path, go):
    """Return the statuses of a run that was asked to stop; its continuation equals the run that was not."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    go(*flags, "--run_folder", whole)
    statuses, told = go.with_fault(fault, *flags, "--run_folder", run)
    (step,) = {int(step) for step in re.findall(r"stopped at step (\d+)", told)}
    newest = max((run / "checkpoints").glob("*"))
    assert newest.name == f"step-{step:08d}" and problem(newest) is None
    assert not list(run.rglob(".tmp-*")) and not (run / "final").exists()
    assert f"from {newest.name}" in go("--run_folder", run, "--resume")
    assert_same_run(run, whole)
    return statuses, step


def test_row_13_sigterm_on_one_rank_of_three(tiny, tmp_path, on_ranks):
    flags = ("--config", tiny, "--loss", "faulty", "--train.global_batch_size", "12", "--checkpoint.every", "100")
    statuses, step = stop_and_resume("term,2,4,1", 3, flags, tmp_path, on_ranks(3))
    assert step in (4, 5) and len(set(statuses)) == 1 and statuses[0] > 0


@pytest.mark.parametrize("fault", ["term,1,4,2", "save-term,0,9,1"])
def test_row_14_sigterm_twice_or_during_a_save(fault, tiny, tmp_path, on_ranks):
    """The second comes in the step before the save; the other within the first save of all."""
    flags = ("--config", tiny, "--loss", "faulty")
    statuses, step = stop_and_resume(fault, 2, flags, tmp_path, on_ranks(2))
    assert len(set(statuses)) == 1 and statuses[0] > 0 and step == (5 if "save" not in fault else 1)
