"""What an image goes through before the image tower, in evaluation and for users: fixed size, normalised."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from contrastive.data.decode import decode
from contrastive.data.record import BadSample
from contrastive.errors import UserError
from contrastive.option_types import Positive
from contrastive.patches import Patches
from contrastive.words import no_attribute

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)

MOST_PIXELS = 4096  # a side: no model takes more, and what a file says is not made whatever memory it takes
MOST_PATCHES = 2**14  # likewise of a native image: attention of as many tokens to each other
Interpolation = Literal["bicubic", "bilinear"]
Kernel = Literal["bicubic", "bilinear", "nearest-exact"]
Cut = Literal["round", "floor", "corner"]


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """How images become pixels in evaluation and for users; training images are cut and resized by `data.augment`."""

    resize: Literal["squash", "crop", "native"] = "squash"
    """squash: scale both sides to the size (SigLIP); crop: scale the short side, then cut the centre (CLIP); native:
    keep the aspect, as patches (SigLIP 2's NaFlex), which goes with model.image.native."""
    mean: tuple[float, float, float] = SIGLIP_MEAN
    """Subtracted from each channel, where white is 1; from training images too."""
    std: tuple[float, float, float] = SIGLIP_STD
    """Divides each channel after that."""
    interpolation: Interpolation = "bicubic"
    """How both are resized. SigLIP 2 was trained with bilinear."""
    short_side: int | None = None
    """What the short side (squash: both sides) is scaled to before the cut (timm's crop_pct); none: to the size."""
    patches: Positive[int | None] = None
    """native: the most patches of an image in evaluation; none: as many as a square of image_size has."""
    cut: Cut = "round"
    """Which part is kept: the centre, where an odd margin is halved by round (to even, as torchvision and open_clip) or
    floor (transformers), or the corner at the top left (patches that do not fill an image)."""

    def __post_init__(self):
        if self.cut not in ("round", "floor", "corner"):
            raise UserError(f"unknown cut '{self.cut}'; use 'round', 'floor' or 'corner'")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise UserError(f"unknown interpolation '{self.interpolation}'; use 'bicubic' or 'bilinear'")
        if self.resize not in ("squash", "crop", "native"):
            raise UserError(f"unknown resize '{self.resize}'; use 'squash', 'crop' or 'native'")
        if self.resize == "native" and (self.short_side is not None or self.cut != "round"):
            raise UserError("resize 'native' cuts nothing: leave short_side and cut out")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3:
                raise UserError(f"preprocess {name} {values} has to be three numbers, of red, green and blue")
        if min(self.std) <= 0:
            raise UserError(f"preprocess std {self.std} has to be positive in each channel")

    def at(self, image_size: int, patch_size: int | None = None) -> "PreprocessConfig":
        """These options for a model of this size in pixels; for a native one with its patch size."""
        return PreprocessConfig(image_size, patch_size if self.resize == "native" else None, **vars(self))


@dataclass(frozen=True)
class PreprocessConfig(PreprocessOptions):
    """How images become pixels of a model's size: what a model folder keeps."""

    image_size: int | tuple[int, int] = 224
    """Side of the square in pixels, or (height, width). Of native images what the positions are made for."""
    patch_size: int | None = None
    """Of native images: side of a patch in pixels."""

    def __post_init__(self):
        super().__post_init__()
        height, width = self.size
        self._check_patches()
        if max(height, width, self.short_side or 0) > MOST_PIXELS:
            raise UserError(f"image size {self.image_size} is beyond {MOST_PIXELS} pixels a side, the most there is")
        if min(height, width) < 1:
            raise UserError(f"image size {self.image_size} is not positive; set it to 1 or more")
        if self.resize == "crop" and height != width:
            raise UserError(f"resize 'crop' makes squares, not {height}×{width}; use 'squash'")
        if self.short_side is not None and (height != width or self.short_side < height):
            raise UserError(
                f"short_side {self.short_side} needs a square image size, not {height}×{width}, that is no larger; "
                "leave it out"
            )

    def _check_patches(self) -> None:
        if self.resize != "native":
            if self.patch_size is not None or self.patches is not None:
                raise UserError(f"patch_size and patches are for resize 'native', not '{self.resize}'; leave them out")
        elif self.patch_size is None or self.patch_size < 1 or any(side % self.patch_size for side in self.size):
            raise UserError(f"resize 'native' needs a patch_size that divides image size {self.image_size}")
        elif self.patches is not None and not 0 < self.patches <= MOST_PATCHES:
            raise UserError(f"preprocess patches {self.patches}: an image has 1 to {MOST_PATCHES:,}")

    @property
    def most_patches(self) -> int:
        """Of a native image: how many patches it has at most."""
        height, width = self.size
        return self.patches or (height // self.patch_size) * (width // self.patch_size)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what comes out; not of native images, whose size is their own."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def options(self) -> PreprocessOptions:
        """All of it but the size, for a run that sees images as this model does."""
        return PreprocessOptions(**{field.name: getattr(self, field.name) for field in fields(PreprocessOptions)})


ImageLike = Image.Image | np.ndarray | bytes | str | Path


class PixelBatch(dict):
    """What `return_tensors="pt"` gives, by attribute too, as transformers' batches.

    {'pixel_values': (B, 3, H, W)}; of native images (B, N, P·P·3), with 'pixel_attention_mask' int32 (B, N) and
    'spatial_shapes' int64 (B, 2), as Siglip2's processor has them.
    """

    @property
    def pixel_values(self) -> torch.Tensor:
        """(B, 3, H, W) or (B, N, P·P·3), float32."""
        return self["pixel_values"]

    def to(self, *args, **kwargs) -> "PixelBatch":
        """The same on another device, the pixels in another dtype too, as `Tensor.to` takes them."""
        pixels = self.pixel_values.to(*args, **kwargs)
        others = {name: value.to(pixels.device) for name, value in self.items() if name != "pixel_values"}
        return PixelBatch(pixel_values=pixels, **others)


class Preprocess:
    """Turn images into the pixels a model was trained on.

    `preprocess(image)` gives float32 (3, S, S), normalised: what a user wants for one image; a list of them gives
    (B, 3, S, S). Of native images both are Patches. Loaders keep the two halves apart, so that images travel as uint8
    and are normalised on the device.
    """

    def __init__(self, config: PreprocessConfig):
        self.config = config

    def __getattr__(self, name: str) -> Any:
        raise no_attribute("bundle", self, name)

    def __call__(
        self, images: ImageLike | Sequence[ImageLike], return_tensors: str | None = None
    ) -> torch.Tensor | Any:
        """Preprocess one image, (3, S, S) float32, or several, (B, 3, S, S); native ones to Patches (Any, to checkers).

        Args:
            images: a PIL image, a file's path or its bytes, an array (H, W, 3) uint8; or a list or tuple of these.
            return_tensors: 'pt' as transformers' processors take it: then {'pixel_values': (B, 3, S, S)}.

        Raises:
            UserError: no such file, or what is no image. BadSample: an image that cannot be read.
        """
        if return_tensors not in (None, "pt"):
            raise UserError(f"return_tensors is {return_tensors!r}; 'pt' is what there is")
        several = isinstance(images, (list, tuple))
        if not several and return_tensors is None:
            return self._one(images)
        if several and not images:
            raise UserError("no images: the list is empty")
        pixels = self.collate([self._one(image) for image in (images if several else [images])])
        if return_tensors is None:
            return pixels
        return PixelBatch(pixels.inputs if isinstance(pixels, Patches) else {"pixel_values": pixels})

    def _one(self, image: ImageLike) -> "torch.Tensor | Patches":
        try:
            return self.normalize(self.pixels(_readable(image)))
        except BadSample as error:
            raise BadSample(error.reason, str(image) if isinstance(image, (str, Path)) else "") from error

    def pixels(self, image: bytes | Image.Image | np.ndarray) -> "torch.Tensor | Patches":
        """Return uint8 RGB (3, S, S), or the Patches of one native image, without augmentation."""
        return self._fitted(decode(image), self.config.interpolation)

    def collate(self, images: "Sequence[torch.Tensor | Patches]") -> "torch.Tensor | Patches":
        """Return what `pixels` made of images as a batch, also of none."""
        if self.config.resize == "native":
            return Patches.batch(images) if images else Patches.none(self.config.patch_size)
        return torch.stack(list(images)) if images else torch.empty(0, 3, *self.config.size, dtype=torch.uint8)

    def mask(self, mask: np.ndarray) -> "torch.Tensor | Patches":
        """Return uint8 (S, S): what `pixels` makes of the picture, of a mask uint8 (H, W); no value is mixed.

        Of native images as Patches of one channel.
        """
        fitted = self._fitted(torch.from_numpy(mask)[None], "nearest-exact")
        return fitted if isinstance(fitted, Patches) else fitted[0]

    def _fitted(self, pixels: torch.Tensor, kernel: Kernel) -> "torch.Tensor | Patches":
        config, (height, width) = self.config, self.config.size
        if config.resize == "native":
            return native_patches(pixels, config.patch_size, config.most_patches, kernel)
        if config.resize == "squash":
            scaled = (config.short_side, config.short_side) if config.short_side else (height, width)
            pixels = resize(pixels, *scaled, kernel)
        else:
            pixels = _resize_short_side(pixels, config.short_side or height, kernel)
        return _cut(pixels, height, width, config.cut)

    def normalize(self, pixels: "torch.Tensor | Patches") -> "torch.Tensor | Patches":
        """Return (pixels / 255 - mean) / std as float32 on the same device; pixels uint8 (..., 3, H, W), or Patches."""
        if isinstance(pixels, Patches):
            return pixels.map(self.normalize)
        mean, std = (_per_channel(values, pixels.device) for values in (self.config.mean, self.config.std))
        # The same operations in the same order as torchvision, so the bits are the same too.
        return (pixels.to(torch.float32) / 255).sub_(mean).div_(std)


def _readable(image: ImageLike) -> bytes | Image.Image | np.ndarray:
    """Return what `decode` takes: a path as the bytes of its file."""
    if isinstance(image, (str, Path)):
        try:
            return Path(image).expanduser().read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot read the image '{image}': {reason}") from None
    if not isinstance(image, (Image.Image, np.ndarray, bytes)):
        kind = type(image).__name__
        raise UserError(f"a {kind} is not an image: give a PIL image, a path, a file's bytes or an array (H, W, 3)")
    return image


@functools.lru_cache(maxsize=32)
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # kept for later calls, which may want gradients
        return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)


def resize(image: torch.Tensor, height: int, width: int, kernel: Kernel = "bicubic") -> torch.Tensor:
    """Resize uint8 (C, H, W) to (C, height, width).

    torch's antialiased uint8 kernel follows Pillow's and is about three times as fast; on pixels that lie
    channels-last, as decoders leave them, it needs no copy.
    """
    if image.shape[1:] == (height, width):
        return image
    return interpolate(image[None], size=(height, width), mode=kernel, antialias=kernel != "nearest-exact")[0]


class NativeSize(NamedTuple):
    """How large native images are made: of patches of this side in pixels, so many of them at most."""

    patch_size: int
    most: int

    def of(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width in pixels that an image is resized to.

        Raises:
            BadSample: 'too_thin', so long for its width that `most` patches in a row cannot show it.
        """
        if max(height, width) > self.most * min(height, width):
            raise BadSample("too_thin")
        rows, columns = native_grid(height, width, self.patch_size, self.most)
        return rows * self.patch_size, columns * self.patch_size

    def room(self, height: int, width: int) -> tuple[int, int]:
        """Return what a picture may be reduced to before: a patch more a side, as its rounded sides may get one."""
        return tuple(side + self.patch_size for side in self.of(height, width))


def native_patches(pixels: torch.Tensor, patch_size: int, most: int, kernel: Kernel = "bicubic") -> Patches:
    """Resize uint8 (C, H, W), its aspect kept as far as patches allow, as transformers' Siglip2 and timm; and cut it.

    BadSample as from `NativeSize.of`.
    """
    return Patches.of(resize(pixels, *NativeSize(patch_size, most).of(*pixels.shape[1:]), kernel), patch_size)


def native_grid(height: int, width: int, patch_size: int, most: int) -> tuple[int, int]:
    """Return rows and columns of patches: those of the largest scale at which they, rounded up, are `most` in all.

    The scale is found by bisection in these steps, because the last digits decide at times.
    """
    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        scale = (low + high) / 2
        fits = math.prod(_whole_patches(side, scale, patch_size) for side in (height, width)) <= most
        low, high = (scale, high) if fits else (low, scale)
    return _whole_patches(height, low, patch_size), _whole_patches(width, low, patch_size)


def _whole_patches(side: int, scale: float, patch_size: int) -> int:
    return max(1, math.ceil(side * scale / patch_size))


def _resize_short_side(pixels: torch.Tensor, size: int, kernel: Kernel) -> torch.Tensor:
    """Keep the aspect ratio; the long side is rounded down, as torchvision and open_clip do."""
    _, height, width = pixels.shape
    if height <= width:
        return resize(pixels, size, int(size * width / height), kernel)
    return resize(pixels, int(size * height / width), size, kernel)


def _cut(pixels: torch.Tensor, height: int, width: int, cut: Cut) -> torch.Tensor:
    top, left = (_offset(whole - kept, cut) for whole, kept in zip(pixels.shape[1:], (height, width), strict=True))
    return pixels[:, top : top + height, left : left + width]


def _offset(margin: int, cut: Cut) -> int:
    if cut == "corner":
        return 0
    return margin // 2 if cut == "floor" else round(margin / 2)  # half to even
