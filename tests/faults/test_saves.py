"""Rows of the fault matrix about what goes wrong in a save: earlier checkpoints stay as they were."""

import os
import random

import pytest
from launching import ROOT, pretrain_here, rows
from rank_processes import script_on_ranks

from contrastive.errors import UserError
from contrastive.files import problem, sha256
from contrastive.train import saver

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def sums(folder):
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def fail_on_ranks(fault, tiny, run, port, *flags, **environment):
    """Train on 2 ranks until a save fails; return what each says, its progress lines left out."""
    script = ROOT / "tests" / "faults" / "faulty_saves.py"
    words = ("--config", tiny, "--run_folder", run, *flags)
    told = {"folder": run.parent / "told", "FAULT": fault, **environment}
    statuses, message = script_on_ranks(2, port, script, *words, **told)
    assert statuses == [2, 2] and "Traceback" not in message, message
    return sorted(line for line in message.splitlines() if "error:" in line)


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("rank", "sharded"), [(0, {}), (0, FSDP), (1, FSDP)])
def test_row_9_disk_full_while_saving(rank, sharded, tiny, tmp_path, free_port):
    """At a random byte of the save of step 6; whoever writes it, both ranks stop, and the run goes on from step 3."""
    run, limit = tmp_path / "run", random.Random(rank + bool(sharded)).randint(8_000, 40_000)
    pretrain_here("--config", tiny, "--run_folder", tmp_path / "whole")
    lines = fail_on_ranks(f"full,{rank},3,{limit}", tiny, run, free_port, **sharded)
    failed, good = "step-00000006", "step-00000003"
    assert f"cannot save {run}/checkpoints/{failed}: " in lines[0] and "earlier checkpoints are intact" in lines[0]
    assert "too large" in "".join(lines) and len(lines) == 2
    before = sums(run / "checkpoints" / good)
    assert problem(run / "checkpoints" / good) is None and failed not in os.listdir(run / "checkpoints")
    pretrain_here("--run_folder", run, "--resume")
    assert sums(run / "checkpoints" / good) == before
    whole, resumed = ([row["loss"] for row in rows(folder)] for folder in (tmp_path / "whole", run))
    assert resumed == pytest.approx(whole, rel=1e-5) and len(resumed) == 9
    assert not [name for name in os.listdir(run / "checkpoints") if name.startswith(".")]


def test_row_10_the_writer_raises(tiny, tmp_path, free_port):
    """The save of step 6 fails: step 7 does not come, on either rank, and the only checkpoint to keep is kept."""
    run = tmp_path / "run"
    lines = fail_on_ranks("raise,0,3,0", tiny, run, free_port, "--checkpoint.keep", "1")
    assert "[rank 0] [Errno 5] Input/output error" in lines[0]
    assert "[rank 1] another rank could not save a checkpoint; its message says why" in lines[1]
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]
    assert os.listdir(run / "checkpoints") == ["step-00000003"]
    assert problem(run / "checkpoints" / "step-00000003") is None


def test_row_11_keeping_the_last_ones_with_the_newest_torn(tiny, tmp_path, monkeypatch):
    run, write = tmp_path / "run", saver.write_checkpoint

    def tear(folder, *args):
        older = sorted(folder.parent.glob("step-*"))
        if folder.name == "step-00000009":  # the newest so far, though it was whole when it was written
            (older[-1] / "model.safetensors").write_bytes(b"torn")
        write(folder, *args)

    monkeypatch.setattr(saver, "write_checkpoint", tear)
    pretrain_here("--config", tiny, "--run_folder", run, "--checkpoint.keep", "2")
    found = {path.name: problem(path) for path in sorted((run / "checkpoints").iterdir())}
    assert found == {
        "step-00000003": None,  # would be gone if the torn one counted
        "step-00000006": "model.safetensors is damaged",
        "step-00000009": None,
    }


def test_row_11_the_one_just_written_is_torn(tiny, tmp_path, monkeypatch):
    run, write = tmp_path / "run", saver.write_checkpoint

    def tear(folder, *args):
        write(folder, *args)
        if folder.name == "step-00000006":
            flip_bit(folder / "optimizer.safetensors")

    monkeypatch.setattr(saver, "write_checkpoint", tear)
    with pytest.raises(UserError, match="step-00000006, just written: optimizer.safetensors is damaged"):
        pretrain_here("--config", tiny, "--run_folder", run, "--checkpoint.keep", "1")
    assert problem(run / "checkpoints" / "step-00000003") is None
