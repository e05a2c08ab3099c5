"""examples/siglip_walkthrough.py as it is, and what it says of a tower that is wrong."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers_models import save_theirs

from contrastive.errors import UserError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "siglip_walkthrough.py"


@pytest.fixture(scope="module")
def walkthrough():
    spec = importlib.util.spec_from_file_location("siglip_walkthrough", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_options(walkthrough, capsys):
    walkthrough.main([])
    told = capsys.readouterr().out
    for line in ("embeddings", "layer 0: attention", "layer 3", "post-norm", "pooled head", "last_hidden_state"):
        assert line in told
    assert "2 × 49 × 96" in told


@pytest.mark.parametrize("name", ["SiglipVisionModel", "SiglipModel"])
def test_a_folder(walkthrough, name, tmp_path):
    """Patches of 12 do not fill 32 pixels, as those of so400m/14 do not fill 384."""
    save_theirs(tmp_path, name, image_size=32, patch_size=12)
    found = walkthrough.walk(walkthrough.WalkOptions(tmp_path), lambda table: None)
    assert len(found) == 9 and found[0].ours.shape == (2, 4, 32)


def test_a_tower_with_a_wrong_weight_is_found(walkthrough, monkeypatch):
    right = walkthrough.our_tower

    def wrong(theirs):
        tower = right(theirs)
        with torch.no_grad():
            tower.transformer.blocks[1].mlp.fc1.bias[3] += 0.1
        return tower

    monkeypatch.setattr(walkthrough, "our_tower", wrong)
    with pytest.raises(AssertionError, match="layer 1 differs"):
        walkthrough.walk(walkthrough.WalkOptions(), lambda table: None)


def test_another_model_and_one_that_lacks_weights(walkthrough, tmp_path):
    """The library would fill what is missing with random numbers."""
    save_theirs(tmp_path / "clip", "CLIPModel")
    with pytest.raises(UserError, match="holds a model of type 'clip': --model takes SiglipVisionModel or SiglipModel"):
        walkthrough.main(["--model", str(tmp_path / "clip")])
    save_theirs(tmp_path / "siglip", "SiglipVisionModel")
    file = tmp_path / "siglip" / "model.safetensors"
    weights = load_file(file)
    save_file({name: tensor for name, tensor in weights.items() if "fc1.bias" not in name}, file, {"format": "pt"})
    with pytest.raises(UserError, match="does not hold a whole SiglipVisionModel: '.*fc1.bias' is missing"):
        walkthrough.main(["--model", str(tmp_path / "siglip")])


def test_no_such_folder(walkthrough, tmp_path):
    with pytest.raises(UserError, match="has no config.json"):
        walkthrough.main(["--model", str(tmp_path)])
