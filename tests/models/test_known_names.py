"""Names of other libraries build those libraries' architectures, which their own installed files are asked about."""

import json
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

import contrastive
from contrastive.errors import UserError
from contrastive.interop.formats.open_clip_config import image_options, model_options, read_sections
from contrastive.interop.formats.timm_vit import read_trunk
from contrastive.models import classifier_config, model_config, model_table
from contrastive.models.presets import num_parameters

CONFIGS = {path.stem: path for path in (Path(open_clip.__file__).parent / "model_configs").glob("*.json")}
# What is ours to build, of what open_clip ships: each of these names, whatever a later version adds.
OURS = sorted(
    name
    for name in CONFIGS
    if name.startswith("ViT-") and not any(part in name for part in ("CL", "worldwide", "-alt", "naflex", "bow"))
)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(build):
    with torch.device("meta"):
        return build()


@pytest.mark.parametrize("name", OURS)
def test_open_clips_names(name):
    """Every option is what open_clip's own file says, but which form of GELU a SigLIP has."""
    file = CONFIGS[name]
    model, vision, text = read_sections(json.loads(file.read_text()), file)
    if vision["timm_model_name"]:
        _, image, _ = read_trunk(vision, model["embed_dim"], file.parent, file)
    else:
        image, _ = image_options(vision, model["quick_gelu"], file)
    theirs, ours = model_options(model, image, text, file), model_config(name)
    if "SigLIP" in name:
        unread = {"eos_id": None, "pad_id": None, "activation": "gelu_tanh"}
        theirs = replace(
            theirs, image=replace(theirs.image, activation="gelu_tanh"), text=replace(theirs.text, **unread)
        )
        theirs = replace(theirs, init_logit_scale=None, init_logit_bias=None)
        if not ours.text.projection:
            theirs = replace(theirs, text=replace(theirs.text, projection_bias=True))
    assert ours == theirs


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - set(OURS)))
def test_names_of_open_clip_that_are_not_ours(name):
    with pytest.raises(UserError, match=f"'{name}' is not among our models") as caught:
        model_config(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-S-16", "ViT-B-16-SigLIP"])
def test_shapes_are_open_clips(name):
    theirs = on_meta(lambda: open_clip.create_model(name, load_weights=False, device="meta"))
    ours = on_meta(lambda: contrastive.create_model(name))
    # In open_clip a SigLIP's text projection and CLIP's are parameters too; buffers are none.
    assert count(ours) == count(theirs) == num_parameters(ours.config)


@pytest.mark.parametrize(
    ("name", "config", "model"),
    [
        ("openai/clip-vit-base-patch32", CLIPConfig(), CLIPModel),
        ("google/siglip-base-patch16-224", SiglipConfig(), SiglipModel),
    ],
)
def test_transformers_defaults_are_those_names(name, config, model):
    theirs = on_meta(lambda: model(config))
    assert num_parameters(on_meta(lambda: contrastive.create_model(name)).config) == count(theirs)


@pytest.mark.parametrize(
    "name",
    ["vit_base_patch16_siglip_224", "vit_base_patch32_siglip_256.v2_webli", "vit_base_patch16_clip_224.openai"],
)
def test_timms_names(name):
    config = model_config(name)
    theirs = on_meta(lambda: timm.create_model(name.partition(".")[0], num_classes=0))
    ours = on_meta(lambda: contrastive.create_model(name)).image_tower
    projection = config.image.width * config.embed_dim * config.image.projection
    assert count(ours) - projection == count(theirs)
    assert config.text.vocab_size == {"v2_webli": 256_000, "openai": 49_408}.get(name.partition(".")[2], 32_000)


def test_plain_vits_are_classifiers():
    theirs = on_meta(lambda: timm.create_model("vit_small_patch32_384", num_classes=0))
    config = classifier_config("vit_small_patch32_384.augreg_in21k_ft_in1k")
    ours = on_meta(lambda: contrastive.models.ImageTower(config.image, config.image.width))
    assert count(ours) == count(theirs)
    assert classifier_config("google/vit-base-patch16-224") == classifier_config("base")


@pytest.mark.parametrize(
    ("name", "same_as"),
    [
        ("vit-b-16", "ViT-B-16"),
        ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "ViT-H-14"),
        ("timm/ViT-B-16-SigLIP2-256", "ViT-B-16-SigLIP2-256"),
        ("google/siglip2-giant-opt-patch16-256", "ViT-gopt-16-SigLIP2-256"),
        ("google/siglip-so400m-patch14-384", "ViT-SO400M-14-SigLIP-384"),
        ("google/siglip-base-patch16-256-i18n", "ViT-B-16-SigLIP-i18n-256"),
        ("openai/clip-vit-large-patch14-336", "ViT-L-14-336-quickgelu"),
        ("openai/clip-vit-base-patch16", "clip_vit_b_16"),
        ("vit_gigantic_patch14_clip_224", "ViT-bigG-14"),
        ("vit_base_patch16_plus_clip_240", "ViT-B-16-plus-240"),
    ],
)
def test_one_model_under_two_names(name, same_as):
    assert model_config(name) == model_config(same_as)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("ViT-G-14", "is ViT-bigG-14 here, as in open_clip; ViT-g-14 is a smaller one"),
        ("ViT-L/14@336px", "ViT-L-14-336 has GELU .open_clip's., ViT-L-14-336-quickgelu OpenAI's"),
        ("ViT-B16", "unknown model 'ViT-B16'. Did you mean 'ViT-B-16'"),
        ("ViT-B-17", "Did you mean 'ViT-B-16'"),
        (
            "google/siglip-base",
            "Did you mean 'google/siglip-base-patch16-224'.*load.'hf-hub:google/siglip-base'",
        ),
        (
            "hf-hub:timm/ViT-B-16-SigLIP",
            "no architecture. .*load.'hf-hub:timm/ViT-B-16-SigLIP'.*--init hf-hub",
        ),
        ("./runs/mine", "no architecture. .*contrastive.load.'./runs/mine'"),
        ("google/siglip2-base-patch16-naflex", "takes images of any shape"),
        ("ViT-B-16-SigLIP-250", "250 pixels are no whole number of patches of 16"),
        ("clip_vit_gopt_16", "no CLIP has a text tower"),
        ("", "unknown model ''"),
    ],
)
def test_names_that_say_no_architecture(name, line):
    with pytest.raises(UserError, match=line) as caught:
        model_config(name)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_architecture_whatever_it_is_called(tmp_path, monkeypatch):
    (tmp_path / "runs" / "my-roberta").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="contrastive.load.'runs/my-roberta'., --init runs/my-roberta"):
        model_config("runs/my-roberta")


def test_the_table_has_every_listed_name():
    lines = model_table().splitlines()
    assert {line.split()[0] for line in lines} >= set(contrastive.list_models()) | {"name", "ViT-B-16"}
    row = next(line for line in lines if line.startswith("ViT-B-32 "))
    assert " ".join(row.split()) == "ViT-B-32 151.3 M 224 50 77 49,408"
