"""Models of transformers in our towers: the same numbers, and one clear line for what cannot be read."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers_models import EOS, LENGTH, SHAPES, VOCABULARY, edit_json, patches, refused, save_theirs, some_input

import contrastive
from contrastive.errors import UserError
from contrastive.interop.formats import transformers_config as ours
from contrastive.interop.loading import read

WHOLE = ("SiglipModel", "Siglip2Model", "CLIPModel")
VISION = ("SiglipVisionModel", "Siglip2VisionModel", "CLIPVisionModel", "CLIPVisionModelWithProjection")
TEXT = ("SiglipTextModel", "Siglip2TextModel", "CLIPTextModel", "CLIPTextModelWithProjection")


def embeddings(model, name, pixels, tokens):
    """What the library computes, before normalisation: (image, text)."""
    image_input, found = {"pixel_values": pixels}, [None, None]
    if name.startswith("Siglip2") and name not in TEXT:
        image_input = patches(pixels, getattr(model.config, "vision_config", model.config).patch_size)
    with torch.no_grad():
        if name in WHOLE:
            found[0] = model.get_image_features(**image_input).pooler_output
            found[1] = model.get_text_features(input_ids=tokens).pooler_output
        elif name in VISION:
            out = model(**image_input)
            found[0] = out.image_embeds if "Projection" in name else out.pooler_output
        else:
            out = model(input_ids=tokens)
            found[1] = out.text_embeds if "Projection" in name else out.pooler_output
    return found


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*WHOLE, *VISION, *TEXT])
@pytest.mark.parametrize(("image_size", "patch_size", "width"), SHAPES)
def test_every_class_gives_the_same_embeddings(name, image_size, patch_size, width, tmp_path):
    theirs = save_theirs(tmp_path, name, image_size, patch_size, width)
    bundle = contrastive.load(tmp_path)
    pixels, tokens = some_input(image_size)
    image, text = embeddings(theirs, name, pixels, tokens)
    with torch.no_grad():
        if image is not None:
            same(bundle.model.encode_image(pixels, normalize=False), image)
        if text is not None:
            same(bundle.model.encode_text(tokens, normalize=False), text)
    assert (bundle.preprocess is None) == (image is None) and (bundle.tokenizer is None) == (text is None)
    assert not bundle.model.training


@pytest.mark.parametrize("name", ["SiglipModel", "CLIPModel"])
def test_logits_and_last_hidden_state(name, tmp_path):
    theirs = save_theirs(tmp_path, name)
    bundle = contrastive.load(tmp_path)
    pixels, tokens = some_input(32)
    with torch.no_grad():
        image, text, scale, bias = bundle.model(pixels, tokens)
        logits = scale * image @ text.T + (0 if bias is None else bias)
        same(logits, theirs(pixel_values=pixels, input_ids=tokens).logits_per_image)
        hidden = theirs.vision_model(pixel_values=pixels).last_hidden_state
        if name == "CLIPModel":  # theirs is not normalised
            hidden = theirs.vision_model.post_layernorm(hidden)
        same(bundle.model.image_tower.forward_features(pixels), hidden)


@pytest.mark.parametrize("name", ["SiglipVisionModel", "CLIPVisionModel", "SiglipTextModel", "CLIPTextModel"])
def test_a_tower_alone_with_the_prefix_of_older_versions(name, tmp_path):
    save_theirs(tmp_path, name)
    expected = contrastive.load(tmp_path).model.state_dict()
    weights = load_file(tmp_path / "model.safetensors")
    prefix = "vision_model." if "Vision" in name else "text_model."
    old = {prefix + key: tensor for key, tensor in weights.items()}
    old[f"{prefix}embeddings.position_ids"] = torch.arange(4)[None]
    save_file(old, tmp_path / "model.safetensors")
    edit_json(tmp_path / "config.json", architectures=None)
    found = contrastive.load(tmp_path).model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(dtype, tmp_path):
    save_theirs(tmp_path, "SiglipModel").to(dtype).save_pretrained(tmp_path)
    model = contrastive.load(tmp_path).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    stored = load_file(tmp_path / "model.safetensors")["vision_model.post_layernorm.weight"]
    assert stored.dtype == dtype and torch.equal(model.image_tower.norm.weight, stored.float())


@pytest.mark.parametrize("family", ["siglip", "siglip2", "clip"])
def test_defaults_are_the_librarys(family):
    import transformers

    whole = getattr(transformers, f"{ours.STEMS[family]}Config")()
    for section in ("Vision", "Text"):
        config = getattr(whole, f"{section.lower()}_config")
        found = ours.library_defaults(family, section)
        assert {"hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act", "layer_norm_eps"} <= found.keys()
        for option, value in found.items():
            expected = getattr(config, option)
            assert expected == (config.hidden_size if option == "projection_size" else value), option
    assert ours.library_defaults(family, "").get("projection_dim") == getattr(whole, "projection_dim", None)


@pytest.mark.parametrize(
    "content",
    [
        {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}, "text_config": {}},
        {"model_type": "siglip"},
        {"architectures": ["SiglipModel"], "model_type": "siglip", "text_config": {"vocab_size": 256_000}},
        {"model_type": "siglip2", "vision_config": {"num_patches": 196}},
        {"model_type": "clip", "projection_dim": 768, "vision_config_dict": {"hidden_size": 1536, "patch_size": 14}},
        {
            "model_type": "clip",
            "text_config": {"hidden_size": 512, "eos_token_id": 2},
            "text_config_dict": {"hidden_size": 768, "num_attention_heads": 12},
        },
        {"model_type": "clip_vision_model", "hidden_size": 1536, "image_size": [336, 336]},
        {"model_type": "siglip_text_model", "projection_size": 1024},
    ],
)
def test_a_file_of_deltas_is_read_as_the_library_reads_it(content, tmp_path):
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps(content))
    theirs = AutoConfig.from_pretrained(tmp_path)
    found = ours.read_description(tmp_path)
    for part, section in (("image", "vision_config"), ("text", "text_config")):
        if part not in found.towers:
            continue
        expected = getattr(theirs, section, theirs)
        options = found.towers[part]
        for name in options.keys() & expected.to_dict().keys() - {"dtype", "architectures", "transformers_version"}:
            if name == "projection_size" and options[name] is None:
                continue  # theirs is then the width, which `our_config` takes too
            value = getattr(expected, name)
            assert options[name] == (list(value) if isinstance(value, tuple) else value), name


def test_patches_that_do_not_fill_the_image(tmp_path):
    """so400m/14 at 384: the library drops what is left over at the right and bottom."""
    theirs = save_theirs(tmp_path, "SiglipVisionModel", image_size=32, patch_size=12)
    tower = contrastive.load(tmp_path).model
    pixels, _ = some_input(32)
    with torch.no_grad():
        same(tower.encode_image(pixels[..., :24, :24], normalize=False), theirs(pixel_values=pixels).pooler_output)


def test_a_vision_tower_without_its_head(tmp_path, capsys):
    theirs = save_theirs(tmp_path, "SiglipVisionModel", vision_use_head=False)
    model = contrastive.load(tmp_path).model
    assert "vision_use_head is false" in capsys.readouterr().err
    pixels, _ = some_input(32)
    with torch.no_grad():
        hidden = theirs(pixel_values=pixels).last_hidden_state
        same(model.image_tower.forward_features(pixels), hidden)
        same(model.encode_image(pixels, normalize=False), hidden.mean(1))


def test_clip_with_the_old_eos_pools_at_the_highest_id(tmp_path, capsys):
    theirs = save_theirs(tmp_path, "CLIPModel", eos_token_id=2)
    bundle = contrastive.load(tmp_path)
    assert bundle.config.text.eos_id == VOCABULARY - 1
    told = " ".join(capsys.readouterr().err.split())
    assert "config.json: eos_token_id 2 means the highest id" in told and f"{VOCABULARY - 1}, a guess" in told
    _, tokens = some_input(32)
    tokens[:, 6] = VOCABULARY - 1
    with torch.no_grad():
        expected = theirs.get_text_features(input_ids=tokens).pooler_output
        same(bundle.model.encode_text(tokens, normalize=False), expected)
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": EOS}))  # a padded vocabulary: 41 is the highest used
    assert read(tmp_path, with_tokenizer=False).config.text.eos_id == EOS


def test_positions_of_another_size_differ_a_little_from_theirs(tmp_path):
    """Known and wanted: ours are antialiased, and torch's antialiased bicubic is a softer one (a = -0.5, not -0.75).

    Of random positions, which have no smoothness at all, this is as large as it gets.
    """
    theirs = save_theirs(tmp_path, "SiglipVisionModel", image_size=56)
    tower = contrastive.load(tmp_path).model.image_tower
    differences = {}
    for size in (40, 72, 56):
        pixels, _ = some_input(size)
        with torch.no_grad():
            expected = theirs.embeddings(pixels, interpolate_pos_encoding=True)
            without = theirs.embeddings.patch_embedding(pixels).flatten(2).mT
            found = tower.embed_patches(pixels) - expected
            differences[size] = (found.norm() / (expected - without).norm()).item()
    assert differences[56] == 0 and differences[72] < 0.1 and differences[40] < 0.5, differences


@pytest.mark.parametrize(
    ("name", "section", "values", "words"),
    [
        ("SiglipModel", "vision_config", {"hidden_act": "relu"}, "vision_config.hidden_act 'relu' is not supp.*gelu"),
        ("SiglipModel", "text_config", {"hidden_act": "silu"}, "text_config.hidden_act 'silu'"),
        ("SiglipModel", "vision_config", {"num_channels": 1}, "num_channels is 1"),
        ("SiglipModel", "vision_config", {"image_size": [32, 48]}, r"image_size is \[32, 48\]: only squares"),
        ("SiglipModel", "vision_config", {"vision_use_head": False}, "vision_use_head is false"),
        ("SiglipModel", "text_config", {"projection_size": 48}, "hidden_size 32 and text_config.projection_size 48"),
        ("CLIPModel", "text_config", {"eos_token_id": 49_407}, "text_config.eos_token_id is 49407"),
        ("CLIPModel", "text_config", {"eos_token_id": [3, 4]}, r"eos_token_id is \[3, 4\]"),
        ("SiglipModel", "vision_config", {"num_hidden_layers": 3}, "lacks key 'vision_model.encoder.layers.2"),
        ("SiglipModel", "vision_config", {"num_hidden_layers": 1}, "unknown key 'vision_model.encoder.layers.1"),
        ("CLIPModel", "vision_config", {"patch_size": 16}, r"position_embedding.weight' is \(17, 32\), .*\(5, 32\)"),
        ("SiglipModel", "vision_config", {"image_size": 64}, "vision_model.embeddings.position_embedding.weight"),
    ],
)
def test_options_that_do_not_fit_are_named(copied, name, section, values, words):
    folder = copied(name)
    content = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", **{section: content[section] | values})
    refused(folder, words)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "dinov2", "architectures": None}, "model_type 'dinov2' is not supported.*SiglipModel"),
        ({"architectures": ["SiglipForImageClassification"]}, "SiglipForImageClassification is not supported"),
        ({"architectures": ["CLIPSegModel"], "model_type": "clipseg"}, "CLIPSegModel is not supported"),
    ],
)
def test_another_architecture_is_named(copied, values, words):
    folder = copied("SiglipModel")
    edit_json(folder / "config.json", **values)
    refused(folder, words)


def test_the_class_alone_names_the_architecture(copied):
    folder = copied("SiglipModel")
    expected = contrastive.load(folder).config
    edit_json(folder / "config.json", model_type=None)
    assert contrastive.load(folder).config == expected


def test_a_grid_that_is_no_square(copied):
    folder = copied("Siglip2VisionModel")
    edit_json(folder / "config.json", num_patches=12)
    refused(folder, "num_patches 12 is not a square")


def test_damaged_files(copied):
    folder = copied("SiglipModel")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    lacking = {key: tensor for key, tensor in tensors.items() if key != "logit_bias"}
    for changed, words in (
        (lacking, "lacks key 'logit_bias'"),
        (tensors | {"classifier.weight": torch.zeros(2)}, "unknown key 'classifier.weight'"),
        (tensors | {"vision_model.head.attention.in_proj_weight": torch.zeros(95, 32)}, "in_proj_weight' is .95, 32."),
        (tensors | {"text_model.head.weight": torch.zeros(31, 32)}, r"'text_model.head.weight' is \(31, 32\)"),
    ):
        save_file(changed, weights)
        refused(folder, words)
    weights.write_bytes(b"torn" * 10)
    refused(folder, "cannot read the weights .*model.safetensors")
    weights.rename(folder / "pytorch_model.bin")
    refused(folder, r"pickle \(pytorch_model.bin\)")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "no weights: model.safetensors is missing")
    (folder / "config.json").write_text('{"model_type": "sig')
    refused(folder, "config.json is not JSON")


def test_weights_in_several_files(copied):
    folder = copied("SiglipModel")
    expected = contrastive.load(folder).model.state_dict()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, index = sorted(tensors), folder / "model.safetensors.index.json"
    parts = {"model-1-of-2.safetensors": names[:20], "model-2-of-2.safetensors": names[20:]}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / file)
    index.write_text(json.dumps({"weight_map": {key: file for file, keys in parts.items() for key in keys}}))
    found = contrastive.load(folder).model.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    (folder / "model-2-of-2.safetensors").unlink()
    refused(folder, "lacks model-2-of-2.safetensors, one of 2 files")
    index.write_text('{"weight_map": ')
    refused(folder, "model.safetensors.index.json is damaged")


def test_parts_that_are_absent_say_so_when_they_are_used(copied):
    bundle = contrastive.load(copied("SiglipModel"))
    assert bundle.config.text.context_length == LENGTH
    with pytest.raises(UserError, match="preprocessor_config.json is missing"):
        bundle.preprocess(None)
    with pytest.raises(UserError, match="has no tokenizer .tokenizer.json, spiece.model"):
        bundle.tokenizer(["a"])


def test_reading_imports_no_model_of_transformers(originals):
    """Its configurations alone, for what a file leaves out."""
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from contrastive.interop.loading import read;"
        f"read(Path({str(originals / 'CLIPModel')!r}), with_tokenizer=False);"
        "print('transformers.modeling_utils' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
