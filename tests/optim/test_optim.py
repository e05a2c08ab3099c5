import math

import pytest
import torch

from contrastive import products
from contrastive.errors import UserError
from contrastive.models import (
    ClassifierConfig,
    DualEncoder,
    ImageClassifier,
    ImageTowerConfig,
    ModelConfig,
    TextTowerConfig,
)
from contrastive.optim import (
    AdamWConfig,
    ExponentialMovingAverage,
    Muon,
    MuonConfig,
    ScheduleConfig,
    layer_factors,
    orthogonalise,
    set_learning_rates,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DualEncoder(
        ModelConfig(
            embed_dim=16,
            image=ImageTowerConfig(image_size=16, patch_size=8, width=16, depth=2, num_heads=2, mlp_dim=32),
            text=TextTowerConfig(vocab_size=20, context_length=6, width=16, depth=1, num_heads=2, mlp_dim=32),
            init_logit_bias=-3.0,
        )
    )


def names(model, parameters):
    by_id = {id(p): name for name, p in model.named_parameters()}
    return {by_id[id(p)] for p in parameters}


@pytest.mark.parametrize("config", [AdamWConfig(logit_lr_factor=3.0), MuonConfig(logit_lr_factor=3.0)])
def test_every_parameter_is_in_one_group_and_scalars_do_not_decay(model, config):
    groups = [group for optimizer in config.build(model) for group in optimizer.param_groups]
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len({id(p) for p in listed}) == len(list(model.parameters()))
    for group in groups:
        if group["weight_decay"]:
            assert all(p.ndim >= 2 for p in group["params"])
        if "logit_scale" in names(model, group["params"]):
            assert names(model, group["params"]) == {"logit_scale", "logit_bias"}
            assert group["weight_decay"] == 0 and group["peak_lr"] == pytest.approx(3 * config.lr)
    for p in listed:
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in listed]
    set_learning_rates(config.build(model), 1.0)
    for optimizer in config.build(model):
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, listed, strict=True))


def test_muon_takes_only_hidden_matrices(model):
    muon, adamw = MuonConfig().build(model)
    hidden = names(model, [p for group in muon.param_groups for p in group["params"]])
    assert hidden and all(".blocks." in name and name.endswith("weight") for name in hidden)
    rest = names(model, [p for group in adamw.param_groups for p in group["params"]])
    assert {"text_tower.token_embedding.weight", "image_tower.patch_embed.weight"} <= rest


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 12), (2, 12, 4)])
def test_orthogonalise_brings_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalise(matrices)
    assert result.shape == matrices.shape
    assert torch.all((torch.linalg.svdvals(result) > 0.5) & (torch.linalg.svdvals(result) < 1.3))
    # The singular vectors stay: U and V still bring it to diagonal form.
    diagonal = u.mT @ result @ v.mT
    assert (diagonal - torch.diag_embed(diagonal.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 12), (2, 12, 4)])
def test_orthogonalise_gives_the_same_by_either_library(shape, monkeypatch):
    matrices, found = torch.randn(shape), []
    for by_onednn in (True, False):
        monkeypatch.setattr(products, "ONEDNN", by_onednn)
        found.append(orthogonalise(matrices))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_muon_agrees_with_torch():
    torch.manual_seed(0)
    ours = [torch.randn(8, 8), torch.randn(8, 8), torch.randn(16, 8)]
    theirs = [p.clone() for p in ours]
    a = Muon(ours, lr=0.02, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        # torch orthogonalises in bfloat16: 3 parts in 100 of an update of 0.02 · sqrt(2), three times over
        torch.testing.assert_close(p, q, rtol=0, atol=3 * 0.02 * math.sqrt(2) * 0.03)


def test_schedule():
    schedule = ScheduleConfig(warmup_steps=10)
    factors = [schedule.factor(step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == factors[10] == 1.0
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False)) and factors[100] == pytest.approx(0)
    assert schedule.factor(55, 100) == pytest.approx(0.5)
    assert ScheduleConfig(10, "linear", 0.1).factor(55, 100) == pytest.approx(0.55)
    assert ScheduleConfig(10, "constant").factor(99, 100) == 1.0
    # Stable, then down in the last fifth, or in as many steps as are given; rsqrt is at a half after 4 warm-ups.
    wsd, rsqrt = ScheduleConfig(10, "wsd", 0.1), ScheduleConfig(10, "rsqrt", cooldown_steps=10)
    assert [wsd.factor(step, 100) for step in (10, 80, 90)] == [1.0, 1.0, pytest.approx(0.55)]
    found = [rsqrt.factor(step, 100) for step in (5, 10, 40, 90, 95)]
    assert found == pytest.approx([0.6, 1.0, 0.5, 1 / 3, math.sqrt(10 / 95) / 2])
    # A run that is made longer keeps its warm-up, where the rest does not depend on the length either.
    assert (
        ScheduleConfig(decay="rsqrt").resolved(2000).warmup_steps == 100 == ScheduleConfig(100).resolved(9).warmup_steps
    )
    with pytest.raises(UserError, match="warmup_steps 90 and cooldown_steps 20 are more than the 100 of the run"):
        ScheduleConfig(90, "wsd").resolved(100)
    # By default 3 %, at least 100 steps, at most a tenth of the run.
    for total, warmup in ((100_000, 3000), (2000, 100), (500, 50)):
        assert ScheduleConfig().factor(warmup - 1, total) == 1.0 > ScheduleConfig().factor(warmup - 2, total)


def test_average_follows_the_weights_and_swaps(model):
    ema = ExponentialMovingAverage(model, 0.9)
    start = model.logit_bias.item()
    with torch.no_grad():
        model.logit_bias.fill_(1.0)
    ema.update(model, step=1000, skipped=torch.tensor(False))
    expected = 0.9 * start + 0.1
    assert ema.average["logit_bias"].item() == pytest.approx(expected)
    ema.swap(model)
    assert model.logit_bias.item() == pytest.approx(expected) and ema.average["logit_bias"].item() == 1.0
    ema.swap(model)
    assert model.logit_bias.item() == 1.0
    ema.update(model, step=0, skipped=torch.tensor(False))  # early averages forget the random start quickly
    assert ema.average["logit_bias"].item() == pytest.approx(0.1 * expected + 0.9)


@pytest.fixture
def classifier():
    image = ImageTowerConfig(
        image_size=16, patch_size=8, width=16, depth=3, num_heads=2, mlp_dim=32, pool="class", class_token=True
    )
    return ImageClassifier(ClassifierConfig(image, num_classes=4))


def test_rates_fall_towards_the_input(classifier):
    factors = layer_factors(classifier, 0.5)
    assert factors["head.weight"] == factors["image_tower.norm.weight"] == 1
    blocks = [factors[f"image_tower.transformer.blocks.{i}.mlp.fc1.weight"] for i in range(3)]
    assert blocks == [0.125, 0.25, 0.5]
    names = ("patch_embed.weight", "class_token", "position_embedding")
    assert all(factors[f"image_tower.{name}"] == 0.0625 for name in names)
    assert set(layer_factors(classifier, 1.0).values()) == {1.0}


@pytest.mark.parametrize("config", [AdamWConfig(layer_decay=0.5), MuonConfig(layer_decay=0.5)])
def test_every_parameter_has_the_rate_of_its_layer(classifier, config):
    names = {parameter: name for name, parameter in classifier.named_parameters()}
    factors, seen = layer_factors(classifier, 0.5), {}
    for optimizer in config.build(classifier):
        peak = config.muon_lr if type(optimizer) is not torch.optim.AdamW else config.lr
        for group in optimizer.param_groups:
            seen |= {names[p]: group["peak_lr"] / peak for p in group["params"]}
    assert seen == pytest.approx(factors)


def test_muon_without_hidden_matrices_to_train(classifier):
    classifier.image_tower.requires_grad_(False)
    (optimizer,) = MuonConfig().build(classifier)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
