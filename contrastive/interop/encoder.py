"""`contrastive.load_image_encoder`: the image tower of any model that we can read, pixels as VLM code asks for them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from contrastive.data.preprocess import ImageLike, Preprocess, PreprocessConfig
from contrastive.errors import UserError
from contrastive.interop.bundle import Absent
from contrastive.interop.loading import read, usable
from contrastive.models.image_encoder import ImageEncoder


def load_image_encoder(
    path: str | Path,
    layer: int | Iterable[int] = -2,
    norm: bool = False,
    pool: str | None = None,
    *,
    keep_prefix: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
) -> ImageEncoder:
    """Load an image tower up to a layer, with its preprocessing; no tokenizer and no text tower stay.

    Args:
        path: as `contrastive.load` takes it: a run, a checkpoint, a model folder of ours, transformers, open_clip or
            timm, or a hub name. A classifier's tower will do.
        layer, norm, pool, keep_prefix: what comes out; see `ImageEncoder`. The default is LLaVA's: the patch tokens
            before the last block.
        device, dtype: of the weights, and of the output. torch.bfloat16 halves the memory.

    Returns:
        The encoder in eval mode, all of it trainable (`freeze()` it, or parts). `encoder.preprocess(image)` makes
        its pixels; where the folder lacks the files for that, the use of it says what is missing.

    Raises:
        UserError: no model there, none with an image tower, no such layer, or a pooling that the tower has not.
    """
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UserError("dtype has to be torch.float32, torch.bfloat16 or torch.float16, or its name")
    device = usable(device)
    # A tokenizer can take seconds to import and to read, and no image encoder needs one.
    bundle = read(path, with_tokenizer=False)
    bundle.check_image_tower("there is nothing to encode images with")
    try:
        encoder = ImageEncoder(
            bundle.model.image_tower,
            layer,
            norm,
            pool,
            keep_prefix=keep_prefix,
            preprocess=ImageProcessor(bundle.preprocess),
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return encoder.eval().to(device, dtype)


class ImageProcessor:
    """Exactly the pixels of `contrastive.load(PATH).preprocess`, under several names.

    processor(image)                                  # (3, H, W) float32; of a list (B, 3, H, W); native ones Patches
    processor(images, return_tensors="pt")["pixel_values"]               # (B, 3, H, W), as LLaVA calls it
    processor.preprocess(image, return_tensors="pt")["pixel_values"][0]  # (3, H, W)

    `size` and `crop_size` cannot be written to, for that would change nothing: `encoder.set_input_size`
    changes both tower and pixels.
    """

    def __init__(self, preprocess: Preprocess | Absent, original: Preprocess | Absent | None = None):
        self._preprocess = preprocess
        self._original = preprocess if original is None else original  # sizes are made from it, not one from another

    def __call__(
        self, images: ImageLike | Sequence[ImageLike], return_tensors: str | None = None
    ) -> torch.Tensor | Any:
        """As `Preprocess.__call__`."""
        return self._preprocess(images, return_tensors)

    preprocess = __call__

    def with_size(self, size: tuple[int, int]) -> "ImageProcessor":
        """The same for another (height, width) in pixels. Where it cannot be made, use says so."""
        if isinstance(self._original, Absent):
            return self
        config, (height, width) = self._original.config, size
        if size == config.size:
            return ImageProcessor(self._original)
        short = None
        if config.short_side is not None and config.cut != "corner":  # a corner was cut to whole patches: now it is
            short = round(config.short_side * height / config.size[0])
        try:
            changed = replace(config, image_size=height if height == width else size, short_side=short)
        except UserError as error:
            message = f"this model's preprocessing cannot make {height}×{width}: {error}"
            return ImageProcessor(Absent(f"{message}; make the pixels yourself"), self._original)
        return ImageProcessor(Preprocess(changed), self._original)

    def with_patches(self, most: int) -> "ImageProcessor":
        """The same for native images of at most so many patches; UserError for pixels of a fixed size."""
        return ImageProcessor(Preprocess(replace(self.config, patches=most)))

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
