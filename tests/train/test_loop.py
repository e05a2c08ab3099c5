"""The loop: steps that move nothing because they are not finite, and samples that could not be used."""

import math
from dataclasses import replace

import pytest
import torch

from contrastive.data.record import KEYS_KEPT
from contrastive.distributed.runtime import Runtime
from contrastive.losses import SoftmaxLossConfig
from contrastive.models import ImageTowerConfig, ModelConfig, TextTowerConfig
from contrastive.optim import AdamWConfig, MuonConfig, OptimizerConfig
from contrastive.train.bad_samples import BadSamples, merged
from contrastive.train.contrastive_task import ContrastiveTask, PretrainConfig
from contrastive.train.loop import Trainer
from contrastive.train.options import TrainConfig


def trainer_of(folder, optimizer: OptimizerConfig, **train):
    image = ImageTowerConfig(image_size=16, patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=32)
    text = TextTowerConfig(vocab_size=20, context_length=6, width=16, depth=1, num_heads=2, mlp_dim=32)
    model = ModelConfig(embed_dim=16, image=image, text=text)
    config = PretrainConfig(train=TrainConfig(**train), loss=SoftmaxLossConfig(), model=model, optimizer=optimizer)
    task = ContrastiveTask(config, None, None, [])
    return Trainer(task, order=None, runtime=Runtime("fp32"), folder=folder, checkpoint=None)


@pytest.fixture
def trainer(tmp_path):
    return trainer_of(tmp_path, AdamWConfig())


def step(trainer, loss=1.0, grad_norm=1.0, gradient=1.0):
    model = trainer.task.model
    for p in model.parameters():
        p.grad = torch.full_like(p, gradient)
    trainer._update(torch.tensor(loss), torch.tensor(grad_norm))
    assert all(p.grad is None for p in model.parameters())


def state(trainer):
    """All tensors that a step may change."""
    tensors = [*trainer.model.parameters(), *trainer.ema.average.values()]
    return tensors + [t for o in trainer.optimizers for found in o.state.values() for t in found.values()]


@pytest.mark.parametrize("optimizer", [AdamWConfig(lr=0.1), MuonConfig(lr=0.1), AdamWConfig()])
@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (math.nan, math.nan)])
def test_a_skipped_step_never_happened(optimizer, loss, norm, tmp_path):
    """Weights, moments, counts of steps and averages are those of a run without it, whatever the gradients were."""
    with_it, without = (trainer_of(tmp_path, optimizer, ema_decay=0.5) for _ in range(2))
    for trainer in (with_it, without):
        if optimizer == AdamWConfig():  # one that cannot be told to leave a step out on the device
            trainer.optimizers = [torch.optim.AdamW(trainer.model.parameters(), foreach=False)]
        for gradient in (1.0, math.nan, -0.5, math.inf, 0.1):
            if math.isfinite(gradient):
                step(trainer, gradient=gradient)
            elif trainer is with_it:
                step(trainer, loss, norm, gradient)
    assert all(torch.equal(a, b) for a, b in zip(state(with_it), state(without), strict=True))
    assert all(tensor.isfinite().all() for tensor in state(with_it))


def test_clamps_the_factor_where_the_loss_says_so(trainer):
    model = trainer.task.model
    with torch.no_grad():
        model.logit_scale.fill_(10.0)
    step(trainer)
    assert model.logit_scale.exp().item() == pytest.approx(100.0)
    trainer.task.config = replace(trainer.config, loss=SoftmaxLossConfig(max_logit_scale=None))
    with torch.no_grad():
        model.logit_scale.fill_(10.0)
    step(trainer)
    assert model.logit_scale.exp().item() > 1000


def test_the_share_is_of_the_window_or_of_what_a_large_batch_makes_of_it():
    few = BadSamples(0.01, 10_000, 100)
    assert not any(few.too_many(10) for _ in range(10)), "100 of a window of 10,000 are allowed"
    assert few.too_many(1)
    large = BadSamples(0.01, 10_000, 32_768)
    assert not large.too_many(110) and not large.too_many(327) and large.too_many(400)


def test_old_ones_are_forgotten():
    bad = BadSamples(0.01, 1000, 100)
    assert not bad.too_many(10)
    assert not any(bad.too_many(0) for _ in range(9))
    assert not bad.too_many(10), "the first ten are more than 1,000 samples ago"


def test_rows_of_old_and_new_runs_are_read_together():
    bad = BadSamples(0.01, 1000, 100)
    bad.note([("unreadable_image", f"key{i}") for i in range(30)])
    taken = bad.take()
    assert taken["counts"] == {"unreadable_image": 30} and len(taken["keys"]["unreadable_image"]) == KEYS_KEPT
    assert bad.take() == {"counts": {}, "keys": {}}
    old = {"kind": "bad_samples", "step": 3, "unreadable_image": 2}
    both = merged([old, {"kind": "bad_samples", "step": 5, **taken}])
    assert both["counts"] == {"unreadable_image": 32} and both["keys"]["unreadable_image"][0] == "key0"
