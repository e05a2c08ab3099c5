"""Folders as timm's `save_for_hf` writes them: config.json and model.safetensors.

timm itself is imported: what a name such as 'vit_small_patch16_224' stands for is in its code alone.

A model whose head is a classifier becomes an ImageClassifier, another an ImageModel (see head.py).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from contrastive.errors import UserError
from contrastive.files import read_json
from contrastive.interop.bundle import Bundle
from contrastive.interop.formats.state_dicts import fill, read_safetensors
from contrastive.interop.formats.timm.architecture import build_on_meta, describe, whole_patches
from contrastive.interop.formats.timm.head import PROJECTION, drop_zero_bias, head_kind
from contrastive.interop.formats.timm.keys import tower_to_ours
from contrastive.interop.formats.timm.processor import read_processor
from contrastive.models import ClassifierConfig, ImageClassifier, ImageModel, ImageModelConfig

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
    """Load the model in eval mode on the CPU, with the preprocessing of its evaluation transform.

    Raises:
        UserError: the architecture is not a plain ViT, or has parts that ours has not (all are named); a missing or
            damaged file; weights that do not fit.
    """
    file = folder / "config.json"
    if not file.exists():
        raise UserError(f"{folder} holds weights of a ViT of timm, which alone do not say its shape: {HOW_TO_NAME_IT}")
    description = read_json(file)
    skeleton = build_on_meta(f"local-dir:{folder}", file)
    image, size = describe(skeleton, file)
    weights, theirs = tower_to_ours(read_safetensors(folder), skeleton, image, folder)
    names = _label_names(skeleton.pretrained_cfg.get("label_names"), skeleton.num_classes, file)
    kind = head_kind(description, skeleton.num_classes, names, weights, file)
    if kind == "classifier":
        model = ImageClassifier(ClassifierConfig(image, num_classes=skeleton.num_classes))
    elif kind == "projection":
        weights[PROJECTION] = weights.pop("head.weight", torch.empty(0))
        theirs[PROJECTION] = "head.weight"
        drop_zero_bias(weights, "head.bias", folder, "timm")
        model = ImageModel(ImageModelConfig(skeleton.num_classes, replace(image, projection=True)))
    else:
        model = ImageModel(ImageModelConfig(image.width, image))
    kept = whole_patches(size, image.patch_size)
    model.image_tower.set_input_size(kept)
    fill(model, weights, folder, theirs)
    return Bundle(
        model=model.eval(),
        preprocess=read_processor(skeleton.pretrained_cfg, size, kept, file),
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
