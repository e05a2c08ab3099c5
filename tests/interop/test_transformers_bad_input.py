"""Folders of transformers whose files hold what no model has: one line each, that names the file and the key."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers_models import edit_json, refused

import contrastive


@pytest.mark.parametrize(
    ("name", "key", "values"),
    [
        ("SiglipModel", "hidden_size", ["32", 32.0, True, None, [32]]),
        ("SiglipModel", "num_attention_heads", ["4", None, 4.0, 0]),
        ("SiglipModel", "num_hidden_layers", ["2", 2.0, 0, -1]),
        ("SiglipModel", "intermediate_size", ["64", None]),
        ("SiglipModel", "layer_norm_eps", ["1e-6", None, -1e-6, float("nan")]),
        ("SiglipModel", "hidden_act", [["gelu"], None, 3]),
        ("SiglipModel", "patch_size", [0, "8", None, 8.0]),
        ("SiglipModel", "image_size", [0, "32", None, {"height": 32, "width": 32}, [], True]),
        ("SiglipModel", "num_channels", ["3", 3.0]),
        ("CLIPModel", "is_causal", [True]),
    ],
)
def test_an_option_of_the_image_tower_of_another_type(copied, name, key, values):
    file = copied(name) / "config.json"
    section = json.loads(file.read_text())["vision_config"]
    for value in values:
        edit_json(file, vision_config=section | {key: value})
        refused(file.parent, f"config.json: vision_config.{key} ")


@pytest.mark.parametrize(
    ("name", "key", "values"),
    [
        ("SiglipModel", "vocab_size", ["60", None, 0]),
        ("SiglipModel", "max_position_embeddings", ["10", None, 10.5]),
        ("SiglipModel", "projection_size", ["32", 0]),
        ("CLIPModel", "eos_token_id", ["41", 41.0, True, None]),
    ],
)
def test_an_option_of_the_text_tower_of_another_type(copied, name, key, values):
    file = copied(name) / "config.json"
    section = json.loads(file.read_text())["text_config"]
    for value in values:
        edit_json(file, text_config=section | {key: value})
        refused(file.parent, f"config.json: text_config.{key} ")


@pytest.mark.parametrize(
    ("name", "key", "values"),
    [
        ("SiglipModel", "architectures", [5, "CLIPModel", [["x"]], [None]]),
        ("SiglipModel", "model_type", [5, ["clip"], {"a": 1}]),
        ("SiglipModel", "text_config", ["x", 5, [1]]),
        ("SiglipModel", "vision_config", ["x", 5, [1]]),
        ("CLIPModel", "text_config_dict", ["x", 5]),
        ("CLIPModel", "projection_dim", ["24", 24.0, 0]),
        ("CLIPVisionModelWithProjection", "projection_dim", ["24", 0]),
        ("Siglip2VisionModel", "num_patches", ["16", 16.0, 0]),
        ("SiglipModel", "quantization_config", [{"quant_method": "bitsandbytes", "load_in_8bit": True}]),
    ],
)
def test_a_value_of_another_type_at_the_top(copied, name, key, values):
    file = copied(name) / "config.json"
    for value in values:
        edit_json(file, **{key: value})
        refused(file.parent, f"config.json.* {key}")


def test_null_at_the_top(copied):
    file = copied("CLIPModel") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"projection_dim": None}))
    refused(file.parent, "projection_dim is None")


def test_a_config_nested_beyond_all_measure(copied):
    folder = copied("SiglipModel")
    (folder / "config.json").write_text("[" * 100_000)
    refused(folder, "config.json is nested too deeply")


@pytest.mark.parametrize(
    "key",
    [
        "vision_model.encoder.layers.0.mlp.fc1.weight",
        "vision_model.head.attention.in_proj_weight",
        "logit_scale",
    ],
)
def test_weights_that_are_no_numbers_of_a_model(copied, key):
    folder = copied("SiglipModel")
    file = folder / "model.safetensors"
    weights = load_file(file)
    for kind in (torch.int8, torch.bool, torch.complex64, torch.int64):
        save_file(weights | {key: weights[key].to(kind)}, file)
        refused(folder, f"model.safetensors: '{key}' is {str(kind)[6:]}, not of floating point numbers")
    save_file(weights | {"vision_model.embeddings.position_ids": torch.arange(16)[None]}, file)
    contrastive.load(folder)
    weights[key].view(-1)[-1] = torch.nan
    save_file(weights, file)
    name = ".*" if "in_proj" in key else key
    refused(folder, f"model.safetensors: '{name}' holds NaN or infinity")


def test_an_index_of_other_files(copied, tmp_path):
    folder = copied("SiglipModel")
    tensors, index = load_file(folder / "model.safetensors"), folder / "model.safetensors.index.json"
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    first, second = sorted(tensors)[:20], sorted(tensors)[20:]
    save_file({key: tensors[key] for key in first}, folder / "1.safetensors")
    save_file({key: tensors[key] for key in second}, folder / "2.safetensors")
    whole = dict.fromkeys(first, "1.safetensors") | dict.fromkeys(second, "2.safetensors")

    def check(file_of, words):
        index.write_text(json.dumps({"weight_map": file_of}))
        refused(folder, words)

    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        check(dict.fromkeys(tensors, name), f"index.json names '{name}': weights have to lie beside it")
    check(whole | {first[0]: "2.safetensors"}, f"1.safetensors holds '{first[0]}', which is not in it by")
    check(whole | {"more": "1.safetensors"}, "1.safetensors has no 'more', which is in it by model.safetensors.index")
    for damaged in ({}, [], dict.fromkeys(tensors, 5), dict.fromkeys(tensors, "1.bin")):
        check(damaged, "index.json is damaged")
    save_file({key: tensors[key] for key in [first[0], *second]}, folder / "2.safetensors")  # one of them twice
    check(whole, f"2.safetensors holds '{first[0]}', which is not in it by")


def test_runs_inside_a_model_folder_do_not_hide_it(copied):
    folder = copied("SiglipModel")
    expected = contrastive.load(folder).config
    (folder / "checkpoints").mkdir()
    (folder / "final").mkdir()
    (folder / "final" / "config.json").write_text("{}")
    assert contrastive.load(folder).config == expected
    (folder / "config.json").unlink()
    refused(folder, "final is not a whole model folder")
