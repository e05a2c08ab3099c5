"""Masks: the class of each pixel of a picture, as data hold them."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from contrastive.data.decode import FORMATS, MAX_PILLOW_PIXELS
from contrastive.data.record import BadSample
from contrastive.errors import UserError

INDEXED = ("P", "L", "1", "I", "I;16")
"""Pillow's modes of one whole number a pixel."""
MOST_VALUE = 255
IGNORED = 255
"""The value that VOC, Cityscapes and most others give to pixels that do not count."""


def decode_mask(
    mask: bytes | np.ndarray, size: tuple[int, int], names: Sequence[str] | None, ignore: Sequence[int], key: str
) -> np.ndarray:
    """Return the class of each pixel, uint8 (H, W).

    Args:
        mask: an array of whole numbers (H, W), or a file, PNG as a rule, of indices: a palette's colours do not count.
        size: height and width of the picture, which the mask has to have.
        names: of the classes, from 0: values above are refused but for those of `ignore`. None: all up to 255 are good.
        key: of the sample, for messages.

    Raises:
        BadSample: 'unreadable_mask'. UserError: colours in place of indices, another size, a value out of range.
    """
    values = mask if isinstance(mask, np.ndarray) else _read(mask, key)
    if values.shape != tuple(size):
        told = "×".join(map(str, values.shape[::-1]))
        raise UserError(f"{key}: the mask has {told} pixels, its image {size[1]}×{size[0]}; they have to be the same")
    least, most = int(values.min()), int(values.max())
    if least < 0 or most > MOST_VALUE:
        raise UserError(f"{key}: the mask has the value {least if least < 0 else most}; classes go from 0 to 255")
    known = [*range(len(names) if names else 256), *ignore]
    if beyond := sorted({*np.unique(values).tolist()} - {*known}):
        raise UserError(
            f"{key}: the mask has the value {beyond[0]}, but there are {len(names)} class names, of 0 to "
            f"{len(names) - 1}; name it too, or leave it out by --option ignore='[255, {beyond[0]}]'"
        )
    return np.ascontiguousarray(values, np.uint8)


def _read(data: bytes, key: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            kind, mode = opened.format, opened.mode
            if kind == "JPEG" or mode not in INDEXED:
                held = "a JPEG, which blurs them" if kind == "JPEG" else f"a picture of kind {mode}"
                raise UserError(f"{key}: the mask is {held}; masks are PNGs of class indices, grey or with a palette")
            if opened.width * opened.height > MAX_PILLOW_PIXELS:
                raise BadSample("unreadable_mask", key)
            return np.array(opened, np.uint8 if mode == "1" else None)
    except (UserError, BadSample):
        raise
    except Exception as error:  # Pillow's plugins raise whatever the damaged bytes lead them to
        raise BadSample("unreadable_mask", key) from error
