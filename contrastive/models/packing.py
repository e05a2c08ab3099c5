"""How the tokens of images of any shape lie one behind the other, so that no padding is computed.

B images, N the most patches of one of them, T tokens of all images together.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from contrastive.models.positions import Places
from contrastive.models.segments import Segments
from contrastive.patches import Patches


class Packing(NamedTuple):
    """How the tokens of images lie one behind the other, without padding, in rising order of length.

    Images of one token that nobody asked for may precede them, see `Segments.of`.
    """

    patches: torch.Tensor
    """(T,) int64: which of the B·N patches each token is; 0 where it is none."""
    prefix: torch.Tensor | None
    """(T,) bool: which tokens are no patches but an image's class token; None where there is none."""
    places: Places
    segments: Segments
    order: torch.Tensor
    """(B,) int64: the segment of each image."""

    @classmethod
    def of(cls, images: Patches, num_prefix: int) -> "Packing":
        """Pack the tokens of images whose values are on any device; what is returned is there too."""
        device, most = images.values.device, images.values.shape[1]
        lengths = images.lengths + num_prefix
        segments, by_length, order = Segments.of(lengths, longest=most + num_prefix)
        fillers, own = segments.fillers, int(lengths.sum())
        # What is as long as the batch goes to the device; what is as long as its tokens is made there.
        parts = images.grids, lengths[by_length], by_length, order
        grids, rising, by_length, order = (part.to(device, non_blocking=True) for part in parts)
        segments = segments.to(device, non_blocking=True)
        whose = by_length.repeat_interleave(rising, output_size=own)
        begins = segments.boundaries[order].long()[whose]
        number = torch.arange(fillers, fillers + own, device=device) - begins - num_prefix  # below 0 before the patches
        prefix = F.pad(number < 0, (fillers, 0)) if num_prefix else None
        number = number.clamp(min=0)
        places = Places.of(grids[whose], number)
        patches, *places = (F.pad(part, (fillers, 0)) for part in (whose * most + number, *places))
        return cls(patches, prefix, Places(*places), segments, order)

    def pooled(self, x: torch.Tensor, pool: str) -> torch.Tensor:
        """Return the class token ('class') or the mean of the patches of each image: (T, D) to (B, D)."""
        boundaries = self.segments.boundaries
        if pool == "class":
            return x[boundaries[self.order]]
        lengths = boundaries.diff()[:, None]
        if self.prefix is not None:
            x, lengths = x.masked_fill(self.prefix[:, None], 0), (lengths - 1).clamp(min=1)
        total = torch.segment_reduce(x, "sum", offsets=boundaries, unsafe=True)  # unsafe: no check that waits for a GPU
        return (total / lengths)[self.order]

    def unpacked(self, x: torch.Tensor, images: Patches, num_prefix: int) -> torch.Tensor:
        """Return tokens (T, D) as (B, num_prefix + N, D) in the images' order, 0 behind those of an image."""
        begins = self.segments.boundaries[self.order].long()[:, None]
        number = torch.arange(num_prefix + images.values.shape[1], device=x.device)
        own = number < images.lengths.to(x.device)[:, None] + num_prefix
        return torch.where(own[..., None], x[torch.where(own, begins + number, 0)], 0)
