"""timm's NaFlexVit in and out, and in folders of open_clip 4, on pictures from 1:8 to 8:1."""

import json
from dataclasses import replace

import pytest
import timm
import torch
from native_pictures import pictures
from open_clip_folders import clip_config, open_clip_folder, randomise, siglip_config, write_config
from safetensors.torch import load_file
from small_bundles import small_bundle
from timm.models._hub import save_for_hf
from transformers_models import refused

import contrastive
from contrastive.errors import UserError
from contrastive.interop.export import export
from contrastive.interop.formats.timm_architecture import timm_name
from contrastive.interop.formats.timm_folder import naflex_inputs, naflex_pixels
from contrastive.models import ImageModel, ImageTowerConfig

NAME = "naflexvit_base_patch16_siglip"
SHAPE = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2.5, "pos_embed_grid_size": [5, 5]}
PATCHES = 24


def naflexvit(folder, **arguments) -> torch.nn.Module:
    """A random model of timm's, saved by itself, whose images have 24 patches at most."""
    arguments = SHAPE | {"num_classes": 0} | arguments
    model = timm.create_model(NAME, **arguments)
    randomise(model)
    model.pretrained_cfg["input_size"] = (3, 4 * 8, 6 * 8)
    save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
    return model.eval()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"global_pool": "avg", "fc_norm": False, "class_token": True, "act_layer": "gelu", "num_classes": 7},
        {"global_pool": "token", "class_token": True, "pre_norm": True, "init_values": 0.3},
    ],
)
def test_a_ragged_batch_and_one_by_one_are_what_naflexvit_makes_of_them(arguments, tmp_path):
    from timm.data import create_transform, resolve_model_data_config

    model, images = naflexvit(tmp_path / "theirs", **arguments), pictures()
    bundle = contrastive.load(tmp_path / "theirs")
    assert bundle.preprocess.config.patches == PATCHES and bundle.config.image.image_size == 40
    options = {"naflex": True, "patch_size": 8, "max_seq_len": PATCHES, "patchify": True}
    transform = create_transform(**resolve_model_data_config(model), **options)
    made, patches = naflex_pixels([transform(image) for image in images]), bundle.preprocess(images)
    assert torch.equal(made.grids, patches.grids)
    levels = (made.values - patches.values)[patches.mask].abs() * 127.5  # Pillow's resizing, a level here and there
    assert levels.max() < 3 and levels.mean() < 0.05
    with torch.no_grad():
        features = model.forward_features(**naflex_inputs(made))
        expected = torch.nn.functional.normalize(model.forward_head(**features, pre_logits=True), dim=-1)
        alone = torch.cat([bundle.model.encode_image(made[[k]].cut()) for k in range(len(images))])
        ragged = bundle.model.encode_image(made)
    assert (ragged - expected).abs().max() < 1e-5 and (alone - expected).abs().max() < 1e-5
    assert (expected[0] - expected[-1]).abs().max() > 1e-3
    if "init_values" in arguments:  # LayerScale is folded into the layers
        return
    export(bundle, "timm", tmp_path / "back")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert contrastive.load(tmp_path / "back").preprocess.config == bundle.preprocess.config


def test_ours_out_and_in_again(tmp_path):
    bundle = small_bundle("native")
    export(bundle, "timm", tmp_path / "out")
    again = contrastive.load(tmp_path / "out")
    assert again.config.image == bundle.config.image and again.preprocess.config == bundle.preprocess.config
    state = bundle.model.image_tower.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.model.image_tower.state_dict().items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert '"naflex": True, "patch_size": 8, "max_seq_len": 20' in card and "pos_embed_grid_size=[4, 4]" in card


def test_the_name_of_siglip_2(tmp_path):
    assert timm_name(ImageTowerConfig(image_size=256, native=True), (256, 256)) == (NAME, {})


def test_a_folder_of_open_clip_4(tmp_path):
    """Made by version 3, which knows NaFlexVit by timm's config.json alone, and named as version 4 does."""
    config = siglip_config(tmp_path)
    naflexvit(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    theirs = open_clip_folder(tmp_path, config)
    config["vision_cfg"] |= {"timm_model_name": NAME, "timm_model_kwargs": SHAPE, "image_seq_len": PATCHES}
    config["vision_cfg"]["image_size"] = 48
    write_config(tmp_path, config, {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"})
    (tmp_path / "config.json").unlink()
    bundle = contrastive.load(tmp_path)
    made = bundle.preprocess(pictures())
    tokens = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.nn.functional.normalize(theirs.visual.trunk(naflex_inputs(made)), dim=-1)
        assert (bundle.model.encode_image(made) - expected).abs().max() < 1e-5
        assert (bundle.model.encode_text(tokens) - theirs.encode_text(tokens, normalize=True)).abs().max() < 1e-5
    assert bundle.preprocess.config.patches == PATCHES and bundle.preprocess.config.interpolation == "bilinear"
    config["vision_cfg"]["image_seq_len"] = None
    write_config(tmp_path, config)
    assert contrastive.load(tmp_path).preprocess.config.patches == 36  # of 48 pixels
    with pytest.raises(UserError, match="open_clip cannot express model.image.native true.*--to transformers holds it"):
        export(bundle, "open_clip", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"timm_model_kwargs": {"checkpoint_path": "x.pt"}}, "timm_model_kwargs has 'checkpoint_path'"),
        ({"timm_model_kwargs": {"depth": 10**9}}, "depth"),
        ({"timm_model_kwargs": {"dept": 2}}, "timm cannot build its model.*dept"),
        ({"timm_model_kwargs": {"use_naflex": True}}, "no resampling of positions by pos_embed_interp_mode='bicubic'"),
        ({"timm_model_kwargs": [1]}, r"vision_cfg.timm_model_kwargs is \[1\]; it has to be an object with options"),
        ({"image_seq_len": 0}, "vision_cfg.image_seq_len is 0; it has to be above 0"),
        ({"image_seq_len": 196}, "image_seq_len 196 is for image towers that take any shape"),
    ],
)
def test_open_clip_4s_options_of_timm_are_read_or_refused(options, words, tmp_path):
    vision = {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "none"}
    write_config(tmp_path, clip_config() | {"embed_dim": 768, "vision_cfg": vision | options})
    refused(tmp_path, words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pos_embed_interp_mode": "bicubic"}, "no resampling of positions by pos_embed_interp_mode='bicubic'"),
        ({"pos_embed": "factorized"}, r"no positions of another kind \(pos_embed='factorized'\)"),
        ({"pos_embed_ar_preserving": True}, "no resampling of positions with pos_embed_ar_preserving"),
        ({"pos_embed_grid_size": [5, 4]}, r"no oblong grid of positions \(40×32 pixels\)"),
        ({"reg_tokens": 2}, "no register tokens"),
        ({"patch_size": 0}, "no patches of 0 pixels"),
        ({"embed_proj_type": "conv"}, "no patch embedding by a convolution"),
        ({"attn_pool_num_heads": 2}, "no pooling of other heads"),
        ({"global_pool": "avg"}, r"no norm behind the pooling \(fc_norm\)"),
        ({"rope_type": "axial"}, "no block 'EvaBlock'"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_what_ours_has_not_is_named(arguments, words, tmp_path):
    naflexvit(tmp_path, **arguments)
    refused(tmp_path, words)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((3, None, 8), "input_size is .*three whole numbers"),
        ((3, 4, 8), "config.json: preprocess patches 0: an image has 1 to"),
    ],
)
def test_a_size_that_is_none(size, words, tmp_path):
    naflexvit(tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    description["pretrained_cfg"]["input_size"] = size
    (tmp_path / "config.json").write_text(json.dumps(description))
    refused(tmp_path, words)


def test_what_naflexvit_has_not_is_named(tmp_path):
    bundle = small_bundle("native")
    image = replace(bundle.config.image, norm_eps=1e-5)
    config = replace(small_bundle("image").config, image=image)
    other = replace(bundle, model=ImageModel(config), config=config, tokenizer=None)
    with pytest.raises(UserError, match="norm_eps 1e-05 .timm's ViTs have 1e-06"):
        export(other, "timm", tmp_path / "out")
    square = replace(bundle, preprocess=small_bundle("siglip").preprocess)
    with pytest.raises(UserError, match="timm cannot express preprocess resize 'squash' with model.image.native true"):
        export(square, "timm", tmp_path / "out")
