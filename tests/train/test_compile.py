"""--train.compile: the numbers of an uncompiled run, one code for equal blocks, and no start without a compiler."""

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from contrastive.distributed.runtime import Runtime
from contrastive.errors import UserError
from contrastive.log import read_metrics
from contrastive.train.contrastive_task import PretrainConfig
from contrastive.train.pretrain import pretrain
from contrastive.train.run import command

DEEPER = ("--model.image.depth", "3", "--model.text.depth", "2")


def trained(tiny, folder, *flags):
    args = ["--config", str(tiny), "--run_folder", str(folder), *DEEPER, *flags]
    command(PretrainConfig, pretrain, args, name="t", doc="", default_recipe=str(tiny), shown="")
    losses = [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "train"]
    return losses, load_file(folder / "final" / "model.safetensors")


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without code generation: what it traces is run by torch's own operators."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_(function, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()


MICRO_BATCHES = ("--train.accumulate", "2", "--train.gradient_checkpointing", "1")


@pytest.mark.parametrize("flags", [pytest.param((), marks=pytest.mark.slow), MICRO_BATCHES])
def test_a_compiled_run_is_an_uncompiled_one(flags, tiny, tmp_path, traced):
    expected, weights = trained(tiny, tmp_path / "plain", *flags, "--train.compile", "off")
    assert not counters["stats"]
    losses, found = trained(tiny, tmp_path / "compiled", *flags, "--train.compile", "on")
    assert losses == pytest.approx(expected, rel=1e-6)
    assert found.keys() == weights.keys()
    torch.testing.assert_close(found, weights, rtol=1e-4, atol=1e-6)
    # One for the trial and one for each tower, whatever its depth; with micro-batches each also without gradients.
    assert counters["stats"]["unique_graphs"] == (5 if "--train.accumulate" in flags else 3)
    assert not counters["graph_break"]


def test_without_a_compiler_on_is_refused_and_auto_goes_on(monkeypatch, capsys):
    def fails(function, **_):
        raise RuntimeError("no compiler\nat all")

    runtime = Runtime("fp32")
    assert not runtime.compiles("off") and not runtime.compiles("auto")  # on a CPU
    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(UserError, match="^train.compile 'on': torch.compile does not work here: no compiler; install"):
        runtime.compiles("on")
    monkeypatch.setattr(runtime, "device", torch.device("cuda"))
    assert not runtime.compiles("auto")
    assert "not compiled, which is slower: torch.compile does not work here: no compiler" in capsys.readouterr().err
