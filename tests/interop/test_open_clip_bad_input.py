"""Folders of open_clip with something wrong: one line that names the file or key and what to do."""

import json
import re

import pytest
import torch
from open_clip_folders import (
    SIGLIP_TEXT,
    TEXT,
    VISION,
    clip_config,
    largest_difference,
    open_clip_folder,
    siglip_config,
    write_config,
)
from safetensors.torch import load_file, save_file

import contrastive
from contrastive.errors import UserError
from contrastive.interop.bundle import Absent

FILE = "open_clip_model.safetensors"


def refused(folder, match):
    with pytest.raises(UserError, match=match) as caught:
        contrastive.load(folder)
    assert "\n" not in str(caught.value)


def altered(folder, change):
    """A good folder whose weights `change` has been at."""
    open_clip_folder(folder, clip_config())
    weights = load_file(folder / FILE)
    change(weights)
    save_file(weights, folder / FILE)
    return folder


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: w.pop("visual.ln_post.bias"), "lacks key 'visual.ln_post.bias'; nothing was loaded"),
        (lambda w: w.pop("transformer.resblocks.1.attn.in_proj_weight"), "resblocks.1.attn.in_proj_weight' and 2 more"),
        (lambda w: w.update({"visual.extra": torch.zeros(1)}), "unknown key 'visual.extra'"),
        (lambda w: w.update({"logit_bias": torch.zeros(())}), "unknown key 'logit_bias'"),
        (lambda w: w.update({"visual.proj": torch.zeros(24, 20)}), r"'visual.proj' is \(20, 24\), its config asks for"),
        (
            lambda w: w.update({"positional_embedding": torch.zeros(13, 40)}),
            r"'positional_embedding' is \(13, 40\), its config asks for \(12, 40\)",
        ),
        (
            lambda w: w.update({"visual.transformer.resblocks.0.attn.in_proj_bias": torch.zeros(70)}),
            r"in_proj_bias' is \(70,\), which cannot hold 3 equal parts",
        ),
    ],
)
def test_weights_that_do_not_fit(change, match, tmp_path):
    refused(altered(tmp_path, change), match)


def test_layer_scale_that_is_missing(tmp_path):
    config = clip_config(vision_cfg=VISION | {"ls_init_value": 0.1})
    altered(tmp_path, lambda weights: None)
    write_config(tmp_path, config)
    refused(tmp_path, "key 'visual.transformer.resblocks.0.ls_1.gamma' is missing")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"vision_cfg": VISION | {"layer": 2}}, "unknown option vision_cfg.layer. Did you mean 'layers'"),
        ({"text_cfg": TEXT | {"width": "40"}}, "text_cfg.width is '40'; it has to be like 512"),
        ({"quick_glu": True}, "unknown option model_cfg.quick_glu. Did you mean 'quick_gelu'"),
        ({"vision_cfg": [1]}, "vision_cfg has to be an object"),
        ({"vision_cfg": VISION | {"layers": [1, 1, 1, 1]}}, "a ResNet"),
        ({"vision_cfg": VISION | {"head_width": 12, "width": 25}}, "model.image.width 25 is not a multiple"),
        ({"vision_cfg": VISION | {"attentional_pool": True}, "multimodal_cfg": {}}, "attentional_pool"),
        ({"multimodal_cfg": {"width": 8}}, "multimodal_cfg .CoCa"),
        ({"vision_cfg": VISION | {"final_ln_after_pool": True, "pool_type": "avg"}}, "final_ln_after_pool"),
        ({"vision_cfg": VISION | {"act_kwargs": {"approximate": "tanh"}}}, "act_kwargs .* with quick_gelu is no activ"),
        ({"vision_cfg": VISION | {"norm_kwargs": {"bias": False}}}, "norm_kwargs"),
        (
            {"vision_cfg": VISION | {"qk_norm": True}, "text_cfg": TEXT | {"embed_cls": True, "pool_type": "first"}},
            "no vision_cfg.qk_norm, no text_cfg.embed_cls .CoCa's., no text_cfg.pool_type 'first'; open_clip",
        ),
        ({"text_cfg": TEXT | {"hf_model_name": "roberta-base"}}, "hf_model_name 'roberta-base'"),
        ({"text_cfg": TEXT | {"pool_type": "eos", "eos_id": 60}}, "eos_id 60 is outside the vocabulary of 50"),
        ({"vision_cfg": {"timm_model_name": "convnext_tiny", "image_size": 40}}, "our ViT has no 'ConvNeXt'"),
        ({"vision_cfg": {"timm_model_name": "vit_base_patch16_22"}}, "timm cannot build its model: Unknown model"),
        ({"vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_proj": "mlp"}}, "timm_proj 'mlp'"),
        ({"vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "map"}}, "timm_pool 'map'"),
        ({"vision_cfg": {"timm_model_name": "hf-hub:a/b"}}, "timm's config.json is not in"),
        ({"embed_dim": None}, "model_cfg.embed_dim is None; it has to be like 512"),
        ({"init_logit_scale": "x"}, "model_cfg.init_logit_scale is 'x'; it has to be like 2.66"),
        ({"vision_cfg": VISION | {"width": None}}, "vision_cfg.width is None; it has to be like 768"),
        ({"vision_cfg": VISION | {"patch_size": None}}, "vision_cfg.patch_size is None"),
        ({"vision_cfg": VISION | {"patch_size": 0}}, "vision_cfg.patch_size is 0; it has to be above 0"),
        ({"vision_cfg": VISION | {"head_width": 0}}, "vision_cfg.head_width is 0; it has to be above 0"),
        ({"vision_cfg": VISION | {"head_width": 48}}, "vision_cfg.head_width is 48"),
        ({"vision_cfg": VISION | {"act_kwargs": "x"}}, "vision_cfg.act_kwargs is 'x'; it has to be an object"),
        ({"vision_cfg": {"timm_model_name": 5}}, "vision_cfg.timm_model_name is 5; it has to be like"),
        ({"text_cfg": TEXT | {"heads": None}}, "text_cfg.heads is None; it has to be like 8"),
        ({"text_cfg": TEXT | {"mlp_ratio": None}}, "text_cfg.mlp_ratio is None; it has to be like 4.0"),
        ({"text_cfg": TEXT | {"tokenizer_kwargs": "x"}}, "text_cfg.tokenizer_kwargs is 'x'; it has to be an object"),
    ],
)
def test_options_that_are_not_ours(options, match, tmp_path):
    write_config(tmp_path, clip_config(**options))
    refused(tmp_path, match)


def test_damaged_files(tmp_path):
    open_clip_folder(tmp_path, clip_config())
    config = tmp_path / "open_clip_config.json"
    text = config.read_text()
    for content, match in (
        (text[:60], "open_clip_config.json is not JSON"),
        ("[]", "does not hold a JSON object"),
        ("{}", "has no model_cfg"),
    ):
        config.write_text(content)
        refused(tmp_path, match)
    config.write_text(text)
    weights = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(weights[:-100])
    refused(tmp_path, f"cannot read the weights .*{FILE}")
    (tmp_path / FILE).rename(tmp_path / "open_clip_pytorch_model.bin")
    refused(tmp_path, r"weights in a pickle \(open_clip_pytorch_model.bin\)")
    (tmp_path / "open_clip_pytorch_model.bin").unlink()
    refused(tmp_path, "has no weights")


def test_a_torn_config_of_timm(tmp_path):
    open_clip_folder(tmp_path, siglip_config(tmp_path))
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text()[:80])
    refused(tmp_path, "config.json is not JSON")


def test_positions_of_another_size(tmp_path):
    open_clip_folder(tmp_path, siglip_config(tmp_path))
    description = json.loads((tmp_path / "open_clip_config.json").read_text())
    description["model_cfg"]["vision_cfg"]["image_size"] = 48
    (tmp_path / "open_clip_config.json").write_text(json.dumps(description))
    refused(tmp_path, r"'visual.trunk.pos_embed' is \(25, 24\), its config asks for \(36, 24\)")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (SIGLIP_TEXT, "lacks the files of its tokenizer 'organisation/tokenizer'"),
        (TEXT, "knows 50 ids, but its config names no hf_tokenizer_name, so its tokenizer is CLIP's of 49,408 ids"),
        (SIGLIP_TEXT | {"tokenizer_kwargs": {"strip_sep_token": True}}, "tokenizer_kwargs.strip_sep_token"),
        (SIGLIP_TEXT | {"tokenizer_mode": "clips"}, "tokenizer_mode 'clips'"),
        (TEXT | {"tokenizer_kwargs": {"clean": "whitespace"}}, "tokenizer_kwargs.clean 'whitespace'"),
    ],
)
def test_a_tokenizer_that_is_not_there(text, match, tmp_path):
    open_clip_folder(tmp_path, clip_config(text_cfg=text, quick_gelu=False))
    bundle = contrastive.load(tmp_path)
    assert isinstance(bundle.tokenizer, Absent)
    with pytest.raises(UserError, match=match):
        bundle.tokenizer(["a cat"])


def test_preprocessing_that_is_not_ours(tmp_path):
    open_clip_folder(tmp_path, clip_config(), {"resize_mode": "longest"})
    bundle = contrastive.load(tmp_path)
    with pytest.raises(UserError, match="resize_mode 'longest', which our preprocessing has not"):
        bundle.preprocess(None)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (5, "preprocess_cfg is 5; it has to be an object"),
        ({"mean": "x"}, "preprocess_cfg.mean is 'x'; it has to be three numbers"),
        ({"std": [0.5, 0.5]}, "preprocess_cfg.std is .*; it has to be three numbers"),
        ({"interpolation": "nearest"}, "preprocess_cfg.interpolation is 'nearest'; use one of bicubic"),
        ({"resize_mode": 5}, "preprocess_cfg.resize_mode is 5"),
    ],
)
def test_preprocessing_of_another_kind(options, match, tmp_path):
    open_clip_folder(tmp_path, clip_config())
    write_config(tmp_path, clip_config(), options)
    refused(tmp_path, f"open_clip_config.json: {match}")


def test_ids_that_nothing_reads(tmp_path):
    """Pooling at the last position needs neither of them."""
    text = SIGLIP_TEXT | {"eos_id": 70, "pad_id": 60}
    theirs = open_clip_folder(tmp_path, clip_config(text_cfg=text, quick_gelu=False))
    bundle = contrastive.load(tmp_path)
    assert (bundle.config.text.eos_id, bundle.config.text.pad_id) == (None, None)
    assert largest_difference(bundle.model, theirs) <= 1e-5


def test_a_tower_of_timm_that_is_named_elsewhere(tmp_path, capsys):
    """A moved folder's own config.json is taken; where the place named has another one, that is told."""
    open_clip_folder(tmp_path / "here", siglip_config(tmp_path / "here"))
    config = tmp_path / "here" / "open_clip_config.json"
    config.write_text(config.read_text().replace(f"{tmp_path / 'here'}", f"{tmp_path / 'there'}"))
    contrastive.load(tmp_path / "here")
    assert capsys.readouterr().err == ""
    siglip_config(tmp_path / "there")
    contrastive.load(tmp_path / "here")
    assert capsys.readouterr().err == ""
    siglip_config(tmp_path / "there", patch=10)
    contrastive.load(tmp_path / "here")
    told = capsys.readouterr().err
    assert f"{tmp_path / 'there' / 'config.json'}, another one" in told and "here/config.json is used" in told


NEWER_TEXT = {"text_arch": "clip", "variable_text": False, "tokenizer_type": "", "bos_id": 49_406, "norm_type": None}
NEWER_TEXT |= {
    "attention_bias": None,
    "reg_tokens": 0,
    "norm_placement": "pre",
    "hf_model_config": {},
    "use_pad_mask": False,
}
NEWER_TEXT |= {"attention_mode": "causal", "norm_eps": 1e-6, "rope_temperature": 10_000.0, "eos_id": None}


def test_options_of_open_clip_4_that_change_nothing(tmp_path):
    config = clip_config()
    theirs = open_clip_folder(tmp_path, config)
    config["vision_cfg"] = config["vision_cfg"] | {"image_seq_len": None, "timm_model_kwargs": {}}
    write_config(tmp_path, config | {"text_cfg": config["text_cfg"] | NEWER_TEXT, "audio_cfg": None})
    assert largest_difference(contrastive.load(tmp_path).model, theirs) < 1e-5


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("text_cfg", "text_arch", "modern"),
        ("text_cfg", "variable_text", True),
        ("text_cfg", "tokenizer_type", "tiktoken"),
        ("text_cfg", "use_pad_mask", True),
        ("text_cfg", "act_layer", "relu"),
        ("text_cfg", "reg_tokens", 4),
        ("text_cfg", "mlp_bias", False),
        ("text_cfg", "pos_embed_type", "sinusoidal"),
        ("vision_cfg", "image_seq_len", 49),
        ("vision_cfg", "timm_model_kwargs", {"use_naflex": True}),
    ],
)
def test_options_of_open_clip_4_that_change_something(section, name, value, tmp_path):
    config = clip_config()
    write_config(tmp_path, config | {section: config[section] | {name: value}})
    refused(tmp_path, f"our towers have no {section}.{name} {re.escape(repr(value))}; open_clip itself can load it")


def test_a_typo_is_no_option_of_open_clip_4(tmp_path):
    write_config(tmp_path, clip_config() | {"text_cfg": TEXT | {"contextlength": None}})
    refused(tmp_path, "unknown option text_cfg.contextlength. Did you mean 'context_length'")
