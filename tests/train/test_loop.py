"""The loop: steps that move nothing because they are not finite, and samples that could not be used."""

from dataclasses import replace

import pytest
import torch

from contrastive.data.record import KEYS_KEPT
from contrastive.distributed.runtime import Runtime
from contrastive.errors import UserError
from contrastive.losses import SoftmaxLossConfig
from contrastive.models import ImageTowerConfig, ModelConfig, TextTowerConfig
from contrastive.optim import AdamWConfig
from contrastive.train.contrastive_task import ContrastiveTask, PretrainConfig
from contrastive.train.loop import BadSamples, Trainer, merged
from contrastive.train.options import TrainConfig


@pytest.fixture
def trainer(tmp_path):
    image = ImageTowerConfig(image_size=16, patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=32)
    text = TextTowerConfig(vocab_size=20, context_length=6, width=16, depth=1, num_heads=2, mlp_dim=32)
    model = ModelConfig(embed_dim=16, image=image, text=text)
    train = TrainConfig(steps=10, max_skipped=3)
    config = PretrainConfig(train=train, loss=SoftmaxLossConfig(), model=model, optimizer=AdamWConfig())
    task = ContrastiveTask(config, None, None, [])
    return Trainer(task, order=None, runtime=Runtime("fp32"), folder=tmp_path, checkpoint=None)


def step(trainer, loss, grad_norm=1.0):
    model = trainer.task.model
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    trainer._update(loss, grad_norm)
    assert all(p.grad is None for p in model.parameters())
    return any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(("loss", "grad_norm"), [(float("nan"), 1.0), (1.0, float("inf")), (1.0, float("nan"))])
def test_skips_then_stops(trainer, loss, grad_norm, capsys):
    assert step(trainer, 1.0)
    assert not step(trainer, loss, grad_norm) and not step(trainer, loss, grad_norm)
    assert "step 1 skipped" in capsys.readouterr().err
    assert step(trainer, 1.0)  # a good step forgives the bad ones before
    assert not step(trainer, loss, grad_norm) and not step(trainer, loss, grad_norm)
    with pytest.raises(UserError, match="3 steps in a row had no finite loss or gradient"):
        step(trainer, loss, grad_norm)


def test_clamps_the_factor_where_the_loss_says_so(trainer):
    model = trainer.task.model
    with torch.no_grad():
        model.logit_scale.fill_(10.0)
    step(trainer, 1.0)
    assert model.logit_scale.exp().item() == pytest.approx(100.0)
    trainer.task.config = replace(trainer.config, loss=SoftmaxLossConfig(max_logit_scale=None))
    with torch.no_grad():
        model.logit_scale.fill_(10.0)
    step(trainer, 1.0)
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
