"""timm's `pretrained_cfg` and our preprocessing."""

import math
from collections.abc import Mapping
from pathlib import Path

from contrastive.data.preprocess import Preprocess, PreprocessConfig
from contrastive.errors import UserError
from contrastive.interop.bundle import Absent
from contrastive.interop.formats.option_kinds import is_like, per_channel

# What timm takes where `pretrained_cfg` is silent (timm.data.constants).
MEAN, STD, CROP_PCT = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.875


def read_processor(cfg: Mapping, size: tuple[int, int], kept: tuple[int, int], where: Path) -> Preprocess | Absent:
    """Return the preprocessing of timm's evaluation transform, as `resolve_data_config` has it.

    Args:
        size: (height, width) that the model takes.
        kept: those that its patches fill.
        where: the file with it, for messages.

    Raises:
        UserError: a crop_pct, mean or std that is no number, or none above zero.
    """
    interpolation, mode = cfg.get("interpolation") or "bicubic", cfg.get("crop_mode") or "center"
    crop_pct = cfg.get("crop_pct") or CROP_PCT
    if not is_like(crop_pct, CROP_PCT) or crop_pct <= 0:
        raise UserError(f"{where}: pretrained_cfg.crop_pct is {crop_pct!r}; it has to be a number above 0")
    square, cut_off = size[0] == size[1], tuple(size) != tuple(kept)
    problem = None
    if interpolation not in ("bicubic", "bilinear"):
        problem = f"interpolation '{interpolation}'"
    elif mode not in ("center", "squash"):
        problem = f"crop_mode '{mode}'"
    elif not square and (mode == "center" or crop_pct != 1):
        problem = f"crop_mode '{mode}' with crop_pct {crop_pct} to {size[0]}×{size[1]} pixels"
    elif cut_off and (mode == "center" or crop_pct != 1 or not square):
        problem = f"crop_mode '{mode}' to {size[0]} pixels, which patches do not fill,"
    elif crop_pct > 1:
        problem = f"crop_pct {crop_pct} (a frame around the image)"
    if problem is not None:
        return Absent(
            f"pretrained_cfg in {where} asks for {problem} which our preprocessing has not; prepare images with "
            "timm.data.create_transform and give the model pixels"
        )
    scaled = math.floor(size[0] / crop_pct)
    return Preprocess(
        PreprocessConfig(
            image_size=kept[0] if square else tuple(kept),
            resize="squash" if mode == "squash" else "crop",
            mean=per_channel("pretrained_cfg.mean", cfg.get("mean") or MEAN, where),
            std=per_channel("pretrained_cfg.std", cfg.get("std") or STD, where),
            interpolation=interpolation,
            short_side=scaled if scaled != kept[0] and square else None,
            cut="corner" if cut_off else "round",
        )
    )


def taken_size(config: PreprocessConfig, patch_size: int) -> tuple[int, int]:
    """Return (height, width) that models of timm and open_clip take where their patches leave out the rest."""
    whole = config.short_side
    if (
        config.cut == "corner"
        and config.resize == "squash"
        and whole
        and whole // patch_size * patch_size == config.size[0]
    ):
        return whole, whole
    return config.size


def processor_problems(config: PreprocessConfig, patch_size: int) -> list[str]:
    """Return what timm's and open_clip's evaluation transforms cannot do, with what to do instead."""
    cuts = config.resize == "crop" or config.short_side not in (None, config.size[0])
    if config.cut == "corner" and cuts and taken_size(config, patch_size) == config.size:
        return ["preprocess cut 'corner' (they cut the centre)"]
    return []


def write_processor(config: PreprocessConfig, patch_size: int) -> dict:
    """Return the entries of `pretrained_cfg` for which timm's evaluation transform does the same."""
    size, crop_pct = taken_size(config, patch_size), 1.0
    if config.short_side not in (None, size[0]):
        crop_pct = size[0] / config.short_side
        if math.floor(size[0] / crop_pct) != config.short_side:  # rounded down by one
            crop_pct = size[0] / (config.short_side + 0.5)
    return {
        "input_size": [3, *size],
        "interpolation": config.interpolation,
        "crop_pct": crop_pct,
        "crop_mode": "squash" if config.resize == "squash" else "center",
        "mean": list(config.mean),
        "std": list(config.std),
    }
