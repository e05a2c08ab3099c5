"""Random variations of training images; every draw comes from the generator that is handed in.

The kernels are torchvision's. Its random classes are not used: they draw from torch's global generator, which would
tie a picture to what was drawn before it.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from contrastive.data.decode import Box, decode
from contrastive.data.preprocess import NativeSize, resize
from contrastive.errors import UserError
from contrastive.patches import Patches

CROP_ATTEMPTS = 10
MAX_MAGNITUDE = 30
# Largest severity of each operation of RandAugment, and whether its sign is drawn: torchvision's.
_SIGNED = {
    "shear_x": 0.3,
    "shear_y": 0.3,
    "translate_x": 150 / 331,  # of the width
    "translate_y": 150 / 331,
    "rotate": 30.0,  # degrees
    "brightness": 0.9,
    "color": 0.9,
    "contrast": 0.9,
    "sharpness": 0.9,
}
_UNSIGNED = ("identity", "posterize", "solarize", "autocontrast", "equalize")
RAND_AUGMENT_OPS = (*_SIGNED, *_UNSIGNED)


@dataclass(frozen=True)
class AugmentConfig:
    """How training images are varied. In this order: crop, flip, RandAugment, color jitter, gray."""

    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Smallest and largest share of the area that a crop keeps; 1 1 keeps the whole image."""
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    """Smallest and largest width / height of a crop; of native images, as multiples of their own."""
    flip: bool = False
    """Mirror every second image. Off, because captions say 'left' and 'right'."""
    rand_augment_ops: int = 0
    """Operations of RandAugment on each image; 0 for none, 2 is usual."""
    rand_augment_magnitude: int = 9
    """Their strength, from 0 to 30."""
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Largest change of brightness, contrast, saturation (as shares) and hue (as a share of the circle, up to 0.5)."""
    color_jitter_prob: float = 1.0
    """Share of the images whose color is jittered."""
    gray_prob: float = 0.0
    """Share of the images that become gray."""

    def __post_init__(self):
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise UserError(f"crop_scale {self.crop_scale} is not of the form 0 < low <= high <= 1")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise UserError(f"crop_ratio {self.crop_ratio} is not of the form 0 < low <= high")
        if self.rand_augment_ops < 0:
            raise UserError(f"rand_augment_ops {self.rand_augment_ops} is negative; use 0 for none")
        if not 0 <= self.rand_augment_magnitude <= MAX_MAGNITUDE:
            raise UserError(f"rand_augment_magnitude {self.rand_augment_magnitude} is not in 0..{MAX_MAGNITUDE}")
        if min(self.color_jitter) < 0 or self.color_jitter[3] > 0.5:
            raise UserError(f"color_jitter {self.color_jitter}: none may be negative, and the hue's not above 0.5")
        for name in ("color_jitter_prob", "gray_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} {getattr(self, name)} is not in 0..1")


def augment(
    image: bytes | Image.Image | np.ndarray,
    image_size: int | NativeSize,
    config: AugmentConfig,
    rng: np.random.Generator,
) -> torch.Tensor | Patches:
    """Return a random variation of an image, as `decode` takes it, as uint8 (3, S, S), S = image_size; or as Patches.

    The crop is the one of "Going deeper with convolutions" (Szegedy et al., 2014), torchvision's
    RandomResizedCrop. It is drawn before anything is decoded, and cut before anything is resized, so that no
    more is decoded than the crop needs. Nothing is drawn for what is off.

    Raises:
        BadSample: as from `decode` and `NativeSize.of`.
    """
    mirrored = config.flip and rng.random() < 0.5
    choose_crop, native = None, isinstance(image_size, NativeSize)
    if config.crop_scale[0] < 1:
        draws = rng.random((CROP_ATTEMPTS, 4))
        choose_crop = functools.partial(_fit_crop, config=config, draws=draws, to_own_ratio=native)
    pixels = decode(image, choose_crop, image_size.room if native else image_size)
    pixels = resize(pixels, *(image_size.of(*pixels.shape[1:]) if native else (image_size, image_size)))
    if mirrored:
        pixels = pixels.flip(2)
    if config.rand_augment_ops:
        pixels = rand_augment(pixels, config.rand_augment_ops, config.rand_augment_magnitude / MAX_MAGNITUDE, rng)
    if any(config.color_jitter) and rng.random() < config.color_jitter_prob:
        pixels = jitter_color(pixels, config.color_jitter, rng)
    if config.gray_prob and rng.random() < config.gray_prob:
        from torchvision.transforms.v2.functional import rgb_to_grayscale

        pixels = rgb_to_grayscale(pixels, num_output_channels=3)  # by the luma weights of ITU-R 601
    return Patches.of(pixels, image_size.patch_size) if native else pixels


def _fit_crop(height: int, width: int, config: AugmentConfig, draws: np.ndarray, to_own_ratio: bool = False) -> Box:
    """Return the first crop that fits; `draws` has a row of four numbers in 0..1 for each attempt.

    The ratio is log-uniform, the scale uniform. With `to_own_ratio` it is a multiple of the image's.
    """
    low, high = config.crop_scale
    least, most = (ratio * (width / height if to_own_ratio else 1) for ratio in config.crop_ratio)
    log_low, log_high = math.log(least), math.log(most)
    for u_scale, u_ratio, u_top, u_left in draws.tolist():
        area = height * width * (low + (high - low) * u_scale)
        ratio = math.exp(log_low + (log_high - log_low) * u_ratio)
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = int(u_top * (height - crop_height + 1)), int(u_left * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    # No such crop fits: the largest centred one whose ratio is allowed.
    ratio = min(max(width / height, least), most)
    crop_height = min(height, max(1, round(width / ratio)))
    crop_width = min(width, max(1, round(height * ratio)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def rand_augment(image: torch.Tensor, num_ops: int, strength: float, rng: np.random.Generator) -> torch.Tensor:
    """Return uint8 (3, H, W) after `num_ops` random operations, each as strong as `strength` in 0..1 says.

    "RandAugment" (Cubuk et al., 2020) with the operations of torchvision.
    """
    for u_op, u_sign in rng.random((num_ops, 2)).tolist():
        name = RAND_AUGMENT_OPS[int(u_op * len(RAND_AUGMENT_OPS))]
        image = apply_op(image, name, -strength if name in _SIGNED and u_sign < 0.5 else strength)
    return image


def apply_op(image: torch.Tensor, name: str, strength: float) -> torch.Tensor:
    """Return uint8 (3, H, W) after one operation of RandAugment; strength in -1..1."""
    from torchvision.transforms.v2 import functional as F

    value = strength * _SIGNED.get(name, 1.0)
    operations: dict[str, Callable[[], torch.Tensor]] = {
        "identity": lambda: image,
        "shear_x": lambda: F.affine(image, 0.0, [0, 0], 1.0, [math.degrees(math.atan(value)), 0.0], center=[0, 0]),
        "shear_y": lambda: F.affine(image, 0.0, [0, 0], 1.0, [0.0, math.degrees(math.atan(value))], center=[0, 0]),
        "translate_x": lambda: F.affine(image, 0.0, [int(value * image.shape[2]), 0], 1.0, [0.0, 0.0]),
        "translate_y": lambda: F.affine(image, 0.0, [0, int(value * image.shape[1])], 1.0, [0.0, 0.0]),
        "rotate": lambda: F.rotate(image, value),
        "brightness": lambda: F.adjust_brightness(image, 1.0 + value),
        "color": lambda: F.adjust_saturation(image, 1.0 + value),
        "contrast": lambda: F.adjust_contrast(image, 1.0 + value),
        "sharpness": lambda: F.adjust_sharpness(image, 1.0 + value),
        "posterize": lambda: F.posterize(image, 8 - round(4 * value)),
        "solarize": lambda: F.solarize(image, 255 * (1 - value)),
        "autocontrast": lambda: F.autocontrast(image),
        "equalize": lambda: F.equalize(image),
    }
    return operations[name]()


def jitter_color(
    image: torch.Tensor, amounts: tuple[float, float, float, float], rng: np.random.Generator
) -> torch.Tensor:
    """Return uint8 (3, H, W) with brightness, contrast, saturation and hue changed, in a random order.

    Each of the first three is multiplied by a factor in 1 - amount .. 1 + amount, not below 0; the hue is
    turned by -amount .. amount of the circle. An amount of 0 leaves its property alone.
    """
    from torchvision.transforms.v2 import functional as F

    kernels = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    places, changes = rng.random((2, 4)).tolist()
    for which in np.argsort(places, kind="stable").tolist():
        amount = amounts[which]
        low, high = (-amount, amount) if which == 3 else (max(0.0, 1 - amount), 1 + amount)
        if amount:
            image = kernels[which](image, low + (high - low) * changes[which])
    return image
