"""open_clip's `preprocess_cfg` and our preprocessing."""

from pathlib import Path
from typing import Any

from contrastive.data.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, PreprocessConfig
from contrastive.errors import UserError
from contrastive.interop.bundle import Absent
from contrastive.interop.formats.option_kinds import check_like, per_channel
from contrastive.interop.formats.timm.processor import processor_problems as corner_problems
from contrastive.interop.formats.timm.processor import taken_size

MODES = {"shortest": "crop", "squash": "squash"}


def read_processor(cfg: Any, size: tuple[int, int], kept: tuple[int, int], where: Path) -> Preprocess | Absent:
    """Return the preprocessing of open_clip's evaluation transform; what the config leaves out is CLIP's.

    Args:
        size: (height, width) of the image tower, which open_clip puts above the config's own.
        kept: those that its patches fill.
        where: the file with it, for messages.

    Raises:
        UserError: preprocess_cfg or one of its options is of another kind than open_clip's.
    """
    check_like("preprocess_cfg", cfg, {}, where)
    mode, interpolation = cfg.get("resize_mode") or "shortest", cfg.get("interpolation") or "bicubic"
    check_like("preprocess_cfg.resize_mode", mode, "shortest", where)
    known = ("bicubic", "bilinear", "random")
    if interpolation not in known:
        raise UserError(f"{where}: preprocess_cfg.interpolation is {interpolation!r}; use one of {', '.join(known)}")
    square, cut_off = size[0] == size[1], tuple(size) != tuple(kept)
    if mode not in MODES or (mode == "shortest" and (cut_off or not square)) or (cut_off and not square):
        pixels = f" to {size[0]}×{size[1]} pixels" if not square or cut_off else ""
        return Absent(
            f"the model's preprocess_cfg has resize_mode '{mode}'{pixels}, which our preprocessing has not; prepare "
            "images with open_clip's transform and give the model pixels, or set resize_mode to 'squash' or 'shortest'"
        )
    return Preprocess(
        PreprocessConfig(
            image_size=kept[0] if square else tuple(kept),
            resize=MODES[mode],
            mean=per_channel("preprocess_cfg.mean", cfg.get("mean") or CLIP_MEAN, where),
            std=per_channel("preprocess_cfg.std", cfg.get("std") or CLIP_STD, where),
            interpolation="bicubic" if interpolation == "random" else interpolation,  # as open_clip in evaluation
            short_side=size[0] if cut_off else None,
            cut="corner" if cut_off else "round",
        )
    )


def processor_problems(config: PreprocessConfig, patch_size: int) -> list[str]:
    """Return what open_clip's evaluation transform cannot do, with what to do instead."""
    problems = corner_problems(config, patch_size)
    if config.short_side in (None, taken_size(config, patch_size)[0]):
        return problems
    return [
        *problems,
        f"preprocess short_side {config.short_side} (its short side is the image size; leave short_side out)",
    ]


def size_option(size: tuple[int, int]) -> int | list[int]:
    """Return (height, width) as open_clip's configs hold it: one number for a square."""
    return size[0] if size[0] == size[1] else list(size)


def write_processor(config: PreprocessConfig, patch_size: int) -> dict:
    """Return open_clip's preprocess_cfg of what `processor_problems` finds nothing in."""
    return {
        "size": size_option(taken_size(config, patch_size)),
        "mode": "RGB",
        "mean": list(config.mean),
        "std": list(config.std),
        "interpolation": config.interpolation,
        "resize_mode": next(theirs for theirs, ours in MODES.items() if ours == config.resize),
        "fill_color": 0,
    }
