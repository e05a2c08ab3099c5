"""Row 34 of the fault matrix: what FSDP2 saved at two ranks is loaded at one, two and four."""

import shutil

import pytest
import torch
from launching import ROOT, assert_same_run, rows
from rank_processes import script_on_ranks
from safetensors.torch import load_file

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def tensors_of(checkpoint):
    """All that is saved, as names and bytes; what is whole on every rank may be in the file of either."""
    files = [load_file(path) for path in checkpoint.rglob("*.safetensors")]
    return sorted((name, tensor.numpy().tobytes()) for file in files for name, tensor in file.items())


@pytest.mark.parametrize("number", [2, *(pytest.param(n, marks=pytest.mark.slow_fault) for n in (1, 4))])
def test_row_34_sharded_saves_load_at_any_number_of_ranks(number, tiny, tmp_path, free_port):
    whole, run = tmp_path / "whole", tmp_path / "run"

    def go(ranks, port, *flags):
        told, sharded = tmp_path / f"told-{port}", FSDP if ranks > 1 else {}
        statuses, message = script_on_ranks(
            ranks, port, ROOT / "scripts" / "pretrain.py", *flags, folder=told, **sharded
        )
        assert not any(statuses), message
        return message

    go(2, free_port, "--config", tiny, "--run_folder", whole, "--train.ema_decay", "0.9", "--checkpoint.every", "4")
    shutil.copytree(whole, run)
    for later in ("final", "checkpoints/step-00000009", "checkpoints/step-00000008"):
        shutil.rmtree(run / later)
    assert list((run / "checkpoints" / "step-00000004" / "optimizer").glob("shard-*"))
    assert "from step-00000004" in go(number, free_port + 1, "--run_folder", run, "--resume")
    if number == 2:
        assert_same_run(run, whole)
        assert tensors_of(run / "checkpoints" / "step-00000009") == tensors_of(whole / "checkpoints" / "step-00000009")
    assert [row["loss"] for row in rows(run)] == pytest.approx([row["loss"] for row in rows(whole)], rel=1e-5)
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (run, whole))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
