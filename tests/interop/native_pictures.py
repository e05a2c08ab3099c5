"""Twenty pictures from 1:8 to 8:1, coloured noise that is smooth at a distance."""

import numpy as np
from PIL import Image


def pictures() -> list[Image.Image]:
    rng, made = np.random.default_rng(0), []
    for aspect in np.geomspace(1 / 8, 8, 20):
        size = round(60 * aspect**0.5), round(60 / aspect**0.5)
        made.append(Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize(size, Image.BICUBIC))
    return made
