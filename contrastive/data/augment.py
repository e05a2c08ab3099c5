"""Random crops and flips of training images; every draw comes from the generator that is handed in."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from contrastive.data.resize import resize
from contrastive.errors import UserError

CROP_ATTEMPTS = 10


@dataclass(frozen=True)
class AugmentConfig:
    """How training images are varied."""

    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Smallest and largest share of the area that a crop keeps; 1 1 keeps the whole image."""
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    """Smallest and largest width / height of a crop."""
    flip: bool = False
    """Mirror every second image. Off, because captions say 'left' and 'right'."""

    def __post_init__(self):
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise UserError(f"crop_scale {self.crop_scale} is not of the form 0 < low <= high <= 1")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise UserError(f"crop_ratio {self.crop_ratio} is not of the form 0 < low <= high")

    @property
    def crops(self) -> bool:
        return self.crop_scale[0] < 1

    def min_side(self, image_size: int) -> int:
        """The short side, in pixels, from which even the smallest crop need not be enlarged."""
        if not self.crops:
            return image_size
        narrowest = max(self.crop_ratio[1], 1 / self.crop_ratio[0], 1.0)
        return math.ceil(image_size * math.sqrt(narrowest / self.crop_scale[0]))


def augment(image: torch.Tensor, image_size: int, config: AugmentConfig, rng: np.random.Generator) -> torch.Tensor:
    """Return a random crop of uint8 (3, H, W) as uint8 (3, S, S), S = image_size.

    The crop is the one of "Going deeper with convolutions" (Szegedy et al., 2014), torchvision's
    RandomResizedCrop. It is cut first, so only what is kept is resized.
    """
    mirrored = config.flip and rng.random() < 0.5
    if config.crops:
        top, left, height, width = _draw_crop(image.shape[1], image.shape[2], config, rng)
        image = image[:, top : top + height, left : left + width]
    image = resize(image, image_size, image_size)
    return image.flip(2) if mirrored else image


def _draw_crop(height: int, width: int, config: AugmentConfig, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of a crop; the ratio is log-uniform, the scale uniform."""
    low, high = config.crop_scale
    log_low, log_high = math.log(config.crop_ratio[0]), math.log(config.crop_ratio[1])
    for u_scale, u_ratio, u_top, u_left in rng.random((CROP_ATTEMPTS, 4)).tolist():
        area = height * width * (low + (high - low) * u_scale)
        ratio = math.exp(log_low + (log_high - log_low) * u_ratio)
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = int(u_top * (height - crop_height + 1)), int(u_left * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    # No such crop fits: the largest centred one whose ratio is allowed.
    ratio = min(max(width / height, config.crop_ratio[0]), config.crop_ratio[1])
    crop_height = min(height, max(1, round(width / ratio)))
    crop_width = min(width, max(1, round(height * ratio)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width
