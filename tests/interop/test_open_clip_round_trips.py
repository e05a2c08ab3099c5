"""Weights between open_clip and our towers, both ways: the same bits and the same embeddings."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip_folders import (
    SIGLIP_PREPROCESS,
    SIZES,
    TEXT,
    VISION,
    clip_config,
    inputs,
    largest_difference,
    open_clip_folder,
    pictures,
    randomise,
    siglip_config,
)
from safetensors.torch import save_file

import contrastive
from contrastive.data.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, PreprocessConfig
from contrastive.data.tokenizer import clip_tokenizer, train_bpe
from contrastive.errors import UserError
from contrastive.interop.bundle import Absent, Bundle
from contrastive.interop.formats import open_clip_folder as writing
from contrastive.interop.formats.timm_architecture import timm_name
from contrastive.interop.parity import Probe
from contrastive.models import (
    DualEncoder,
    ImageModel,
    ImageModelConfig,
    ImageTowerConfig,
    ModelConfig,
    TextTowerConfig,
)

LIMIT = 1e-5
BLOCKS = {"depth": 2, "num_heads": 4, "mlp_dim": 88}
CAPTIONS = ["a red circle", "two dogs run on the beach", "a man and a woman", "the blue square and the red one"] * 20


def same_bits(one, other) -> bool:
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def loaded_by_open_clip(folder):
    return open_clip.create_model_and_transforms(f"local-dir:{folder}")[0].eval()


def written(bundle, folder):
    folder.mkdir()
    return writing.write(bundle, folder, folder)


@pytest.mark.parametrize("family", ["clip", "siglip", "siglip-gap"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}-{size[1]}")
def test_theirs_to_ours_and_back(family, size, tmp_path):
    source, out = tmp_path / "theirs", tmp_path / "back"
    if family == "clip":
        theirs = open_clip_folder(source, clip_config(*size))
    else:
        config = siglip_config(source, *size, pool="map" if family == "siglip" else "avg")
        theirs = open_clip_folder(source, config, SIGLIP_PREPROCESS)
    bundle = contrastive.load(source)
    assert largest_difference(bundle.model, theirs) <= LIMIT
    assert bundle.preprocess.config.resize == ("crop" if family == "clip" else "squash")
    written(bundle, out)
    back = loaded_by_open_clip(out)
    assert same_bits(back, theirs)
    assert largest_difference(bundle.model, back) <= LIMIT
    again = contrastive.load(out)
    assert same_bits(again.model, bundle.model) and again.config == bundle.config


OPTIONS = {
    "layer scale, mean, sin-cos, eos, bias": {
        "custom_text": True,
        "quick_gelu": False,
        "init_logit_bias": -3,
        "init_logit_scale": 2.0,
        "nonscalar_logit_scale": True,
        "vision_cfg": VISION
        | {
            "mlp_ratio": 2.7,
            "no_ln_pre": True,
            "ls_init_value": 0.1,
            "pool_type": "avg",
            "pos_embed_type": "sin_cos_2d",
            "act_kwargs": {"approximate": "tanh"},
            "norm_kwargs": {"eps": 1e-6},
            "patch_dropout": 0.5,
        },
        "text_cfg": TEXT | {"pool_type": "eos", "eos_id": 7, "proj_bias": True, "ls_init_value": 0.2},
    },
    "oblong, norm after the class token, last, no projection": {
        "vision_cfg": VISION | {"image_size": [40, 24], "final_ln_after_pool": True},
        "text_cfg": TEXT | {"pool_type": "last", "proj_type": "none", "width": 16},
    },
    "patches that do not fill the image": {"vision_cfg": VISION | {"image_size": 45}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, tmp_path):
    theirs = open_clip_folder(tmp_path / "a", clip_config(**options), {"resize_mode": "squash"})
    bundle = contrastive.load(tmp_path / "a")
    pixels, tokens = inputs(theirs)
    tokens[:, 8] = 7
    kept = bundle.model.image_tower.input_size
    with torch.no_grad():
        image = bundle.model.encode_image(pixels[..., : kept[0], : kept[1]])
        assert (image - theirs.encode_image(pixels, normalize=True)).abs().max() <= LIMIT
        assert (bundle.model.encode_text(tokens) - theirs.encode_text(tokens, normalize=True)).abs().max() <= LIMIT
    written(bundle, tmp_path / "b")
    assert list(loaded_by_open_clip(tmp_path / "b").visual.image_size) == list(theirs.visual.image_size)
    again = contrastive.load(tmp_path / "b")
    assert same_bits(again.model, bundle.model) and again.config == bundle.config
    assert again.preprocess.config == bundle.preprocess.config


@pytest.mark.parametrize("projection", ["none", "linear", ""])
def test_projection_behind_a_tower_of_timm(projection, tmp_path):
    config = siglip_config(tmp_path / "a")
    config["vision_cfg"]["timm_proj"] = projection
    theirs = open_clip_folder(tmp_path / "a", config | ({} if projection == "none" else {"embed_dim": 20}))
    if projection == "":  # timm's own head, which has a bias
        with pytest.raises(UserError, match="visual.trunk.head.bias' is not zero"):
            contrastive.load(tmp_path / "a")
        return
    bundle = contrastive.load(tmp_path / "a")
    assert largest_difference(bundle.model, theirs) <= LIMIT
    written(bundle, tmp_path / "b")
    assert same_bits(loaded_by_open_clip(tmp_path / "b"), theirs)


def test_names_of_the_other_class(tmp_path):
    """open_clip itself reads CLIP's names for its CustomTextCLIP."""
    theirs = open_clip_folder(tmp_path / "a", clip_config())
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    config = json.loads((tmp_path / "b" / "open_clip_config.json").read_text())
    config["model_cfg"]["custom_text"] = True
    (tmp_path / "b" / "open_clip_config.json").write_text(json.dumps(config))
    assert largest_difference(contrastive.load(tmp_path / "b").model, theirs) <= LIMIT


def bundle_of(image: dict, text: dict, tokenizer, resize="squash", **model):
    text = {"vocab_size": tokenizer.vocab_size, "context_length": tokenizer.context_length, **BLOCKS, **text}
    ids = {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    config = ModelConfig(image=ImageTowerConfig(**image), text=TextTowerConfig(**text, **ids), **model)
    encoder = DualEncoder(config).eval()
    randomise(encoder)
    preprocess = PreprocessConfig(config.image.image_size, resize=resize, mean=CLIP_MEAN, std=CLIP_STD)
    return Bundle(encoder, Preprocess(preprocess), tokenizer, config, Path("here"))


def clip_bundle(image=40, patch=8, width=24, heads=3, **options):
    tower = {"class_token": True, "pool": "class", "pre_norm": True, "patch_bias": False, "projection": True}
    tower |= {"image_size": image, "patch_size": patch, "width": width, "num_heads": heads, "depth": 2, "mlp_dim": 70}
    shared = {"activation": "quick_gelu", "norm_eps": 1e-5}
    text = {"width": 32, "causal": True, "pool": "eos", "projection_bias": False, **shared}
    return bundle_of(tower | shared | options, text, clip_tokenizer(20), "crop", embed_dim=20, init="clip")


def siglip_bundle(image=40, patch=8, width=24, heads=3, text=(), **options):
    tower = {"image_size": image, "patch_size": patch, "width": width, "num_heads": heads, "depth": 2, "mlp_dim": 70}
    tokenizer = train_bpe(CAPTIONS, 300, 16, "canonicalize")
    scales = {"init_logit_scale": 10.0, "init_logit_bias": -10.0}
    return bundle_of(tower | options, {"width": 32, **dict(text)}, tokenizer, embed_dim=width, **scales)


@pytest.mark.parametrize("make", [clip_bundle, siglip_bundle])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}-{size[1]}")
def test_ours_to_theirs_and_back(make, size, tmp_path):
    bundle = make(*size)
    written(bundle, tmp_path / "out")
    photographs = pictures(3)
    texts = [*CAPTIONS[:3], "Don't_do IT: 5 &amp; 7", "x " * 200]
    pixels = torch.stack([bundle.preprocess(image) for image in photographs])
    tokens = bundle.tokenizer(texts)
    theirs = writing.outputs(tmp_path / "out", Probe(photographs, texts, pixels, tokens))
    with torch.no_grad():
        features = bundle.model(pixels, tokens)
    logits = features.logit_scale * features.image @ features.text.T
    logits = logits if features.logit_bias is None else logits + features.logit_bias
    assert (theirs.image - features.image).abs().max() <= LIMIT
    assert (theirs.text - features.text).abs().max() <= LIMIT
    assert (theirs.logits - logits).abs().max() <= LIMIT * features.logit_scale
    assert torch.equal(theirs.tokens, tokens)
    assert (theirs.pixels - pixels).abs().max() <= 4 / 255 / 0.26
    again = contrastive.load(tmp_path / "out")
    assert same_bits(again.model, bundle.model) and again.config == bundle.config
    assert again.preprocess.config == bundle.preprocess.config
    assert torch.equal(again.tokenizer(texts), tokens)


@pytest.mark.parametrize("options", [{"class_token": True}, {"pool": "average"}, {"position": "sincos"}])
def test_towers_between_the_families(options, tmp_path):
    bundle = siglip_bundle(**options)
    written(bundle, tmp_path / "out")
    assert largest_difference(bundle.model, loaded_by_open_clip(tmp_path / "out")) <= LIMIT


@pytest.mark.parametrize("options", [{"activation": "gelu"}, {"projection": False, "width": 20, "num_heads": 5}])
def test_a_tower_as_clips_that_open_clips_own_vit_cannot_be(options, tmp_path):
    """One switch makes both towers' activations quick, and the projection is always there: timm's ViT has neither."""
    bundle = clip_bundle(**options)
    written(bundle, tmp_path / "out")
    theirs = loaded_by_open_clip(tmp_path / "out")
    assert hasattr(theirs.visual, "trunk")
    assert largest_difference(bundle.model, theirs) <= LIMIT
    assert same_bits(contrastive.load(tmp_path / "out").model, bundle.model)


def test_a_name_of_timms_registry_is_used(tmp_path):
    tower = {"class_token": True, "pool": "class", "activation": "gelu", "depth": 12, "num_heads": 3, "mlp_dim": 768}
    bundle = siglip_bundle(224, 16, 192, **(tower | {"heads": 3}))
    written(bundle, tmp_path / "out")
    vision = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["model_cfg"]["vision_cfg"]
    assert vision["timm_model_name"] == "vit_tiny_patch16_224"
    assert not (tmp_path / "out" / "config.json").exists()
    assert largest_difference(bundle.model, loaded_by_open_clip(tmp_path / "out")) <= LIMIT
    assert same_bits(contrastive.load(tmp_path / "out").model, bundle.model)


def test_names_of_the_registry():
    base = ImageTowerConfig(activation="gelu")
    so400m = {"patch_size": 14, "width": 1152, "depth": 27, "num_heads": 16, "mlp_dim": 4304}
    large = ImageTowerConfig(image_size=378, activation="gelu_tanh", **so400m)
    assert timm_name(base, (224, 224)) == ("vit_base_patch16_siglip_224", {})
    assert timm_name(replace(base, pool="average"), (224, 224))[0] == "vit_base_patch16_siglip_gap_224"
    assert timm_name(replace(large, activation="gelu"), (384, 384)) == ("vit_so400m_patch14_siglip_384", {})
    name, arguments = timm_name(base, (240, 240))
    assert arguments["img_size"] == [240, 240]
    # SigLIP was trained with the approximation by tanh; timm's name stands for the exact one.
    assert timm_name(ImageTowerConfig(), (224, 224))[1]["act_layer"] == "gelu_tanh"


def test_a_moved_folder(tmp_path):
    bundle = siglip_bundle()
    notes = written(bundle, tmp_path / "out")
    assert any("After moving the folder" in note for note in notes)
    (tmp_path / "out").rename(tmp_path / "moved")
    assert same_bits(contrastive.load(tmp_path / "moved").model, bundle.model)
    with pytest.raises(FileNotFoundError):
        loaded_by_open_clip(tmp_path / "moved")
    assert writing.retarget(tmp_path / "moved", tmp_path / "moved")
    assert not writing.retarget(tmp_path / "moved", f"local-dir:{tmp_path / 'moved'}")
    assert largest_difference(bundle.model, loaded_by_open_clip(tmp_path / "moved")) <= LIMIT
    assert writing.retarget(tmp_path / "moved", "hf-hub:somebody/model")
    model_cfg = json.loads((tmp_path / "moved" / "open_clip_config.json").read_text())["model_cfg"]
    assert model_cfg["vision_cfg"]["timm_model_name"] == "hf-hub:somebody/model"
    assert model_cfg["text_cfg"]["hf_tokenizer_name"] == "somebody/model"


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("larger", [56, (48, 32)])
def test_resized_by_open_clip(family, larger, tmp_path):
    """The library resamples positions in its own way; what it saves then is read as it is."""
    config = clip_config() if family == "clip" else siglip_config(tmp_path / "a")
    open_clip_folder(tmp_path / "a", config, SIGLIP_PREPROCESS)
    resized = open_clip.create_model(f"local-dir:{tmp_path / 'a'}", force_image_size=larger).eval()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    save_file(resized.state_dict(), tmp_path / "b" / "open_clip_model.safetensors")
    description = json.loads((tmp_path / "a" / "open_clip_config.json").read_text())
    description["model_cfg"]["vision_cfg"]["image_size"] = larger
    (tmp_path / "b" / "open_clip_config.json").write_text(json.dumps(description))
    bundle = contrastive.load(tmp_path / "b")
    assert largest_difference(bundle.model, resized) <= LIMIT
    assert bundle.preprocess.config.size == bundle.model.image_tower.input_size


@pytest.mark.parametrize("make", [clip_bundle, siglip_bundle])
@pytest.mark.parametrize("larger", [56, (48, 32)])
def test_resized_by_us(make, larger, tmp_path):
    bundle = make()
    bundle.model.image_tower.set_input_size(larger)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="the preprocessing makes 40×40 pixels, the image tower has positions for"):
        writing.write(bundle, tmp_path / "none", tmp_path / "none")
    preprocess = replace(bundle.preprocess.config, image_size=larger, resize="squash")
    bundle = replace(bundle, preprocess=Preprocess(preprocess))
    written(bundle, tmp_path / "out")
    theirs = loaded_by_open_clip(tmp_path / "out")
    assert largest_difference(bundle.model, theirs) <= LIMIT
    again = contrastive.load(tmp_path / "out")
    assert same_bits(again.model, bundle.model)
    assert again.preprocess.config == preprocess


def test_all_that_cannot_be_expressed_is_named(tmp_path):
    bundle = siglip_bundle(text={"pool": "average", "attend_padding": False}, norm_eps=1e-4)
    preprocess = replace(bundle.preprocess.config, resize="crop", short_side=44)
    with pytest.raises(UserError) as caught:
        writing.write(replace(bundle, preprocess=Preprocess(preprocess)), tmp_path, tmp_path)
    for part in (
        "model.text.pool 'average'",
        "model.text.attend_padding false",
        "model.image.norm_eps 0.0001",
        "short_side 44",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_without_a_tokenizer(tmp_path):
    bundle = replace(siglip_bundle(), tokenizer=Absent("it has none"))
    notes = written(bundle, tmp_path / "out")
    assert any("without a tokenizer" in note for note in notes)
    pixels, tokens = torch.randn(2, 3, 40, 40), torch.zeros(2, 16, dtype=torch.long)
    assert writing.outputs(tmp_path / "out", Probe(pictures(2), ["a", "b"], pixels, tokens)).tokens is None
    with pytest.raises((OSError, ValueError)):
        open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    with pytest.raises(UserError, match="lacks the files of its tokenizer"):
        contrastive.load(tmp_path / "out").tokenizer(["a"])


def test_a_scale_that_open_clip_clamps_is_mentioned(tmp_path):
    bundle = clip_bundle()
    assert not any("clamps" in note for note in written(bundle, tmp_path / "a"))
    with torch.no_grad():
        bundle.model.logit_scale.fill_(4.72)  # ln 112, as released SO400M weights have it
    assert any("clamps" in note for note in written(bundle, tmp_path / "b"))


def test_one_tower_alone_is_refused(tmp_path):
    config = ImageModelConfig(
        24, ImageTowerConfig(image_size=40, patch_size=8, width=24, depth=1, num_heads=3, mlp_dim=48)
    )
    bundle = Bundle(ImageModel(config), Preprocess(PreprocessConfig(40)), None, config, tmp_path)
    with pytest.raises(UserError, match="an image and a text tower; use --to timm or transformers"):
        writing.write(bundle, tmp_path, tmp_path)
