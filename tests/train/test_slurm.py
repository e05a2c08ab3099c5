"""scripts/slurm.sh on a SLURM that is this machine: a run starts, is stopped, goes back into the queue, resumes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT, environment, rows

# What srun does with its command on each node, and with SIGUSR1: it passes it on to each.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
command = sys.argv[next(n for n in range(1, 9) if not sys.argv[n].startswith("-")):]
numbers = range(int(os.environ["SLURM_NNODES"]))
nodes = [subprocess.Popen(command, env=os.environ | {{"SLURM_NODEID": str(number)}}) for number in numbers]
signal.signal(signal.SIGUSR1, lambda *_: [node.send_signal(signal.SIGUSR1) for node in nodes])
sys.exit(max(node.wait() for node in nodes))
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) printf '127.0.0.1\\nnode-b\\n' ;;
    requeue) echo "$2" >> "$TOLD/requeued" ;;
esac
"""
# A launcher with one rank, which does not end before the rank does, and then says 0 or 1.
ACCELERATE = f"""#!/bin/bash
echo "$*" >> "$TOLD/launched-$SLURM_NODEID"
{sys.executable} -c "$RANK_DOES" || exit 1
"""
ALONE = f"""#!/bin/bash
while [ "$1" != scripts/pretrain.py ]; do shift; done
exec {sys.executable} "$@"
"""
TRAIN = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(130))
pathlib.Path(os.environ["TOLD"], "started-" + os.environ["SLURM_NODEID"]).touch()
time.sleep(60)
"""


@pytest.fixture
def submit(tmp_path, monkeypatch):
    """Start the script as SLURM would, in jobs of one processor a node."""
    programs, told = tmp_path / "bin", tmp_path / "told"
    programs.mkdir()
    told.mkdir()
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    started = []

    def submit(*flags, accelerate="", **variables):
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "accelerate": accelerate}.items():
            if text:
                (programs / name).write_text(text)
                (programs / name).chmod(0o755)
        env = environment() | job | {"PATH": path, "PYTHONPATH": str(ROOT), "TOLD": str(told), **variables}
        command = ["bash", str(ROOT / "scripts" / "slurm.sh"), *map(str, flags)]
        out = (tmp_path / "out").open("a")
        started.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True))
        return started[-1]

    yield submit, told
    for job in started:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)


def wait_for(what, seconds=120):
    limit = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("rank_does", "is_stopped", "status", "requeued"),
    [("", False, 0, False), ("raise SystemExit(3)", False, 1, False), (TRAIN, True, 0, True)],
    ids=["ended", "failed", "stopped"],
)
def test_only_a_run_that_was_stopped_goes_back_into_the_queue(
    rank_does, is_stopped, status, requeued, submit, tmp_path
):
    submit, told = submit
    job = submit("--loss", "two words", accelerate=ACCELERATE, RUN=str(tmp_path / "run"), RANK_DOES=rank_does)
    if is_stopped:
        wait_for(lambda: len(list(told.glob("started-*"))) == 2)
        job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == status
    assert (told / "requeued").exists() == requeued
    for node in (0, 1):
        words = (told / f"launched-{node}").read_text()
        assert words == (
            "launch --config_file configs/accelerate/eight_gpus.yaml --num_machines 2 --num_processes 2 "
            f"--machine_rank {node} --main_process_ip 127.0.0.1 --main_process_port 20007 scripts/pretrain.py "
            f"--out {tmp_path / 'run'} --resume auto --loss two words\n"
        )


def test_without_a_run_folder_nothing_starts(submit, tmp_path):
    submit, told = submit
    assert submit(accelerate=ACCELERATE).wait(30) == 1
    assert "say where the run is kept: RUN=runs/mine" in (tmp_path / "out").read_text()
    assert not list(told.iterdir())


@pytest.mark.slow
def test_a_sharded_run_on_two_nodes_is_stopped_and_resumed(submit, tiny, tmp_path, free_port):
    """The real launcher and run: a rank on each node, saved at a step that no option names."""
    submit, told = submit
    run, out = tmp_path / "run", tmp_path / "out"
    flags = ("--config", tiny, "--train.steps", "200", "--evaluation.every", "200", "--checkpoint.every", "200")
    how = {"RUN": str(run), "SLURM_JOB_ID": str(free_port), "ACCELERATE_USE_CPU": "true"}
    job = submit(*flags, LAUNCH_CONFIG="configs/accelerate/fsdp2.yaml", **how)
    wait_for(lambda: (run / "metrics.jsonl").exists() and rows(run))
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 0, out.read_text()
    assert (told / "requeued").read_text() == f"{free_port}\n"
    stopped = len(rows(run))
    assert stopped < 200 and (run / f"checkpoints/step-{stopped:08d}/optimizer").is_dir()
    # The next job has one node; its launcher is a short way to a process, which is quicker to start.
    job = submit(*flags, accelerate=ALONE, SLURM_NNODES="1", **how)
    assert job.wait(120) == 0, out.read_text()
    assert f"resuming {run} from step-{stopped:08d}" in out.read_text()
    assert len(rows(run)) == 200 and (run / "final/model.safetensors").exists()
    assert (told / "requeued").read_text() == f"{free_port}\n"  # not again
