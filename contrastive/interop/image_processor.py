"""Preprocessing as VLM code calls it: like a function, or like an image processor of transformers."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import torch
from PIL import Image

from contrastive.data.preprocess import Preprocess, PreprocessConfig
from contrastive.errors import UserError
from contrastive.interop.bundle import Absent

Picture = Image.Image | np.ndarray | bytes


class ImageProcessor:
    """Exactly the pixels of `contrastive.load(PATH).preprocess`, under several names.

    processor(image)                                  # (3, H, W) float32; of a list (B, 3, H, W)
    processor(images, return_tensors="pt")["pixel_values"]               # (B, 3, H, W), as LLaVA calls it
    processor.preprocess(image, return_tensors="pt")["pixel_values"][0]  # (3, H, W)

    An image is a PIL image, the bytes of a file, or an array (H, W, 3) uint8. `size` and `crop_size` cannot be
    written to, for that would change nothing: `encoder.set_input_size` changes both tower and pixels.
    """

    def __init__(self, preprocess: Preprocess | Absent):
        self._preprocess = preprocess

    def __call__(
        self, images: Picture | list[Picture], return_tensors: str | None = None
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Preprocess one image or several; see the class. An image that cannot be read raises BadSample."""
        if return_tensors not in (None, "pt"):
            raise UserError(f"return_tensors is {return_tensors!r}; 'pt' is what there is")
        several = isinstance(images, (list, tuple))
        if not several and return_tensors is None:
            return self._preprocess(images)
        pixels = torch.stack([self._preprocess(image) for image in (images if several else [images])])
        return pixels if return_tensors is None else {"pixel_values": pixels}

    preprocess = __call__

    def with_size(self, size: tuple[int, int]) -> "ImageProcessor":
        """The same for another (height, width) in pixels. Where it cannot be made, use says so."""
        if isinstance(self._preprocess, Absent):
            return self
        config, (height, width) = self.config, size
        if size == config.size:
            return self
        short = None
        if config.short_side is not None and config.cut != "corner":  # a corner was cut to whole patches: now it is
            short = round(config.short_side * height / config.size[0])
        try:
            changed = replace(config, image_size=height if height == width else size, short_side=short)
        except UserError as error:
            message = f"this model's preprocessing cannot make {height}×{width}: {error}"
            return ImageProcessor(Absent(f"{message}; make the pixels yourself, or set encoder.preprocess"))
        return ImageProcessor(Preprocess(changed))

    @property
    def config(self) -> PreprocessConfig:
        """All options."""
        return self._preprocess.config

    @property
    def image_mean(self) -> tuple[float, float, float]:
        """Mean of each channel, where white is 1."""
        return self.config.mean

    @property
    def image_std(self) -> tuple[float, float, float]:
        """What divides each channel."""
        return self.config.std

    @property
    def crop_size(self) -> Mapping[str, int]:
        """height and width of what comes out."""
        height, width = self.config.size
        return MappingProxyType({"height": height, "width": width})

    @property
    def size(self) -> Mapping[str, int]:
        """As `crop_size`; of squares also shortest_edge, which LLaVA reads: what the image is scaled to."""
        height, width = self.config.size
        square = {"shortest_edge": self.config.short_side or height} if height == width else {}
        return MappingProxyType({"height": height, "width": width, **square})
