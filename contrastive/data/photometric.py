"""RandAugment, color jitter and gray: torchvision's kernels on uint8, with draws from the given generator.

torchvision's own random classes draw from torch's global generator, which would tie a picture to what was
drawn before it.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

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


def to_gray(image: torch.Tensor) -> torch.Tensor:
    """Return uint8 (3, H, W) with three equal channels, by the luma weights of ITU-R 601."""
    from torchvision.transforms.v2 import functional as F

    return F.rgb_to_grayscale(image, num_output_channels=3)
