"""Folders of open_clip: open_clip_config.json and safetensors, read without open_clip itself.

Image towers are its own ViT or a ViT of timm (then timm is imported, for what its name stands for).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from contrastive.data.tokenizer import Tokenizer
from contrastive.errors import UserError
from contrastive.files import read_json
from contrastive.interop.bundle import NOT_LOADED, Absent, Bundle
from contrastive.interop.formats.key_table import to_ours
from contrastive.interop.formats.open_clip import options
from contrastive.interop.formats.open_clip.config import (
    check_expressible,
    image_options,
    model_options,
    text_options,
)
from contrastive.interop.formats.open_clip.keys import image_table, scalar_table, text_table
from contrastive.interop.formats.open_clip.processor import read_processor
from contrastive.interop.formats.open_clip.tokenizer import eos_problem, read_tokenizer
from contrastive.interop.formats.open_clip.trunk import build_trunk, describe_trunk, trunk_to_ours
from contrastive.interop.formats.state_dicts import fill, read_safetensors
from contrastive.interop.formats.timm.architecture import whole_patches
from contrastive.log import warn
from contrastive.models import DualEncoder, ModelConfig

CONFIG = "open_clip_config.json"
# In open_clip's own order; without the pickles among them.
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
DERIVED = ("attn_mask", "text.attn_mask")  # buffers that old files hold
TEXT_PREFIX = "text."


def recognises(folder: Path) -> bool:
    """Whether this is a folder of open_clip."""
    return (folder / CONFIG).exists()


def load(folder: Path, with_tokenizer: bool = True) -> Bundle:
    """Load the model in eval mode on the CPU, with its preprocessing and tokenizer.

    LayerScale is folded into the layers before it. Fixed sin-cos positions, whose formula differs from ours, are kept
    as learned ones. A tokenizer whose files are missing, or that ours cannot be, is Absent.

    Raises:
        UserError: options that our towers have not (all are named), an unknown option, a missing or damaged file,
            or weights that do not fit.
    """
    where = folder / CONFIG
    description = read_json(where)
    if "model_cfg" not in description:
        raise UserError(f"{where} has no model_cfg: put the options of the model under that key")
    model_cfg = options.completed("model_cfg", description["model_cfg"], options.MODEL, where)
    given_text = model_cfg["text_cfg"]
    vision = options.completed("vision_cfg", model_cfg["vision_cfg"], options.VISION, where)
    text = options.completed("text_cfg", given_text, options.TEXT, where)
    check_expressible(model_cfg, vision, text, where)
    quick_gelu, trunk = model_cfg["quick_gelu"], None
    if vision["timm_model_name"]:
        trunk = build_trunk(vision, model_cfg["embed_dim"], folder, where)
        image, size = describe_trunk(trunk, vision, where)
    else:
        image, size = image_options(vision, quick_gelu, where)
    config = model_options(model_cfg, image, text_options(text, given_text, quick_gelu, where))
    model = _built(config, where)
    kept = whole_patches(size, image.patch_size)
    model.image_tower.set_input_size(kept)
    weights, theirs = _weights(folder, config, vision, text, trunk)
    fill(model, weights, folder, theirs)
    return Bundle(
        model=model.eval(),
        preprocess=read_processor(description.get("preprocess_cfg") or {}, size, kept, where),
        tokenizer=_tokenizer(text, config, folder) if with_tokenizer else NOT_LOADED,
        config=config,
        path=folder,
    )


def _built(config: ModelConfig, where: Path) -> DualEncoder:
    try:
        return DualEncoder(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _weights(
    folder: Path, config: ModelConfig, vision: Mapping[str, Any], text: Mapping[str, Any], trunk: torch.nn.Module | None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    file = {name: tensor for name, tensor in read_safetensors(folder, WEIGHTS).items() if name not in DERIVED}
    # CustomTextCLIP's names, which open_clip also reads where the config asks for them and the file has CLIP's.
    prefix = TEXT_PREFIX if any(name.startswith(TEXT_PREFIX) for name in file) else ""
    table = text_table(config.text, prefix, text["ls_init_value"] is not None)
    table += scalar_table(config.init_logit_bias is not None, unit_axes=1)
    if trunk is None:
        return to_ours(table + image_table(config.image, vision["ls_init_value"] is not None), file, folder)
    weights, theirs = to_ours(table, file, folder)
    tower, more = trunk_to_ours(weights, trunk, config.image, vision["timm_proj"], folder)
    return tower, theirs | more


def _tokenizer(text: Mapping[str, Any], config: ModelConfig, folder: Path) -> Tokenizer | Absent:
    tokenizer = read_tokenizer(text, folder)
    if text["pool_type"] == "argmax":
        problem = eos_problem(tokenizer, config.text.eos_id)
        if problem is not None:
            raise UserError(f"{folder / CONFIG}: {problem}")
        if isinstance(tokenizer, Absent) and text["hf_tokenizer_name"]:
            warn(f"{folder}: pool_type 'argmax' is taken as: each text ends with id {config.text.eos_id}")
    return tokenizer
