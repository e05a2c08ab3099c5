"""Weights and pixels between timm and our image towers, both ways."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from open_clip_folders import SIZES, pictures, randomise
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config
from timm.models._hub import save_for_hf

import contrastive
from contrastive.data.preprocess import Preprocess, PreprocessConfig
from contrastive.data.tokenizer import clip_tokenizer
from contrastive.errors import UserError
from contrastive.interop.bundle import Bundle
from contrastive.interop.formats import timm_folder as writing
from contrastive.interop.parity import Probe
from contrastive.models import (
    ClassifierConfig,
    DualEncoder,
    ImageClassifier,
    ImageModel,
    ImageTowerConfig,
    ModelConfig,
    TextTowerConfig,
)

LIMIT = 1e-5
TINY = {"img_size": 40, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def timm_folder(folder, name="vit_base_patch16_224", pretrained_cfg=None, **arguments):
    """Save a model of timm with random weights as timm itself does."""
    model = timm.create_model(name, **(TINY | arguments))
    randomise(model)
    save_for_hf(model, folder, safe_serialization=True, model_config={"pretrained_cfg": pretrained_cfg or {}})
    return model.eval()


def pixels_for(model):
    return torch.randn(3, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


def difference(ours, theirs, pixels) -> float:
    """Of the scores of a classifier, else of the features."""
    with torch.no_grad():
        got = ours.scores(pixels) if isinstance(ours, ImageClassifier) else ours.encode_image(pixels, normalize=False)
        want = theirs(pixels)
    return ((got - want).abs().max() / want.abs().max()).item()


def same_bits(one, other) -> bool:
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def written(bundle, folder):
    folder.mkdir()
    return writing.write(bundle, folder, folder)


FAMILIES = {
    "siglip": ("vit_base_patch16_siglip_224", {"act_layer": "gelu_tanh", "num_classes": 0}),
    "siglip-gap": ("vit_base_patch16_siglip_gap_224", {"num_classes": 0}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", {"num_classes": 20}),
    "classifier": ("vit_base_patch16_224", {"num_classes": 7}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}-{size[1]}")
def test_theirs_to_ours_and_back(family, size, tmp_path):
    image, patch, width, heads = size
    name, arguments = FAMILIES[family]
    shape = {"img_size": image, "patch_size": patch, "embed_dim": width, "num_heads": heads, "mlp_ratio": 2.7}
    theirs = timm_folder(tmp_path / "a", name, **shape, **arguments)
    if family == "clip":  # how timm keeps a projection
        torch.nn.init.zeros_(theirs.head.bias)
        save_file(theirs.state_dict(), tmp_path / "a" / "model.safetensors")
    bundle = contrastive.load(tmp_path / "a")
    pixels = pixels_for(theirs)
    assert difference(bundle.model, theirs, pixels) <= LIMIT
    assert isinstance(bundle.model, ImageClassifier if family == "classifier" else ImageModel)
    assert (bundle.config.image.projection, bundle.tokenizer) == (family == "clip", None)
    written(bundle, tmp_path / "b")
    back = timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True).eval()
    assert same_bits(back, theirs)
    again = contrastive.load(tmp_path / "b")
    assert same_bits(again.model, bundle.model) and again.config == bundle.config
    assert again.preprocess.config == bundle.preprocess.config


OPTIONS = {
    "layer scale, no biases, no position of the class token": {
        "init_values": 0.3,
        "qkv_bias": False,
        "proj_bias": False,
        "no_embed_class": True,
    },
    "mean behind the norm": {"global_pool": "avg", "fc_norm": False, "act_layer": "quick_gelu"},
    "class token in attention pooling": {"global_pool": "map", "pool_include_prefix": True, "fc_norm": False},
    "oblong": {"img_size": (40, 24)},
    "any size": {"dynamic_img_size": True},
}


@pytest.mark.parametrize("arguments", OPTIONS.values(), ids=OPTIONS)
def test_options(arguments, tmp_path):
    squash = {"crop_mode": "squash", "crop_pct": 1.0}
    theirs = timm_folder(tmp_path / "a", num_classes=0, pretrained_cfg=squash, **arguments)
    bundle = contrastive.load(tmp_path / "a")
    pixels = pixels_for(theirs)
    assert difference(bundle.model, theirs, pixels) <= LIMIT
    written(bundle, tmp_path / "b")
    back = timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True).eval()
    assert difference(bundle.model, back, pixels) <= LIMIT
    assert same_bits(contrastive.load(tmp_path / "b").model, bundle.model)


def test_tokens_are_timms(tmp_path):
    theirs = timm_folder(tmp_path, "vit_base_patch16_siglip_224", num_classes=0)
    pixels = pixels_for(theirs)
    with torch.no_grad():
        tokens = contrastive.load(tmp_path).model.image_tower.forward_features(pixels)
        assert (tokens - theirs.forward_features(pixels)).abs().max() <= 1e-4


def test_no_pooling_takes_the_class_token(tmp_path, capsys):
    theirs = timm_folder(tmp_path, num_classes=0, global_pool="")
    model = contrastive.load(tmp_path).model
    assert "no pooling" in capsys.readouterr().err
    pixels = pixels_for(theirs)
    with torch.no_grad():
        assert (model.encode_image(pixels, normalize=False) - theirs(pixels)[:, 0]).abs().max() <= 1e-4


@pytest.mark.parametrize("larger", [56, (48, 32)])
def test_resized_by_timm(larger, tmp_path):
    model = timm.create_model("vit_base_patch16_siglip_224", num_classes=0, **TINY)
    randomise(model)
    model.set_input_size(larger)
    save_for_hf(model, tmp_path, safe_serialization=True, data_config={"crop_mode": "squash", "crop_pct": 1.0})
    bundle = contrastive.load(tmp_path)
    assert difference(bundle.model, model.eval(), pixels_for(model)) <= LIMIT
    assert bundle.preprocess.config.size == bundle.model.image_tower.input_size == tuple(model.patch_embed.img_size)


def classifier_bundle(**options):
    shape = {"image_size": 42, "patch_size": 14, "width": 24, "depth": 2, "num_heads": 3, "mlp_dim": 50}
    image = ImageTowerConfig(**shape, **options)
    config = ClassifierConfig(image, num_classes=3)
    model = ImageClassifier(config).eval()
    preprocess = Preprocess(PreprocessConfig(42, resize="crop", short_side=48, interpolation="bilinear"))
    return Bundle(model, preprocess, None, model.config, Path("here"), ("cat", "dog", "owl"))


@pytest.mark.parametrize("trained", [True, False])
def test_our_classifier(trained, tmp_path):
    """An untrained head, all zeros, is still a classifier's."""
    bundle = classifier_bundle(class_token=True, pool="class")
    if trained:
        randomise(bundle.model)
    written(bundle, tmp_path / "out")
    pixels = torch.randn(2, 3, 42, 42)
    theirs = writing.outputs(tmp_path / "out", Probe(pictures(2), [], pixels, None))
    with torch.no_grad():
        assert (theirs.logits - bundle.model.scores(pixels)).abs().max() <= LIMIT
        assert (theirs.image - bundle.model.encode_image(pixels)).abs().max() <= LIMIT
    again = contrastive.load(tmp_path / "out")
    assert same_bits(again.model, bundle.model) and again.config == bundle.config
    assert again.class_names == bundle.class_names and again.preprocess.config == bundle.preprocess.config
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    arguments = made["model_args"] | {"num_classes": made["num_classes"]}
    weights = tmp_path / "out" / "model.safetensors"
    model = timm.create_model(made["architecture"], checkpoint_path=weights, **arguments).eval()
    assert difference(bundle.model, model, pixels) <= LIMIT or not trained


@pytest.mark.parametrize("projection", [True, False])
def test_the_image_tower_of_a_dual_encoder(projection, tmp_path):
    shape = {"image_size": 40, "patch_size": 8, "width": 24, "depth": 2, "num_heads": 3, "mlp_dim": 50}
    image = ImageTowerConfig(**shape, projection=projection)
    text = TextTowerConfig(vocab_size=49408, context_length=8, width=16, depth=1, num_heads=2, mlp_dim=16)
    config = ModelConfig(20 if projection else 24, image, text)
    model = DualEncoder(config).eval()
    randomise(model)
    bundle = Bundle(model, Preprocess(PreprocessConfig(40)), clip_tokenizer(8), config, Path("here"))
    notes = written(bundle, tmp_path / "out")
    assert any("image tower alone" in note for note in notes)
    photographs = pictures(3)
    pixels = torch.stack([bundle.preprocess(image) for image in photographs])
    theirs = writing.outputs(tmp_path / "out", Probe(photographs, [], pixels, torch.zeros(1, 8, dtype=torch.long)))
    with torch.no_grad():
        assert (theirs.image - model.encode_image(pixels)).abs().max() <= LIMIT
    assert (theirs.text, theirs.logits, theirs.tokens) == (None, None, None)
    assert (theirs.pixels - pixels).abs().max() <= 4 / 255 / 0.5
    again = contrastive.load(tmp_path / "out")
    assert same_bits(again.model.image_tower, model.image_tower)


PREPROCESS = {
    "crop_pct": {"crop_pct": 0.9},
    "bilinear": {"crop_pct": 1.0, "interpolation": "bilinear"},
    "squash": {"crop_pct": 1.0, "crop_mode": "squash"},
    "squash and crop": {"crop_pct": 0.9, "crop_mode": "squash"},
    "defaults": {},
}


@pytest.mark.parametrize("options", PREPROCESS.values(), ids=PREPROCESS)
@pytest.mark.parametrize("size", [56, 112])
def test_pixels_of_photographs(options, size, shared_data, tmp_path):
    with tarfile.open(shared_data / "flickr8k" / "dev-000000.tar") as shard:
        members = [member for member in shard if member.name.endswith(".jpg")][:16]
        photographs = [Image.open(shard.extractfile(member)).convert("RGB") for member in members]
    timm_folder(tmp_path / "a", num_classes=0, img_size=size, pretrained_cfg=options)
    saved = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True)
    transform = create_transform(**resolve_model_data_config(saved), is_training=False)
    bundle = contrastive.load(tmp_path / "a")
    ours = torch.stack([bundle.preprocess(image) for image in photographs])
    pixels = torch.stack([transform(image) for image in photographs])
    levels = (ours - pixels).abs().max() * 255 * min(bundle.preprocess.config.std)
    assert round(levels.item()) <= 4  # as in test_open_clip_inputs.py
    with torch.no_grad():
        one, other = (bundle.model.encode_image(images) for images in (ours, pixels))
    assert (one * other).sum(dim=1).min() >= 0.9999
    written(bundle, tmp_path / "b")
    again = timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True)
    assert str(create_transform(**resolve_model_data_config(again), is_training=False)) == str(transform)


def refused(folder, match):
    with pytest.raises(UserError, match=match) as caught:
        contrastive.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("vit_base_patch16_224", {"reg_tokens": 2, "qk_norm": True}, "no register tokens .reg_tokens=2., no norm of q"),
        ("vit_base_patch16_224", {"global_pool": "avg"}, r"no norm behind the pooling \(fc_norm\); timm itself can"),
        # Its class token is normed like ours, its other tokens are not.
        ("vit_base_patch16_224", {"fc_norm": True}, r"no norm behind the pooling \(fc_norm\)"),
        ("vit_base_patch16_224", {"act_layer": "relu"}, "no activation 'ReLU'"),
        ("vit_base_patch16_224", {"in_chans": 1}, "no 1 input channels"),
        ("vit_base_patch16_224", {"global_pool": "map"}, "no such treatment of the class token"),
        ("vit_base_patch16_224", {"final_norm": False}, "no model without a final norm"),
        ("deit_tiny_distilled_patch16_224", {}, "no 'VisionTransformerDistilled'"),
        ("vit_giant_patch14_dinov2", {"init_values": 0.1}, "no mlp 'GluMlp'"),
        ("eva02_tiny_patch14_224", {}, "no 'Eva'"),
    ],
)
def test_models_that_are_not_ours(name, arguments, match, tmp_path):
    timm_folder(tmp_path, name, **arguments)
    refused(tmp_path, match)


def test_weights_that_do_not_fit(tmp_path):
    timm_folder(tmp_path, num_classes=4)
    file = tmp_path / "model.safetensors"
    good = {name: tensor.clone() for name, tensor in load_file(file).items()}  # the file under it is written anew
    for change, match in (
        ({"head.bias": None}, "lacks key 'head.bias'"),
        ({"blocks.1.attn.qkv.weight": None}, "lacks key 'blocks.1.attn.qkv.weight' and 2 more"),
        ({"extra": torch.zeros(1)}, "unknown key 'extra'"),
        ({"pos_embed": torch.zeros(1, 17, 24)}, r"'pos_embed' is \(17, 24\), its config asks for \(26, 24\)"),
    ):
        save_file({name: tensor for name, tensor in (good | change).items() if tensor is not None}, file)
        refused(tmp_path, match)
    save_file(good, file)
    file.write_bytes(file.read_bytes()[:-10])
    refused(tmp_path, "cannot read the weights")
    file.rename(tmp_path / "pytorch_model.bin")
    refused(tmp_path, "weights in a pickle .pytorch_model.bin.")


def test_configs_that_are_damaged(tmp_path):
    timm_folder(tmp_path, num_classes=4)
    config = tmp_path / "config.json"
    description = json.loads(config.read_text())
    for change, match in (
        ({"architecture": "vit_bse_patch16_224"}, "timm cannot build its model: Unknown model"),
        ({"model_args": {"depths": 2}}, "timm cannot build its model: .*depths"),
        ({"label_names": ["a", "b"]}, "2 label_names for 4 classes"),
    ):
        config.write_text(json.dumps(description | change))
        refused(tmp_path, match)
    config.write_text(config.read_text()[:100])
    refused(tmp_path, "config.json is not JSON")
    config.unlink()
    refused(tmp_path, 'write a config.json beside model.safetensors, {"architecture"')
    refused(tmp_path / "model.safetensors", "write a config.json beside model.safetensors")
    as_told = {"architecture": "vit_base_patch16_224", "num_classes": 4, "model_args": TINY, "pretrained_cfg": {}}
    config.write_text(json.dumps(as_told))
    assert isinstance(contrastive.load(tmp_path).model, ImageClassifier)


def test_preprocessing_that_is_not_ours(tmp_path):
    timm_folder(tmp_path, pretrained_cfg={"crop_mode": "border"})
    with pytest.raises(UserError, match="crop_mode 'border' which our preprocessing has not"):
        contrastive.load(tmp_path).preprocess(None)


def test_all_that_cannot_be_expressed_is_named(tmp_path):
    bundle = classifier_bundle(norm_eps=1e-4, pre_norm=True)
    model = ImageClassifier(replace(bundle.config, unit_features=True))
    preprocess = Preprocess(replace(bundle.preprocess.config, cut="corner"))
    with pytest.raises(UserError) as caught:
        writing.write(replace(bundle, model=model, preprocess=preprocess), tmp_path, tmp_path)
    for part in ("norm_eps 0.0001", "patch_bias true", "unit_features true", "cut 'corner'", "--to onnx"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
