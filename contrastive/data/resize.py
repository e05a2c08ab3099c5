"""Resizing of uint8 pixels with antialiasing, as Pillow does it."""

from typing import Literal

import torch
from torch.nn.functional import interpolate

Interpolation = Literal["bicubic", "bilinear"]


def resize(image: torch.Tensor, height: int, width: int, interpolation: Interpolation = "bicubic") -> torch.Tensor:
    """Resize uint8 (3, H, W) to (3, height, width).

    torch's antialiased uint8 kernel follows Pillow's and is about three times as fast; on pixels that lie
    channels-last, as decoders leave them, it needs no copy.
    """
    if image.shape[1:] == (height, width):
        return image
    return interpolate(image[None], size=(height, width), mode=interpolation, antialias=True)[0]
