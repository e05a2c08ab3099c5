"""Between two reads of figures no step waits for the device: no number of a tensor is asked for.

On a GPU torch's own debug mode says so. A CPU has nothing to wait for: there the operations are looked at that would
wait, and all tensors count as the device's.
"""

from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from contrastive.distributed.launching import has_gpu
from contrastive.distributed.runtime import Runtime
from contrastive.evaluate import report
from contrastive.losses import checks
from contrastive.optim import ExponentialMovingAverage, MuonConfig, step_unless
from contrastive.train import first_look, run
from contrastive.train.classify import TrainClassifierConfig, train_classifier
from contrastive.train.loop import Trainer
from contrastive.train.pretrain import PretrainConfig, pretrain
from contrastive.train.progress import LateFigures

WAITING = {"_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero", "unique_consecutive"}
TINY = """
train: {steps: 5, global_batch_size: 8, accumulate: 2, ema_decay: 0.9, log_every: 2}
data: {train: "digits:train"}
evaluation: {every: 5, limit: 8}
"""
IMAGE = (
    "{image_size: 8, patch_size: 4, width: 16, depth: 2, num_heads: 2, mlp_dim: 16, patch_dropout: 0.5, dropout: 0.1}"
)
TEXT = "{context_length: 8, width: 16, depth: 1, num_heads: 2, mlp_dim: 16}"


class Waits(TorchDispatchMode):
    """Fails on what a GPU's host would wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name == "index" else []
        assert name not in WAITING and not masks, f"{func} waits for the device"
        return func(*args, **kwargs or {})


@contextmanager
def no_waiting(first: bool):
    with ExitStack() as stack:
        if has_gpu():
            if first:  # constants are made, kernels chosen: that may take its time
                yield
                return
            torch.cuda.set_sync_debug_mode("error")
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
        else:
            stack.enter_context(Waits())
        yield


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """Returns a function that trains, and how often a step and a row that waits for nothing were met."""
    met = []

    def watch(cls, name):
        original = getattr(cls, name)

        def inside(self, *args):
            met.append(name)
            with no_waiting(first=met.count(name) == 1):
                return original(self, *args)

        monkeypatch.setattr(cls, name, inside)

    watch(Trainer, "_one_step")
    watch(LateFigures, "put")
    # A CPU looks at features that are not finite, to say which; on a GPU that is left to the loss.
    monkeypatch.setattr(checks, "_non_finite", lambda tensors: None)
    monkeypatch.setattr(first_look, "first_look", lambda *args, **how: None)
    monkeypatch.setattr(report, "write_report", lambda *args, **how: None)

    def train(cls, call, model, *words):
        file = tmp_path / "tiny.yaml"
        file.write_text(TINY + model)
        words = ["--config", str(file), "--run_folder", str(tmp_path / "run"), *words]
        run.command(cls, call, words, name="t", doc="", default_recipe=str(file), shown="")
        return met

    return train


def pretrained(watched, loss="sigmoid", optimizer="adamw"):
    model = f"model: {{embed_dim: 16, image: {IMAGE}, text: {TEXT}}}\n"
    words = ["--loss", loss, "--optimizer", optimizer, "--data.vocab_size", "300"]
    return watched(PretrainConfig, pretrain, model, *words)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_pretraining_waits_for_nothing(loss, optimizer, watched):
    assert pretrained(watched, loss, optimizer).count("_one_step") == 5


def test_classification_waits_for_nothing(watched):
    # mixup and CutMix draw on the host: to a CPU's eyes its tensors are the device's, so only a GPU has them here.
    words = ["--mixup", "0.4", "--cutmix", "1"] if has_gpu() else []
    model = f"model: {{embed_dim: 16, image: {IMAGE}}}\n"
    met = watched(TrainClassifierConfig, train_classifier, model, "--optimizer", "muon", *words)
    assert met.count("_one_step") == 5 and "put" in met


@pytest.mark.parametrize("look", [lambda t: t.item(), bool, lambda t: t[t > 0], torch.nonzero])
def test_whoever_looks_is_seen(look, watched, monkeypatch):
    from contrastive.train.contrastive_task import ContrastiveTask

    monkeypatch.setattr(ContrastiveTask, "after_update", lambda task, step, skipped: look(task.model.logit_scale))
    with pytest.raises((AssertionError, RuntimeError), match="waits for|synchroniz"):
        pretrained(watched)


def test_batches_reach_the_device_in_order_and_not_ahead():
    runtime, fetched = Runtime("fp32"), []

    def loader():
        for number in range(4):
            fetched.append(number)
            yield {"image": torch.full((2, 3), number, dtype=torch.uint8), "bad": [number]}

    for number, (batch, inputs) in enumerate(runtime.on_device(loader(), lambda batch: {"image": batch["image"]})):
        assert fetched == list(range(number + 1)) and batch["bad"] == [number]
        assert inputs["image"].device.type == runtime.device.type and torch.all(inputs["image"] == number)


class OnOneDevice(TorchDispatchMode):
    """Fails on what takes or gives tensors of two devices: numbers of the host that travel, and are waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {str(t.device) for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}
        assert len(devices) <= 1, f"{func} is on {devices}"
        return out


def test_an_update_copies_nothing_from_the_host():
    """On a GPU that need not be there: torch's fake tensors say where each operation would run."""
    with FakeTensorMode():
        model = nn.Module()
        model.logit_scale = nn.Parameter(torch.ones((), device="cuda"))
        model.transformer = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4, device="cuda")] * 2)})
        optimizers, average = MuonConfig().build(model), ExponentialMovingAverage(model, 0.9)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        assert len(optimizers) == 2
        with OnOneDevice():
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                step_unless(~norm.isfinite(), optimizer)
            average.update(model, step=3, skipped=~norm.isfinite())
