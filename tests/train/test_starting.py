"""One launch at a time in a run folder, wherever it starts; and what `--resume auto` makes of what it finds there."""

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from filelock import FileLock
from launching import pretrain_here, rows

from contrastive.errors import UserError
from contrastive.files import read_json
from contrastive.train import launches
from contrastive.train.launches import LOCK, STARTS, RunLock, goes_on

HOLD = """
import sys, time, pathlib
from contrastive.train import launches
launches.BEAT, launches.SILENT = 0.1, 1.0
with launches.RunLock(pathlib.Path(sys.argv[1])) as lock:
    lock.begin(0, None)
    print("holds", flush=True)
    sys.stdin.readline()
    lock.check()
"""


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(launches, "BEAT", 0.1)
    monkeypatch.setattr(launches, "SILENT", 1.0)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a folder, and looks whether it still does when it is told to."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.communicate()


def last_start(folder):
    return {name: value for name, value in read_json(folder / STARTS).items() if name != "id"}


def take(folder):
    with RunLock(folder) as lock:
        lock.begin(0, None)
        return lock.number


def on_another_host(folder):
    """Rewrite the lock as if its holder were on another host, whose processes cannot be seen from here."""
    path = folder / LOCK
    text = "".join("host=far\n" if line.startswith("host=") else line + "\n" for line in path.read_text().splitlines())
    with path.open("r+") as file:
        file.write(text)
        file.truncate()


@pytest.mark.parametrize("far", [False, True])
def test_a_second_launch_is_refused_while_the_first_lives(far, quick, holder, tmp_path):
    if far:
        on_another_host(tmp_path / "run")
    with pytest.raises(UserError, match="another process is training in"):
        take(tmp_path / "run")
    _, told = holder.communicate("\n", timeout=20)
    assert holder.returncode == 0 and not told
    assert take(tmp_path / "run") == 2  # let go of, and nothing left
    assert [path.name for path in (tmp_path / "run").iterdir()] == [STARTS]


def test_the_lock_of_a_killed_process_is_taken_over_at_once(holder, tmp_path, capsys):
    holder.kill()
    holder.wait()
    began = time.monotonic()
    assert take(tmp_path / "run") == 2 and time.monotonic() - began < 1
    assert f"from process {holder.pid} on" in capsys.readouterr().err


def test_a_silent_host_loses_its_lock_and_then_writes_nothing(quick, holder, tmp_path, monkeypatch, capsys):
    on_another_host(tmp_path / "run")
    holder.send_signal(signal.SIGSTOP)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1e6)  # a clock that has jumped hastens nothing
    began = time.monotonic()
    assert take(tmp_path / "run") == 2
    assert time.monotonic() - began >= 0.9 and "on far, which is gone without a word" in capsys.readouterr().err
    holder.send_signal(signal.SIGCONT)
    _, told = holder.communicate("\n", timeout=20)
    assert holder.returncode and "launch 2 has taken" in told.splitlines()[-1]


def hold_as_before(path, ready):
    with FileLock(path):
        ready.set()
        time.sleep(60)


def test_the_lock_of_an_older_version(quick, tmp_path):
    (tmp_path / LOCK).touch()
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    older = context.Process(target=hold_as_before, args=(tmp_path / LOCK, ready))
    older.start()
    ready.wait(10)
    with pytest.raises(UserError, match="another process is training in"):
        take(tmp_path)
    older.kill()
    older.join()
    assert take(tmp_path) == 1 and not (tmp_path / LOCK).exists()


def test_starts_in_a_row_without_progress_are_counted(tmp_path):
    def start(step, most):
        with RunLock(tmp_path) as lock:
            lock.begin(step, most)

    start(0, 2)
    start(0, 2)
    with pytest.raises(UserError, match="2 starts in a row from step 0 of .* got no further"):
        start(0, 2)
    start(4, 2)  # progress
    start(4, 2)
    start(4, None)  # a person's --resume
    start(4, 2)
    with pytest.raises(UserError, match="then go on with --resume, or allow more with --max_restarts"):
        start(4, 2)
    assert last_start(tmp_path) == {"start": 6, "step": 4, "times": 2}


def test_what_automatic_goes_on_from(tmp_path):
    run = tmp_path / "run"
    assert not goes_on(run)
    run.mkdir()
    for name in (LOCK, STARTS, ".config.yaml.7.partial", "config.yaml"):
        (run / name).touch()
    (run / "checkpoints" / ".tmp-step-00000000").mkdir(parents=True)
    assert not goes_on(run)
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')  # whose checkpoints somebody removed
    assert goes_on(run)


@pytest.fixture
def gone_lock(tmp_path):
    """What the lock file of a process says that is gone."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with RunLock(tmp_path / "other"):
        return re.sub(r"(?m)^pid=.*$", f"pid={gone.pid}", (tmp_path / "other" / LOCK).read_text())


def test_a_run_that_was_killed_as_it_ended_ends(tiny, gone_lock, tmp_path):
    run = tmp_path / "run"
    command = ("--config", tiny, "--run_folder", run, "--train.steps", "2", "--resume", "auto")
    pretrain_here(*command)
    (run / "report.html").unlink()  # after the final model
    pretrain_here(*command)
    assert (run / "report.html").exists()
    (run / LOCK).write_text(gone_lock)  # after the report
    pretrain_here(*command)
    assert not (run / LOCK).exists() and last_start(run)["start"] == 3


def test_resume_auto_starts_goes_on_and_ends(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    command = ("--config", tiny, "--run_folder", run, "--train.steps", "4", "--resume", "auto")
    run.mkdir()
    (run / "config.yaml").write_text("train: {steps: 3}")  # of a start that was killed before it saved
    pretrain_here(*command, "--max_restarts", "1")
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]
    assert last_start(run) == {"start": 1, "step": 0, "times": 1}
    pretrain_here(*command)
    assert "has reached its last step, 4: nothing is left to do" in capsys.readouterr().err
    shutil.rmtree(run / "final")
    pretrain_here(*command)
    assert (run / "final").exists() and last_start(run) == {"start": 2, "step": 4, "times": 1}
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "model.safetensors").write_bytes(b"")
    before = sorted(path for path in run.rglob("*") if path.name != LOCK)
    with pytest.raises(UserError, match="cannot resume from .*all are damaged"):
        pretrain_here(*command)
    assert sorted(path for path in run.rglob("*") if path.name != LOCK) == before
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="cannot resume from .*there is none"):
        pretrain_here(*command)


def test_an_automatic_start_does_not_write_among_other_files(tiny, tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UserError, match="exists; continue it with --resume, or name another"):
        pretrain_here("--config", tiny, "--run_folder", tmp_path, "--resume", "auto")
    with pytest.raises(UserError, match="max_restarts has no effect without --resume auto"):
        pretrain_here("--config", tiny, "--run_folder", tmp_path / "run", "--max_restarts", "2")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tiny, tmp_path):
    pretrain_here("--config", tiny, "--run_folder", tmp_path / "run", "--train.steps", "2")
    (tmp_path / "run").chmod(0o500)
    try:
        with pytest.raises(UserError, match="cannot write to .*run; name another folder"):
            pretrain_here("--run_folder", tmp_path / "run", "--resume")
    finally:
        (tmp_path / "run").chmod(0o700)
