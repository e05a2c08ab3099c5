"""Images of any shape as patches: what a tower with `native` takes in place of pixels (SigLIP 2's NaFlex).

B images, N the most patches of one of them, P the side of a patch in pixels, T tokens of all images together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.data._utils.collate import default_collate_fn_map

from contrastive.errors import UserError


@dataclass(frozen=True)
class Patches:
    """Images cut into patches, and how many rows and columns of them each has.

    It goes where a tensor of pixels does: to another device, into micro-batches, indexed by image. torch's
    DataLoader makes batches of single images as `batch` does.
    """

    values: torch.Tensor
    """(B, N, P·P·3): patches row by row, pixels row by row in each, the channel last; uint8, or normalised floats. What
    follows an image's own patches is never looked at."""
    grids: torch.Tensor
    """(B, 2) int64, on the CPU: rows and columns of patches."""

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, images) -> "Patches":
        of_grids = images.cpu() if isinstance(images, torch.Tensor) else images
        return Patches(self.values[images], self.grids[of_grids])

    @property
    def lengths(self) -> torch.Tensor:
        """(B,) int64, on the CPU: patches of each image."""
        return self.grids.prod(dim=-1)

    @property
    def mask(self) -> torch.Tensor:
        """(B, N) bool, on the device of the values: which patches are the image's own."""
        lengths = self.lengths.to(self.values.device)
        return torch.arange(self.values.shape[-2], device=lengths.device) < lengths[..., None]

    def to(self, *args, **kwargs) -> "Patches":
        """Return them with the values on another device or in another dtype, as `Tensor.to` takes them."""
        return Patches(self.values.to(*args, **kwargs), self.grids)

    def pin_memory(self) -> "Patches":
        return Patches(self.values.pin_memory(), self.grids)

    def record_stream(self, stream) -> None:
        self.values.record_stream(stream)

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """As Siglip2's processor in transformers gives them and its model takes them, by name."""
        return {"pixel_values": self.values, "pixel_attention_mask": self.mask.int(), "spatial_shapes": self.grids}

    def check(self, patch_size: int) -> None:
        """Raise UserError where they are no batch of normalised patches of this side in pixels."""
        if self.values.ndim != 3 or self.values.shape[-1] != 3 * patch_size**2:
            told = (
                f"{tuple(self.values.shape)} are not (B, N, {3 * patch_size**2}), of {patch_size}×{patch_size} pixels"
            )
            raise UserError(f"Patches of {told} each; of one image [None]")
        if not self.values.is_floating_point():
            raise UserError(f"Patches are {self.values.dtype}, not normalised floats: bundle.preprocess makes them")

    def cut(self) -> "Patches":
        """Return them without what no image of the batch needs."""
        if torch.compiler.is_exporting():  # a graph is for images of any shape
            return self
        return Patches(self.values[:, : int(self.lengths.max())] if len(self) else self.values[:, :0], self.grids)

    def chunk(self, n: int) -> list["Patches"]:
        """Return n parts of as many images each, as `Tensor.chunk`, each cut to its own longest."""
        parts = zip(self.values.chunk(n), self.grids.chunk(n), strict=True)
        return [Patches(*part).cut() for part in parts]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Patches":
        """Return them changed by what takes and returns pixels (..., 3, H, W), each by itself."""
        pixels = self.values.unflatten(-1, (-1, 1, 3)).movedim(-1, -3)  # (B, N, 3, P·P, 1)
        return Patches(change(pixels).movedim(-3, -1).flatten(-3), self.grids)

    @staticmethod
    def none(patch_size: int) -> "Patches":
        """Return a batch of no images."""
        return Patches(torch.empty(0, 0, 3 * patch_size**2, dtype=torch.uint8), torch.empty(0, 2, dtype=torch.int64))

    @staticmethod
    def of(pixels: torch.Tensor, patch_size: int) -> "Patches":
        """Cut images (..., 3, H, W), whose sides are multiples of the patch size, into patches."""
        height, width = pixels.shape[-2:]
        grid = height // patch_size, width // patch_size
        cut = pixels.unflatten(-1, (grid[1], patch_size)).unflatten(-3, (grid[0], patch_size))  # (..., 3, h, P, w, P)
        cut = cut.movedim(-5, -1).transpose(-4, -3)  # (..., h, w, P, P, 3)
        return Patches(cut.flatten(-3).flatten(-3, -2), torch.tensor(grid).expand(*pixels.shape[:-3], 2))

    @staticmethod
    def batch(images: Sequence["Patches"], collate_fn_map=None) -> "Patches":
        """Return single images, (n, P·P·3) each, as a batch; what follows the shorter ones is 0.

        collate_fn_map: as torch's collate hands it over.
        """
        most = max(len(one.values) for one in images)
        values = [F.pad(one.values, (0, 0, 0, most - len(one.values))) for one in images]
        return Patches(torch.stack(values), torch.stack([one.grids for one in images]))

    def pixels(self, channels: int = 3) -> torch.Tensor:
        """Return one image, values (N, P·P·3), as (3, H, W); of what has other channels so many."""
        rows, columns = self.grids.tolist()
        side = round((self.values.shape[-1] / channels) ** 0.5)
        cut = self.values[: rows * columns].view(rows, columns, side, side, channels)
        return cut.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2)


default_collate_fn_map[Patches] = Patches.batch


def one_by_one(images: torch.Tensor | Patches, channels: int = 3) -> list[torch.Tensor]:
    """Return the pixels (3, H, W) of each image of a batch, or of what has so many channels; of one channel (H, W)."""
    if not isinstance(images, Patches):
        return list(images)
    return [images[row].pixels(channels).squeeze(0) for row in range(len(images))]
