"""Rows of the fault matrix that show in a whole run of the script."""

import io
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from launching import ON_CPU, ROOT, environment, pretrain_here, ranks, rows
from PIL import Image
from rank_processes import script_on_ranks
from safetensors.torch import load_file
from shard_writing import write_tar

FAULTY = ROOT / "tests" / "faults" / "faulty.py"


def run_faulty(fault, number, port, *args):
    """Launch faulty.py on some ranks; return its exit status, its messages, and how long after the fault it ended."""
    start = [sys.executable, *ranks(number, port), FAULTY, *args]
    env = environment() | ON_CPU | {"FAULT": fault, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, start)), env=env, capture_output=True, text=True, timeout=200)
    return done.returncode, done.stderr, seconds_since_fault(done.stderr)


def seconds_since_fault(told):
    return time.time() - float(re.search(r"fault: .* at ([\d.]+)", told)[1])


def pretrain_on(number, port, tmp_path, *args):
    """Run scripts/pretrain.py on some ranks; return what they say."""
    statuses, told = script_on_ranks(number, port, ROOT / "scripts" / "pretrain.py", *args, folder=tmp_path / "told")
    assert not any(statuses), told
    return told


def test_row_15_any_number_of_workers_gives_the_same_run(tiny, tmp_path):
    losses, weights = [], []
    for workers in ("0", "1", "2"):
        run = tmp_path / workers
        pretrain_here("--config", tiny, "--run_folder", run, "--data.num_workers", workers)
        losses.append([row["loss"].hex() for row in rows(run)])
        weights.append(load_file(run / "final" / "model.safetensors"))
    assert losses[0] == losses[1] == losses[2] and len(losses[0]) == 9
    assert all((weights[0][name] == other[name]).all() for other in weights[1:] for name in other)


def test_row_16_the_number_of_ranks_changes_in_mid_run(tiny, tmp_path, free_port):
    """2 ranks for three steps, 1 for three, 4 for three: the losses are those of one process throughout."""
    pretrain_here("--config", tiny, "--run_folder", tmp_path / "one")
    run = tmp_path / "changing"
    told = pretrain_on(2, free_port, tmp_path, "--config", tiny, "--run_folder", run)
    assert "2 x cpu" in told
    for step, number in ((3, 1), (6, 4)):
        for checkpoint in (run / "checkpoints").iterdir():
            if int(checkpoint.name.rpartition("-")[2]) > step:
                shutil.rmtree(checkpoint)
        shutil.rmtree(run / "final")
        told = pretrain_on(number, free_port, tmp_path, "--run_folder", run, "--resume")
        assert f"{number} x cpu" in told and f"step-{step:08d}" in told
    one, changing = ([row["loss"] for row in rows(folder)] for folder in (tmp_path / "one", run))
    assert len(one) == 9 and changing == pytest.approx(one, rel=1e-5)


def photo(seed):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def test_row_27_too_many_bad_samples_stop_all_ranks_at_the_same_step(tiny, tmp_path, free_port):
    members = []
    for n in range(200):
        members.append((f"{n:04d}.jpg", b"not an image" if n % 10 < 3 else photo(n)))
        members.append((f"{n:04d}.txt", f"number {n}".encode()))
    write_tar(tmp_path / "data.tar", members)
    run = tmp_path / "run"
    flags = ("--config", tiny, "--run_folder", run, "--data.train", tmp_path / "data.tar", "--train.steps", "100")
    allowed = ("--data.bad_window", "400", "--data.max_bad_share", "0.1")
    words = (*flags, *allowed)
    statuses, told = script_on_ranks(2, free_port, ROOT / "scripts" / "pretrain.py", *words, folder=tmp_path / "told")
    assert all(statuses) and "Traceback (most recent call last)" not in told
    stops = {line.partition("stopped at step ")[2].split(":")[0] for line in told.splitlines() if "stopped at" in line}
    assert len(stops) == 1, "one step, whichever rank says so"
    (step,) = map(int, stops)
    assert 4 <= step <= 15, "41 bad samples of 30 % are met in about nine steps of 16"
    assert "more than 10.00% of 400" in told and "unreadable_image (data.tar/" in told
    (report,) = rows(run, "bad_samples")[-1:]
    assert report["step"] == step and report["counts"]["unreadable_image"] >= 5
    assert 5 <= len(report["keys"]["unreadable_image"]) <= 20
    assert sum(row["counts"]["unreadable_image"] for row in rows(run, "bad_samples")) > 40
    # With enough allowed the same data train, and the report names them.
    pretrain_here(*flags[:2], "--run_folder", tmp_path / "patient", *flags[4:6], "--data.max_bad_share", "0.5")
    report = (tmp_path / "patient" / "report.html").read_text()
    assert "unreadable image" in report and "data.tar/" in report


@pytest.mark.slow_fault
def test_row_31_a_rank_that_sleeps_is_named(tiny, tmp_path, free_port):
    run = tmp_path / "run"
    flags = ("--config", tiny, "--run_folder", run, "--data.train", "faulty:train", "--data.timeout", "4")
    flags += ("--train.global_batch_size", "12")
    status, message, seconds = run_faulty("sleep,1,30,1000000", 3, free_port, *flags)
    assert status != 0 and "rank 1 did not reach step" in message and "within 4 seconds" in message
    assert seconds < 30


@pytest.mark.parametrize(("fault", "words"), [("sleep", "hangs: no batch within 3 seconds"), ("kill", "was killed")])
def test_row_32_a_loader_worker_that_hangs_or_dies(fault, words, tiny, tmp_path, free_port):
    flags = ("--config", tiny, "--run_folder", tmp_path / "run", "--data.train", "faulty:train")
    workers = ("--data.num_workers", "1", "--data.timeout", "3")
    told = {"folder": tmp_path / "told", "FAULT": f"{fault},0,200,1000000"}
    (status,), message = script_on_ranks(1, free_port, FAULTY, *flags, *workers, **told)
    seconds = seconds_since_fault(message)
    assert status == 2 and message.strip().splitlines()[-1].startswith(
        f"faulty.py: error: [rank 0] a loader worker {words}"
    )
    assert "Traceback" not in message and seconds < 15


@pytest.mark.parametrize("calls", [1, 5])
def test_row_33_nan_on_one_rank(calls, tiny, tmp_path, free_port):
    """One step is skipped by all; five in a row stop the run, with finite weights in its checkpoints."""
    run = tmp_path / "run"
    flags = ("--config", tiny, "--run_folder", run, "--loss", "faulty")
    told = {"folder": tmp_path / "told", "FAULT": f"nan,1,4,{calls}"}
    statuses, message = script_on_ranks(2, free_port, FAULTY, *flags, **told)
    assert "step 4 skipped" in message and "image_features on rank 1" in message
    losses = [row["loss"] for row in rows(run)]
    if calls == 1:
        assert not any(statuses) and len(losses) == 9
        assert [step for step, loss in enumerate(losses, 1) if not np.isfinite(loss)] == [4]
        assert load_file(run / "final" / "model.safetensors")["image_tower.patch_embed.weight"].isfinite().all()
    else:
        assert all(statuses) and "5 steps in a row had no finite loss" in message
    for checkpoint in (run / "checkpoints").iterdir():
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())
    assert not [name for name in os.listdir(run) if name.endswith(".partial")]
