"""FSDP2 over gloo: the losses and weights of one process, whatever the number of ranks that saved and went on."""

from pathlib import Path

import pytest
import torch
from launching import rows
from rank_processes import script_on_ranks
from safetensors.torch import load_file

import contrastive
from contrastive.data.sources import open_source
from contrastive.evaluate.classification import zero_shot

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/pretrain.py"
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
TOGETHER = (
    *("--optimizer", "muon", "--train.ema_decay", "0.5", "--train.accumulate", "2", "--train.max_grad_norm", "0.1"),
    *("--train.gradient_checkpointing", "0.5", "--evaluation.every", "6", "--checkpoint.every", "3"),
    *("--train.log_every", "1", "--train.steps", "6", "--model.image.dropout", "0"),
)


@pytest.fixture
def trained(tiny, tmp_path, free_port):
    def run(ranks, name, *flags, port=[free_port], **environment):  # noqa: B006 - a port for each
        port[0] += 1
        folder = tmp_path / name
        status, told = script_on_ranks(
            ranks, port[0], SCRIPT, *flags, "--run_folder", folder, folder=tmp_path / f"told-{name}", **environment
        )
        assert set(status) == {0}, told
        return folder

    return run


def assert_alike(run, reference):
    for ours, theirs in zip(rows(run), rows(reference), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours["logit_scale"] == pytest.approx(theirs["logit_scale"], rel=1e-6)
    assert len(rows(run)) == 6
    ours, theirs = (load_file(folder / "final/model.safetensors") for folder in (run, reference))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # Sums of gradients in another order, and Muon's rounds make them grow.
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize(
    ("loss", "duplicates", "ranks"),
    [("sigmoid", "positive", 4), ("softmax", "ignore", 2), ("softmax", "positive", 2)],
)
def test_losses_and_weights_are_those_of_one_process_and_of_plain_ranks(loss, duplicates, ranks, tiny, trained):
    flags = ("--config", tiny, "--loss", loss, "--loss.duplicates", duplicates, *TOGETHER)
    one = trained(1, "one", *flags)
    assert_alike(trained(2, "plain", *flags), one)
    sharded = trained(ranks, "sharded", *flags, **FSDP)
    assert_alike(sharded, one)
    assert rows(sharded, "eval")[-1] == pytest.approx(rows(one, "eval")[-1], abs=2.6)  # one image of 40
    bundle = contrastive.load(sharded)  # an ordinary model folder
    assert zero_shot(bundle, open_source("digits:test"), device="cpu", limit=40)["acc1"] == pytest.approx(
        rows(sharded, "eval")[-1]["zero_shot/digits:test/acc1"]
    )


@pytest.mark.parametrize(("saved_by", "resumed_by"), [(4, 2), (2, 4), (2, "plain"), ("plain", 2), (2, 1)])
def test_any_number_of_ranks_goes_on(saved_by, resumed_by, tiny, trained):
    flags = ("--config", tiny, *TOGETHER)
    whole = trained(1, "whole", *flags)

    def go(by, *flags):
        ranks, environment = (2, {}) if by == "plain" else (by, FSDP if by > 1 else {})
        return trained(ranks, "run", *flags, **environment)

    run = go(saved_by, *flags)
    for later in ("checkpoints/step-00000006", "final", "report.html"):
        path = run / later
        path.rename(path.with_name(f"old-{path.name}"))
    saved = run / "checkpoints/step-00000003"
    assert (saved / "optimizer").exists() == (saved_by != "plain")
    go(resumed_by, "--resume")
    assert_alike(run, whole)
