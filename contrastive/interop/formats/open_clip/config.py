"""open_clip's model_cfg and our options."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contrastive.errors import UserError
from contrastive.interop.formats.open_clip.options import activation, norm_eps, strange_text, strange_vision
from contrastive.interop.formats.open_clip.processor import size_option
from contrastive.interop.formats.timm.architecture import whole_patches
from contrastive.interop.formats.timm.naming import mlp_ratio
from contrastive.models import ImageTowerConfig, ModelConfig, TextTowerConfig

CLIP_VOCABULARY, CLIP_EOS, CLIP_PAD = 49_408, 49_407, 0
THEIR_POOLS = {"class": "tok", "average": "avg"}


def check_expressible(
    model: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any], where: Path
) -> None:
    """Raise UserError where our towers cannot be this model; it names every option."""
    problems = ["multimodal_cfg (CoCa)"] if model["multimodal_cfg"] else []
    problems += [] if vision["timm_model_name"] else strange_vision(vision)
    problems += strange_text(text)
    if problems:
        raise UserError(f"{where}: our towers have no {', no '.join(problems)}; open_clip itself can load this model")


def image_options(vision: Mapping[str, Any], quick_gelu: bool, where: Path) -> tuple[ImageTowerConfig, tuple[int, int]]:
    """Return our options for a native image tower, and the (height, width) of its images."""
    side, patch, width = vision["image_size"], vision["patch_size"], vision["width"]
    if patch is None or vision["head_width"] > width:
        name = "patch_size" if patch is None else "head_width"
        raise UserError(f"{where}: vision_cfg.{name} is {vision[name]!r}, which no tower of width {width} can have")
    size = (side, side) if isinstance(side, int) else tuple(side)
    config = ImageTowerConfig(
        image_size=whole_patches(size, patch)[0],
        patch_size=patch,
        width=width,
        depth=vision["layers"],
        num_heads=width // vision["head_width"],
        mlp_dim=int(width * vision["mlp_ratio"]),
        pool="class" if vision["pool_type"] == "tok" else "average",
        class_token=True,
        pre_norm=not vision["no_ln_pre"],
        patch_bias=False,
        projection=True,
        activation=activation("vision_cfg", vision, quick_gelu, where),
        norm_eps=norm_eps("vision_cfg", vision, where),
        patch_dropout=vision["patch_dropout"],
    )
    return config, size


def text_options(text: Mapping[str, Any], given: Mapping[str, Any], quick_gelu: bool, where: Path) -> TextTowerConfig:
    """Return our options for a text tower.

    Pooling at the highest id of a text ('argmax') is pooling at its end-of-text token exactly where that is the
    highest id that texts have: 49,407 of CLIP's tokenizer, else the last of the vocabulary.

    Args:
        given: what the file itself says, without open_clip's defaults.
    """
    clip = not text["hf_tokenizer_name"] and text["vocab_size"] >= CLIP_VOCABULARY
    eos_id, pad_id = given.get("eos_id"), given.get("pad_id", CLIP_PAD if clip else None)
    if text["pool_type"] == "argmax":
        eos_id = CLIP_EOS if clip else text["vocab_size"] - 1
    elif text["pool_type"] == "eos":
        eos_id = text["eos_id"]
    elif eos_id is not None and not 0 <= eos_id < text["vocab_size"]:
        eos_id = None  # nothing reads it
    if pad_id is not None and not 0 <= pad_id < text["vocab_size"]:
        pad_id = None  # as this one, whatever the pooling
    return TextTowerConfig(
        vocab_size=text["vocab_size"],
        context_length=text["context_length"],
        width=text["width"],
        depth=text["layers"],
        num_heads=text["heads"],
        mlp_dim=int(text["width"] * text["mlp_ratio"]),
        causal=not text["no_causal_mask"],
        pool="last" if text["pool_type"] == "last" else "eos",
        projection=text["proj_type"] != "none",
        projection_bias=text["proj_bias"],
        eos_id=eos_id,
        pad_id=pad_id,
        activation=activation("text_cfg", text, quick_gelu, where),
        norm_eps=norm_eps("text_cfg", text, where),
    )


def model_options(model: Mapping[str, Any], image: ImageTowerConfig, text: TextTowerConfig) -> ModelConfig:
    """Return our options of the whole; open_clip holds the initial scale as a logarithm."""
    scale = model["init_logit_scale"]  # a logarithm, whose last digits are not exact
    return ModelConfig(
        embed_dim=model["embed_dim"],
        image=image,
        text=text,
        init="clip" if model["init_logit_bias"] is None else "siglip",
        init_logit_scale=None if scale is None else round(math.exp(scale), 9),
        init_logit_bias=None if model["init_logit_bias"] is None else float(model["init_logit_bias"]),
    )


def is_native(image: ImageTowerConfig, text: TextTowerConfig) -> bool:
    """Whether open_clip's own image tower can be this one; `quick_gelu` is one switch for both towers."""
    shape = image.class_token and image.projection and not image.patch_bias and image.pool in THEIR_POOLS
    return shape and (image.activation == "quick_gelu") == (text.activation == "quick_gelu")


def text_problems(text: TextTowerConfig) -> list[str]:
    """Return the options that open_clip's text tower cannot express, each with what to do."""
    if text.pool == "average":
        return ["model.text.pool 'average' (its text towers pool at one token; train with 'eos' or 'last')"]
    return []


def write_model(config: ModelConfig) -> dict:
    """Return the entries of model_cfg beside the towers."""
    options = {"embed_dim": config.embed_dim, "quick_gelu": config.text.activation == "quick_gelu"}
    if config.init_logit_scale is not None:
        options["init_logit_scale"] = math.log(config.init_logit_scale)
    if config.init_logit_bias is not None:
        options["init_logit_bias"] = config.init_logit_bias
    return options


def write_native_image(image: ImageTowerConfig, size: tuple[int, int]) -> dict:
    """Return vision_cfg of a native tower of (height, width) pixels."""
    options = {
        "image_size": size_option(size),
        "patch_size": image.patch_size,
        "width": image.width,
        "layers": image.depth,
        "head_width": image.width // image.num_heads,
        "mlp_ratio": mlp_ratio(image.width, image.mlp_dim),
        "pool_type": THEIR_POOLS[image.pool],
        "no_ln_pre": not image.pre_norm,
        "patch_dropout": image.patch_dropout,
    }
    return options | _block_options(image)


def write_text(text: TextTowerConfig) -> dict:
    """Return text_cfg of a tower that `text_problems` finds nothing in."""
    options = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.num_heads,
        "layers": text.depth,
        "mlp_ratio": mlp_ratio(text.width, text.mlp_dim),
        "no_causal_mask": not text.causal,
        "pool_type": "last" if text.pool == "last" else "argmax" if text.eos_id == text.vocab_size - 1 else "eos",
        "proj_type": "linear" if text.projection else "none",
        "proj_bias": text.projection and text.projection_bias,
    }
    options |= {name: getattr(text, name) for name in ("eos_id", "pad_id") if getattr(text, name) is not None}
    return options | _block_options(text)


def _block_options(config: ImageTowerConfig | TextTowerConfig) -> dict:
    options = {} if config.norm_eps == 1e-5 else {"norm_kwargs": {"eps": config.norm_eps}}
    return options | ({"act_kwargs": {"approximate": "tanh"}} if config.activation == "gelu_tanh" else {})
