"""Folders as timm's `save_for_hf` writes them: config.json and model.safetensors.

timm itself is imported: what a name such as 'vit_small_patch16_224' stands for is in its code alone.

A model whose head is a classifier becomes an ImageClassifier, another an ImageModel (see `head_kind`). Written are
image towers and classifiers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from contrastive.errors import UserError
from contrastive.files import read_json, write_json
from contrastive.interop.bundle import Bundle, build
from contrastive.interop.formats.evaluation_transform import (
    checked_preprocess,
    notes_on_images,
    read_timm_transform,
    whole_patches,
)
from contrastive.interop.formats.state_dicts import fill, read_safetensors, weights_of
from contrastive.interop.formats.timm_architecture import (
    PROJECTION,
    timm_description,
    timm_problems,
    tower_to_ours,
    tower_to_theirs,
)
from contrastive.interop.formats.timm_vit import build_on_meta, describe_vit
from contrastive.interop.parity import Outputs, Probe, cropped, padded
from contrastive.log import warn
from contrastive.models import ClassifierConfig, DualEncoder, ImageClassifier, ImageModel, ImageModelConfig
from contrastive.models.encoders import unit_length
from contrastive.models.patch_embedding import Places
from contrastive.patches import Patches

HeadKind = Literal["none", "projection", "classifier"]
HEAD_KEY = "contrastive_head"
"""What a folder of ours says its head is, in a key of config.json that timm passes over."""
# Of a state dict of timm's ViT, whatever its options.
TELLING_KEYS = ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
HOW_TO_NAME_IT = (
    'write a config.json beside model.safetensors, {"architecture": "vit_base_patch16_224", "num_classes": 0, '
    '"model_args": {"img_size": 224}, "pretrained_cfg": {}}, with the name and the arguments that '
    "timm.create_model got for it"
)


def recognises(folder: Path) -> bool:
    """Whether config.json names an architecture as timm does, or weights of timm's ViT lie here without one."""
    file = folder / "config.json"
    if file.exists():
        try:
            return isinstance(read_json(file).get("architecture"), str)
        except UserError:
            return False
    lone = [folder] if folder.suffix == ".safetensors" else sorted(folder.glob("*.safetensors"))
    return any(_has_telling_keys(path) for path in lone)


def load(folder: Path, with_tokenizer: bool = True) -> Bundle:
    """Load a ViT of timm, with the preprocessing of its evaluation transform."""
    file = folder / "config.json"
    if not file.exists():
        raise UserError(f"{folder} holds weights of a ViT of timm, which alone do not say its shape: {HOW_TO_NAME_IT}")
    description = read_json(file)
    skeleton = build_on_meta(f"local-dir:{folder}", file)
    image, size = describe_vit(skeleton, file)
    file_weights = read_safetensors(folder)
    names = _label_names(skeleton.pretrained_cfg.get("label_names"), skeleton.num_classes, file)
    kind = head_kind(description, skeleton.num_classes, names, file_weights, file)
    if kind == "classifier":
        config = ClassifierConfig(image, num_classes=skeleton.num_classes)
        model = build(lambda: ImageClassifier(config), file_weights, folder)
    else:
        embed_dim = skeleton.num_classes or image.width
        config = ImageModelConfig(embed_dim, replace(image, projection=kind == "projection"))
        model = build(lambda: ImageModel(config), file_weights, folder)
    model.image_tower.set_input_size(whole_patches(size, image.patch_size))
    projection = "head" if kind == "projection" else None
    weights, theirs = tower_to_ours(file_weights, skeleton, model, folder, projection=projection)
    fill(model, weights, folder, theirs)
    return Bundle(
        model=model.eval(),
        preprocess=read_timm_transform(skeleton.pretrained_cfg, image, size, file),
        tokenizer=None,
        config=model.config,
        path=folder,
        class_names=names if kind == "classifier" else None,
    )


def _has_telling_keys(file: Path) -> bool:
    try:
        with safe_open(file, "pt") as tensors:
            return set(TELLING_KEYS) <= set(tensors.keys())
    except (OSError, SafetensorError):
        return False


def _label_names(names: object, num_classes: int, where: Path) -> tuple | None:
    """The names in the order of the scores; None where there are none, or a mapping leaves some scores unnamed."""
    if not names:
        return None
    if isinstance(names, Mapping):
        names = [names.get(str(label)) for label in range(num_classes)]
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names if name is not None):
        raise UserError(f"{where}: label_names {names!r} has to be a list of texts, or an object of them by label")
    if len(names) != num_classes:
        raise UserError(f"{where}: {len(names)} label_names for {num_classes} classes; give one for each, or none")
    return None if None in names else tuple(names)


def head_kind(
    description: Mapping, num_classes: int, label_names: object, weights: Mapping[str, torch.Tensor], where: Path
) -> HeadKind:
    """Return what the head of a model is.

    Our own folders say so in config.json, under a key that timm passes over. For others, a head whose bias is zero
    throughout is a projection, as timm keeps those of CLIP, unless `label_names` name its rows; a warning says so
    where the architecture is none of CLIP's.

    Args:
        description: config.json. where: that file, for messages.

    Raises:
        UserError: our key has a value that it cannot have here.
    """
    if HEAD_KEY in description:
        kind = description[HEAD_KEY]
        if kind not in get_args(HeadKind) or (kind == "none") != (num_classes == 0):
            raise UserError(
                f"{where}: {HEAD_KEY} {kind!r} with num_classes {num_classes}; without classes it has to be 'none', "
                "else 'projection' or 'classifier'"
            )
        return kind
    if num_classes == 0:
        return "none"
    zero = {"head.weight", "head.bias"} <= weights.keys() and not weights["head.bias"].any()
    if label_names or not zero:
        return "classifier"
    if "clip" not in str(description.get("architecture")):
        warn(
            f"{where}: the bias of the head is zero, so its {num_classes:,} rows are taken for a projection into an "
            f'embedding space; for a classifier add "{HEAD_KEY}": "classifier"'
        )
    return "projection"


def write(bundle: Bundle, folder: Path, place: Path) -> list[str]:
    """Write the image tower, which there has to be.

    A projection becomes timm's `head` with a zero bias, as timm itself keeps CLIP's; a classifier's head is `head`.
    """
    bundle.check_image_tower("timm holds image towers")
    model, config = bundle.model, bundle.model.image_tower.config
    preprocess, unlike = checked_preprocess(bundle, scales=True)
    problems, is_classifier = timm_problems(config) + unlike, isinstance(model, ImageClassifier)
    if is_classifier and model.config.unit_features:
        problems.append("model.unit_features true (its head reads features as they are)")
    if is_classifier and config.projection:
        problems.append("model.image.projection true below a classifier (it has one linear layer there)")
    if problems:
        raise UserError(f"{bundle.path}: timm cannot express {'; '.join(problems)}; --to onnx can")
    state, kind, head = weights_of(model), "none", {}
    if is_classifier:
        kind, head = "classifier", {name: state[name] for name in ("head.weight", "head.bias")}
    elif PROJECTION in state:
        kind, head = "projection", {"head.weight": state[PROJECTION], "head.bias": torch.zeros(len(state[PROJECTION]))}
    num_classes = len(head["head.weight"]) if head else 0
    save_file(tower_to_theirs(state, config) | head, folder / "model.safetensors")
    description = {**timm_description(config, preprocess, num_classes), HEAD_KEY: kind}
    if bundle.class_names is not None:
        description["label_names"] = list(bundle.class_names)
    write_json(folder / "config.json", description)
    return _notes(bundle)


def outputs(folder: Path, probe: Probe) -> Outputs:
    """What timm makes of the folder: `image` is the embedding of an image tower, `logits` a classifier's scores."""
    import timm
    from timm.data import create_transform, resolve_model_data_config

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    options, native = resolve_model_data_config(model), isinstance(probe.pixels, Patches)
    if native:
        patch = model.embeds.patch_size[0]
        most = math.prod(side // patch for side in options["input_size"][1:])
        options |= {"naflex": True, "patch_size": patch, "max_seq_len": most, "patchify": True}
    transform = create_transform(**options, is_training=False)
    made = [transform(image.convert("RGB")) for image in probe.images]
    is_classifier = read_json(folder / "config.json")[HEAD_KEY] == "classifier"
    with torch.inference_mode():
        if native:
            features = model.forward_features(**naflex_inputs(probe.pixels))
            pooled = model.forward_head(**features, pre_logits=True)
        else:
            full = padded(probe.pixels, model.patch_embed.img_size)
            pooled = model.forward_head(model.forward_features(full), pre_logits=True)
        head = model.head(pooled)
    return Outputs(
        image=unit_length(pooled if is_classifier else head),
        logits=head if is_classifier else None,
        pixels=naflex_pixels(made) if native else cropped(made, probe.pixels),
    )


def naflex_inputs(images: Patches) -> dict[str, torch.Tensor]:
    """Return images as the `forward` of a NaFlexVit takes them, by name."""
    places = Places.of(images.grids[:, None], torch.arange(images.values.shape[1]))
    coordinates = torch.stack([places.row, places.column], dim=-1)
    coordinates = torch.where(images.mask[..., None], coordinates, 0)  # the largest is taken for the image's own
    return {"patches": images.values, "patch_coord": coordinates, "patch_valid": images.mask}


def naflex_pixels(made: Sequence[Mapping[str, torch.Tensor]]) -> Patches:
    """Return what a NaFlexVit's transform makes of each image, {'patches': (N, P·P·3), 'patch_coord': (N, 2)}."""
    return Patches.batch([Patches(one["patches"], one["patch_coord"].amax(dim=0) + 1) for one in made])


def _notes(bundle: Bundle) -> list[str]:
    notes = []
    if isinstance(bundle.model, DualEncoder):
        notes.append("timm has no text towers: this is the image tower alone")
    if not isinstance(bundle.model, ImageClassifier) and bundle.model.image_tower.projection is not None:
        notes.append(
            "the projection to the embedding space is timm's head, with a bias of zero; num_classes=0 omits it"
        )
    return notes + notes_on_images(bundle.model.image_tower.config, bundle.preprocess.config)
