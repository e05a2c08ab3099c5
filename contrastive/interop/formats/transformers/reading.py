"""Folders of transformers: SigLIP, SigLIP 2 and CLIP models and their towers alone."""

import json
from dataclasses import replace
from pathlib import Path

from contrastive.interop.bundle import NOT_LOADED, Bundle
from contrastive.interop.formats.key_table import to_ours
from contrastive.interop.formats.state_dicts import fill, read_safetensors
from contrastive.interop.formats.transformers.config import (
    LEGACY_EOS,
    Description,
    describe,
    image_side,
    lacks_head,
    native_size,
    our_config,
    pooled_id,
)
from contrastive.interop.formats.transformers.equivalents import is_mean_head, without_head
from contrastive.interop.formats.transformers.keys import key_table, plain
from contrastive.interop.formats.transformers.processor import read_preprocess
from contrastive.interop.formats.transformers.tokenizer import end_of_text_id, highest_id, read_tokenizer
from contrastive.log import warn
from contrastive.models import DualEncoder, ImageModel, ImageModelConfig, ModelConfig, TextModel, TextModelConfig

WEIGHTS = "model.safetensors"


def recognises(folder: Path) -> bool:
    """Whether config.json names a model of transformers, whichever, or is damaged."""
    file = folder / "config.json"
    if not file.is_file():
        return False
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return True  # `load` says what is wrong with it
    return isinstance(content, dict) and ("model_type" in content or "architectures" in content)


def load(folder: Path, with_tokenizer: bool = True) -> Bundle:
    """Load a model or a tower alone: float32, eval mode, on the CPU.

    Raises:
        UserError: another architecture, an option that our towers lack, or weights that do not fit.
    """
    description = describe(folder)
    file = read_safetensors(folder, (WEIGHTS,))
    if description.part != "both" and description.projected is None:
        description = replace(description, projected=any(name.endswith("_projection.weight") for name in file))
    has_image, has_text = description.part != "text", description.part != "image"
    weights = plain(file, description.part, image_side(description, "patch_size") if has_image else 0)
    without_pooling = has_image and lacks_head(description)
    mean_head = has_image and (without_pooling or is_mean_head(weights))
    if mean_head:
        weights = without_head(weights)
    config = our_config(description, mean_head, _eos_id(description, folder))
    model = _model(config)
    family = "clip" if description.family == "clip" else "siglip"
    ours, theirs = to_ours(key_table(model.state_dict(), family), weights, folder / WEIGHTS)
    fill(model, ours, folder / WEIGHTS, theirs)
    if without_pooling:
        warn(f"{folder} has no pooling head (vision_use_head is false): its image embedding is the mean of the patches")
    preprocess = tokenizer = None
    if has_image:
        preprocess = read_preprocess(folder, native_size(description), config.image.patch_size)
    if has_text:
        tokenizer = read_tokenizer(folder, config.text) if with_tokenizer else NOT_LOADED
    return Bundle(model.eval(), preprocess, tokenizer, config, folder)


def _eos_id(description: Description, folder: Path) -> int | None:
    """What the text tower pools at; where that is a guess it is said."""
    if description.family != "clip" or description.text["eos_token_id"] != LEGACY_EOS:
        return pooled_id(description, None)
    highest = highest_id(folder)
    eos_id = pooled_id(description, highest)
    if eos_id is not None and not end_of_text_id(folder) == highest == eos_id:
        warn(
            f"{description.file}: eos_token_id {LEGACY_EOS} means the highest id of each text to the library; here it "
            f"is always {eos_id}, a guess, as no tokenizer here has its end-of-text token as its highest id: set "
            "eos_token_id to that token's id"
        )
    return eos_id


def _model(config: ModelConfig | ImageModelConfig | TextModelConfig) -> DualEncoder | ImageModel | TextModel:
    if isinstance(config, ImageModelConfig):
        return ImageModel(config)
    return TextModel(config) if isinstance(config, TextModelConfig) else DualEncoder(config)
