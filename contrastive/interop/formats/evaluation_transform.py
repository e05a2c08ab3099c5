"""The evaluation transforms of timm and open_clip as our preprocessing, and back.

Both are torchvision's resize, centre crop and normalisation; timm's `pretrained_cfg` and open_clip's `preprocess_cfg`
name the steps differently.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contrastive.data.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, PreprocessConfig
from contrastive.errors import UserError
from contrastive.interop.bundle import Absent, Bundle
from contrastive.interop.formats import check, is_count, is_number, per_channel
from contrastive.models import ImageTowerConfig

TIMM_MODES = {"center": "crop", "squash": "squash"}
OPEN_CLIP_MODES = {"shortest": "crop", "squash": "squash"}


def whole_patches(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Return the pixels that patches fill: the libraries pass over what is beyond, on the right and below."""
    return size[0] // patch_size * patch_size, size[1] // patch_size * patch_size


def num_patches(size: Sequence[int], patch_size: int) -> int:
    """Return how many whole patches pixels of this (height, width) have."""
    return size[0] // patch_size * (size[1] // patch_size)


def taken_size(config: PreprocessConfig, patch_size: int) -> tuple[int, int]:
    """Return the (height, width) that a library's model takes, with the pixels that its patches leave out."""
    whole = config.short_side
    cuts_corner = config.cut == "corner" and config.resize == "squash"
    if cuts_corner and whole and whole // patch_size * patch_size == config.size[0]:
        return whole, whole
    return config.size


def read_timm_transform(
    cfg: Mapping, image: ImageTowerConfig, size: tuple[int, int], where: Path
) -> Preprocess | Absent:
    """Return the preprocessing of timm's evaluation transform, as `resolve_data_config` has it.

    Of a tower that takes any shape: as many patches at most as an image of its input_size has.

    Args:
        cfg: `pretrained_cfg`.
        size: (height, width) that the model takes; what its patches do not fill is left out.
        where: the file with it, for messages.

    Raises:
        UserError: an input_size, crop_pct, mean or std that is no number, or none above zero.
    """
    from timm.data import resolve_data_config

    cfg, patch_size = resolve_data_config(pretrained_cfg=cfg), image.patch_size  # which fills in the library's defaults
    if image.native:
        taken = cfg["input_size"]
        fits = isinstance(taken, (list, tuple)) and len(taken) == 3 and all(map(is_count, taken))
        wanted = "three whole numbers: channels, height and width"
        check(fits, f"{where}: pretrained_cfg.input_size", taken, wanted, ";")
        return _native_preprocess(image, num_patches(taken[1:], patch_size), "pretrained_cfg", cfg, where)
    interpolation, mode, crop_pct = cfg["interpolation"], cfg["crop_mode"], cfg["crop_pct"]
    fits = is_number(crop_pct) and crop_pct > 0.001  # far below it no size would be a whole number any more
    check(fits, f"{where}: pretrained_cfg.crop_pct", crop_pct, "a number above 0", ";")
    exact = mode == "squash" and crop_pct == 1
    possible, square = _is_possible(exact, size, patch_size), size[0] == size[1]
    unfilled = f"crop_mode '{mode}' to {size[0]} pixels, which patches do not fill,"
    problems = {
        f"interpolation '{interpolation}'": interpolation not in ("bicubic", "bilinear"),
        f"crop_mode '{mode}'": mode not in tuple(TIMM_MODES),
        unfilled: not possible and (exact or square),
        f"crop_mode '{mode}' with crop_pct {crop_pct} to {size[0]}×{size[1]} pixels": not possible,
        f"crop_pct {crop_pct} (a frame around the image)": crop_pct > 1,
    }
    for problem in (name for name, is_so in problems.items() if is_so):
        return Absent(
            f"pretrained_cfg in {where} asks for {problem} which our preprocessing has not; prepare images with "
            "timm.data.create_transform and give the model pixels"
        )
    statistics, scaled = _statistics("pretrained_cfg", cfg, where), math.floor(size[0] / crop_pct)
    return made_preprocess(TIMM_MODES[mode], scaled, size, patch_size, statistics, interpolation)


def _native_preprocess(
    image: ImageTowerConfig, patches: int, section: str, cfg: Mapping, where: Path
) -> Preprocess | Absent:
    """Return ours for images of any shape, of so many patches at most.

    Args:
        section: the object of the file `where` that holds mean, std and interpolation, and `cfg`, what it holds.
    """
    interpolation = cfg["interpolation"]
    if interpolation not in ("bicubic", "bilinear"):
        return Absent(
            f"{section} in {where} asks for interpolation '{interpolation}', which our preprocessing has not; give the "
            "model Patches of your own"
        )
    statistics = _statistics(section, cfg, where)
    made = {"resize": "native", "interpolation": interpolation, "patches": patches, **statistics}
    try:
        return Preprocess(PreprocessConfig(image.image_size, image.patch_size, **made))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def read_open_clip_transform(
    cfg: Any, vision: Mapping[str, Any], image: ImageTowerConfig, size: tuple[int, int], where: Path
) -> Preprocess | Absent:
    """Return the preprocessing of open_clip's evaluation transform; what the config leaves out is CLIP's.

    Of a tower that takes any shape open_clip 4 itself squashes to image_size unless its caller asks for patches; ours
    are always patches, at most image_seq_len of them, else as many as an image of image_size has.

    Args:
        cfg: `preprocess_cfg`, whatever it is. vision: `vision_cfg`.
        size: (height, width) of the image tower, which open_clip puts above the config's own.
        where: as above.

    Raises:
        UserError: preprocess_cfg or one of its options is of another kind than open_clip's.
    """
    cfg, patch_size = _open_clip_options(cfg, where), image.patch_size
    if image.native:
        patches = vision["image_seq_len"] or num_patches(both_sides(vision["image_size"]), patch_size)
        return _native_preprocess(image, patches, "preprocess_cfg", cfg, where)
    mode = cfg["resize_mode"]
    if mode not in tuple(OPEN_CLIP_MODES) or not _is_possible(mode == "squash", size, patch_size):
        pixels = "" if _is_possible(False, size, patch_size) else f" to {size[0]}×{size[1]} pixels"
        return Absent(
            f"the model's preprocess_cfg has resize_mode '{mode}'{pixels}, which our preprocessing has not; prepare "
            "images with open_clip's transform and give the model pixels, or set resize_mode to 'squash' or 'shortest'"
        )
    statistics = _statistics("preprocess_cfg", cfg, where)
    return made_preprocess(OPEN_CLIP_MODES[mode], size[0], size, patch_size, statistics, cfg["interpolation"])


def _open_clip_options(cfg: Any, where: Path) -> dict[str, Any]:
    """`preprocess_cfg` with open_clip's defaults for evaluation; UserError where one is of another kind."""
    check(isinstance(cfg, Mapping), f"{where}: preprocess_cfg", cfg, "an object with options", ";")
    defaults = {"mean": CLIP_MEAN, "std": CLIP_STD, "resize_mode": "shortest", "interpolation": "bicubic"}
    cfg = defaults | {name: value for name, value in cfg.items() if value}
    mode, interpolation = cfg["resize_mode"], cfg["interpolation"]
    check(isinstance(mode, str), f"{where}: preprocess_cfg.resize_mode", mode, "like 'shortest'", ";")
    known = ("bicubic", "bilinear", "random")
    if interpolation not in known:
        raise UserError(f"{where}: preprocess_cfg.interpolation is {interpolation!r}; use one of {', '.join(known)}")
    return cfg | ({"interpolation": "bicubic"} if interpolation == "random" else {})


def _is_possible(squashes: bool, size: tuple[int, int], patch_size: int) -> bool:
    """Whether ours can make such images: of an oblong, or one that patches do not fill, it can only squash to it."""
    square, filled = size[0] == size[1], size == whole_patches(size, patch_size)
    return (square and filled) or (squashes and (square or filled))


def _statistics(section: str, cfg: Mapping, where: Path) -> dict[str, tuple[float, ...]]:
    """Mean and std by our names; UserError where one is no number for each channel."""
    return {name: per_channel(f"{where}: {section}.{name}", cfg[name]) for name in ("mean", "std")}


def made_preprocess(
    resize: str,
    scaled: int,
    size: tuple[int, int],
    patch_size: int,
    statistics: Mapping[str, tuple[float, ...]],
    interpolation: str,
    cut: str = "round",
) -> Preprocess:
    """Return ours of a library's evaluation transform.

    Args:
        resize, interpolation, cut: as PreprocessConfig has them; what patches do not fill is a corner to be cut.
        scaled: pixels of the short side, or of both sides of a square, before a crop.
        size: (height, width) that the model takes; what patches do not fill is not made.
        statistics: mean and std.
    """
    square, kept = size[0] == size[1], whole_patches(size, patch_size)
    return Preprocess(
        PreprocessConfig(
            image_size=kept[0] if square else kept,
            resize=resize,
            interpolation=interpolation,
            short_side=scaled if square and scaled != kept[0] else None,
            cut=cut if size == kept else "corner",
            **statistics,
        )
    )


def checked_preprocess(bundle: Bundle, scales: bool) -> tuple[PreprocessConfig, list[str]]:
    """Return how images become pixels, and what of that an evaluation transform cannot do, with what to do instead.

    scales: whether it can scale to more than the size of the images, as timm's by its crop_pct.

    Raises:
        UserError: there is no preprocessing, which timm and open_clip cannot do without, or it makes images of another
            size than the tower's positions are for.
    """
    try:
        config = bundle.preprocess.config
    except UserError as error:  # of an Absent, which says what is missing
        raise UserError(f"{error}; --to transformers and --to onnx write the model without") from None
    made, fits = config.size, bundle.model.image_tower.input_size
    if tuple(made) != tuple(fits):
        raise UserError(
            f"the preprocessing makes {made[0]}×{made[1]} pixels, the image tower has positions for "
            f"{fits[0]}×{fits[1]}: call model.image_tower.set_input_size or give the bundle another preprocess"
        )
    problems, taken = [], taken_size(config, bundle.model.image_tower.config.patch_size)
    native = bundle.model.image_tower.config.native
    if native != (config.resize == "native"):
        problems.append(f"preprocess resize '{config.resize}' with model.image.native {str(native).lower()}")
    cuts = config.resize == "crop" or config.short_side not in (None, config.size[0])
    if config.cut == "corner" and cuts and taken == config.size:
        problems.append("preprocess cut 'corner' (they cut the centre)")
    if not scales and config.short_side not in (None, taken[0]):
        problems.append(
            f"preprocess short_side {config.short_side} (its short side is the image size; leave short_side out)"
        )
    return config, problems


def notes_on_images(image: ImageTowerConfig, config: PreprocessConfig) -> list[str]:
    """What timm and open_clip do a little otherwise, and what is written to them in other terms."""
    notes = []
    if image.position == "sincos":
        notes.append("the fixed sin-cos positions are written as learned ones of the same values")
    if config.cut == "floor":
        notes.append(
            "where the middle lies between two pixels, the crop can be one pixel further right or down than before"
        )
    return notes


def write_timm_transform(config: PreprocessConfig, patch_size: int) -> dict:
    """Return the entries of `pretrained_cfg` for which timm's evaluation transform does the same."""
    size, crop_pct = taken_size(config, patch_size), 1.0
    if config.resize == "native":  # the size tells how many patches an image has at most
        most = config.most_patches
        rows = next(n for n in range(math.isqrt(most), 0, -1) if most % n == 0)
        size = rows * patch_size, most // rows * patch_size
    elif config.short_side not in (None, size[0]):
        crop_pct = size[0] / config.short_side
        if math.floor(size[0] / crop_pct) != config.short_side:  # rounded down by one
            crop_pct = size[0] / (config.short_side + 0.5)
    return {
        "input_size": [3, *size],
        "interpolation": config.interpolation,
        "crop_pct": crop_pct,
        "crop_mode": "squash" if config.resize == "native" else _named(TIMM_MODES, config.resize),
        "mean": list(config.mean),
        "std": list(config.std),
    }


def write_open_clip_transform(config: PreprocessConfig, patch_size: int) -> dict:
    """Return the `preprocess_cfg` of what `checked_preprocess` finds nothing in."""
    return {
        "size": size_option(taken_size(config, patch_size)),
        "mode": "RGB",
        "mean": list(config.mean),
        "std": list(config.std),
        "interpolation": config.interpolation,
        "resize_mode": _named(OPEN_CLIP_MODES, config.resize),
        "fill_color": 0,
    }


def size_option(size: tuple[int, int]) -> int | list[int]:
    """Return (height, width) as open_clip's configs hold it: one number for a square."""
    return size[0] if size[0] == size[1] else list(size)


def both_sides(option: int | list[int]) -> tuple[int, int]:
    """Return (height, width) of what `size_option` gives."""
    return (option, option) if isinstance(option, int) else tuple(option)


def _named(modes: Mapping[str, str], resize: str) -> str:
    return next(theirs for theirs, ours in modes.items() if ours == resize)
