import pytest
import torch

from contrastive.models import ClassifierConfig, ImageClassifier, ImageTowerConfig
from contrastive.optim import AdamWConfig, MuonConfig
from contrastive.optim.layer_decay import layer_factors


@pytest.fixture
def model():
    image = ImageTowerConfig(
        image_size=16, patch_size=8, width=16, depth=3, num_heads=2, mlp_dim=32, pool="class", class_token=True
    )
    return ImageClassifier(ClassifierConfig(image, num_classes=4))


def test_rates_fall_towards_the_input(model):
    factors = layer_factors(model, 0.5)
    assert factors["head.weight"] == factors["image_tower.norm.weight"] == 1
    blocks = [factors[f"image_tower.transformer.blocks.{i}.mlp.fc1.weight"] for i in range(3)]
    assert blocks == [0.125, 0.25, 0.5]
    names = ("patch_embed.weight", "class_token", "position_embedding")
    assert all(factors[f"image_tower.{name}"] == 0.0625 for name in names)
    assert set(layer_factors(model, 1.0).values()) == {1.0}


@pytest.mark.parametrize("config", [AdamWConfig(layer_decay=0.5), MuonConfig(layer_decay=0.5)])
def test_every_parameter_has_the_rate_of_its_layer(model, config):
    names = {parameter: name for name, parameter in model.named_parameters()}
    factors, seen = layer_factors(model, 0.5), {}
    for optimizer in config.build(model):
        peak = config.muon_lr if type(optimizer) is not torch.optim.AdamW else config.lr
        for group in optimizer.param_groups:
            seen |= {names[p]: group["peak_lr"] / peak for p in group["params"]}
    assert seen == pytest.approx(factors)


def test_muon_without_hidden_matrices_to_train(model):
    model.image_tower.requires_grad_(False)
    (optimizer,) = MuonConfig().build(model)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
