"""Our torchrun ends with the status of the rank that failed, and adds no more than a line to what that rank said."""

import signal
import subprocess
import sys
import time

import pytest
from launching import ROOT, environment

RANK = "import os, signal, sys, time\nrank = os.environ['RANK']\n"
FAILS_SLOWLY = "time.sleep(0.3 * int(rank)); print('why', file=sys.stderr); sys.exit(2)"
IS_KILLED = "if rank == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
SAVES = r"""
def save(number, frame):
    time.sleep(0.5)
    os.write(2, f'{rank} saved\n'.encode())
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, save), signal.signal(signal.SIGINT, save)
os.write(2, f'{rank} trains\n'.encode())
time.sleep(60)
"""


def start(tmp_path, does):
    (tmp_path / "rank.py").write_text(RANK + does)
    launcher = [sys.executable, "-m", "contrastive.distributed.start_ranks", "--nproc_per_node", "2"]
    env = environment() | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*launcher, str(tmp_path / "rank.py")], env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("does", "status", "told"),
    [("", 0, ""), (FAILS_SLOWLY, 2, "why\n"), (IS_KILLED, 137, "rank 1 was killed by SIGKILL\n")],
    ids=["ends", "fails", "is killed"],
)
def test_the_status_is_that_of_the_first_rank_to_fail(does, status, told, tmp_path):
    launcher = start(tmp_path, does)
    _, message = launcher.communicate(timeout=60)
    assert launcher.returncode == status and message == told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_and_the_ranks_are_waited_for(number, tmp_path):
    launcher = start(tmp_path, SAVES)
    told = [launcher.stderr.readline() for _ in range(2)]
    launcher.send_signal(number)
    time.sleep(0.2)
    launcher.send_signal(number)  # again, as an impatient person does
    _, message = launcher.communicate(timeout=60)
    assert sorted(told) == ["0 trains\n", "1 trains\n"]
    assert launcher.returncode == 128 + number and sorted(message.splitlines()) == ["0 saved", "1 saved"]
