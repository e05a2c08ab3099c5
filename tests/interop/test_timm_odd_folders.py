"""Folders of timm that say something odd of their head, their labels or their images."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_bundles import small_bundle
from test_timm_round_trips import difference, pixels_for, timm_folder

import contrastive
from contrastive.data.preprocess import Preprocess
from contrastive.errors import UserError
from contrastive.interop.export import export
from contrastive.models import ImageClassifier, ImageModel


def described(folder, **changes):
    """Change the top level of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def without_bias(folder):
    """Set the bias of the head to zero."""
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"head.bias": torch.zeros_like(weights["head.bias"])}, folder / "model.safetensors")
    return folder


def refused(folder, match):
    with pytest.raises(UserError, match=match) as caught:
        contrastive.load(folder)
    assert "\n" not in str(caught.value)


def test_a_projection_with_a_bias_is_refused(tmp_path):
    """Ours has none: dropping it would change every embedding."""
    timm_folder(tmp_path, num_classes=5)
    described(tmp_path, contrastive_head="projection")
    refused(tmp_path, "'head.bias' is not zero, and our projection has no bias")
    assert isinstance(contrastive.load(without_bias(tmp_path)).model, ImageModel)


@pytest.mark.parametrize("kind", ["none", "zzz", 5, None, ["projection"]])
def test_a_head_of_no_kind(kind, tmp_path):
    timm_folder(tmp_path, num_classes=5)
    refused(described(tmp_path, contrastive_head=kind), "config.json: contrastive_head .* with num_classes 5")


def test_a_head_of_a_model_without_one(tmp_path):
    timm_folder(tmp_path, num_classes=0)
    refused(described(tmp_path, contrastive_head="classifier"), "contrastive_head 'classifier' with num_classes 0")


def test_a_classifier_whose_bias_is_zero_is_told_of(tmp_path, capsys):
    """It could be a projection; only those of CLIP are known to be."""
    theirs = timm_folder(tmp_path / "vit", num_classes=5)
    torch.nn.init.zeros_(theirs.head.bias)
    assert isinstance(contrastive.load(without_bias(tmp_path / "vit")).model, ImageModel)
    assert "5 rows are taken for a projection" in capsys.readouterr().err
    bundle = contrastive.load(described(tmp_path / "vit", contrastive_head="classifier"))
    assert isinstance(bundle.model, ImageClassifier) and capsys.readouterr().err == ""
    assert difference(bundle.model, theirs, pixels_for(theirs)) <= 1e-5
    timm_folder(tmp_path / "clip", "vit_base_patch16_clip_224", num_classes=5)
    assert isinstance(contrastive.load(without_bias(tmp_path / "clip")).model, ImageModel)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("names", [5, "abcde", [1, 2, 3, 4, 5], {"0": 1}])
def test_label_names_that_are_no_names(names, tmp_path):
    timm_folder(tmp_path, num_classes=5)
    refused(described(tmp_path, label_names=names), "config.json: label_names .* has to be a list of texts")


def test_a_model_without_blocks(tmp_path):
    timm_folder(tmp_path, num_classes=0)
    size = {"img_size": 40, "patch_size": 8, "embed_dim": 24, "num_heads": 3}
    refused(described(tmp_path, model_args=size | {"depth": 0}), "no depth of 0")
    refused(described(tmp_path, model_args=size | {"depth": 10**9}), "depth is 1000000000")


@pytest.mark.parametrize("changes", [{"crop_mode": ["center"]}, {"crop_pct": 1e-308}])
def test_a_transform_of_other_kinds(changes, tmp_path):
    timm_folder(tmp_path, num_classes=0, pretrained_cfg=changes)
    with pytest.raises(UserError):
        contrastive.load(tmp_path).preprocess.config.at(8)


def test_images_that_timm_pads(tmp_path):
    """It adds patches where ours leaves a rest out."""
    padded = {"dynamic_img_size": True, "dynamic_img_pad": True}
    timm_folder(tmp_path / "a", num_classes=0, **padded | {"img_size": 30})
    refused(tmp_path / "a", r"dynamic_img_pad, 30×30 pixels")
    theirs = timm_folder(tmp_path / "b", num_classes=0, **padded | {"img_size": 32})
    assert difference(contrastive.load(tmp_path / "b").model, theirs, pixels_for(theirs)) <= 1e-5


def test_a_frame_around_the_image(tmp_path):
    """The towers load; the preprocessing alone is lacking."""
    timm_folder(tmp_path, num_classes=0, pretrained_cfg={"crop_pct": 1.1})
    with pytest.raises(UserError, match=r"pretrained_cfg in .*config.json asks for crop_pct 1.1"):
        contrastive.load(tmp_path).preprocess(None)


@pytest.mark.parametrize("option", [{"crop_pct": "x"}, {"crop_pct": -1}, {"mean": ["a"] * 3}, {"std": ["a"] * 3}])
def test_preprocessing_of_another_kind(option, tmp_path):
    timm_folder(tmp_path, num_classes=0, pretrained_cfg=option)
    refused(tmp_path, f"config.json: pretrained_cfg.{next(iter(option))} is .*; it has to be")


@pytest.mark.parametrize("to", ["timm", "open_clip"])
def test_a_corner_of_a_crop_cannot_be_written(to, tmp_path):
    """Both libraries cut the centre."""
    bundle = small_bundle("clip")
    bundle = replace(bundle, preprocess=Preprocess(replace(bundle.preprocess.config, cut="corner")))
    with pytest.raises(UserError, match="cannot express preprocess cut 'corner'"):
        export(bundle, to, tmp_path / "out")
