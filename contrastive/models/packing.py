"""Sequences without padding, one behind the other: attention within each of them, and how images of any shape lie so.

S sequences, T tokens of all of them, H heads, D width; B images, N the most patches of one of them.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from contrastive.models.patch_embedding import Places
from contrastive.patches import Patches

# Compiled, what has another shape for every batch would be compiled for each. Loaded late, as it takes a second.
_uncompiled = functools.cache(torch.compiler.disable)


class Runs:
    """How many sequences have which length. No tuple: torch.compile makes another code for each length of one."""

    def __init__(self, rising: torch.Tensor):
        lengths, self.numbers = (part.tolist() for part in rising.unique_consecutive(return_counts=True))
        self.sizes = [length * number for length, number in zip(lengths, self.numbers, strict=True)]


class Segments(NamedTuple):
    """Sequences without padding, one behind the other in rising order of length: S of them in (T, D)."""

    runs: Runs
    boundaries: torch.Tensor
    """(S + 1,) int32: where each begins, and T."""
    longest: int
    """None is longer."""
    fillers: int
    """The first of them, of one token, that nobody asked for."""

    @classmethod
    def of(cls, lengths: torch.Tensor, longest: int) -> "tuple[Segments, torch.Tensor, torch.Tensor]":
        """Lay out sequences of these lengths, (B,) int64 on the CPU, 1 to `longest`.

        A few fillers precede them, so that T is a multiple of about a sixteenth of itself: products, kernels and memory
        are then met again. Of any T, oneDNN makes a new program every step, and freed memory fits nothing.

        Returns:
            The segments; (B,) int64, the sequences in their order, those of equal length as they came; and (B,) int64,
            the segment of each sequence.
        """
        rising, order = lengths.sort(stable=True)
        total = int(lengths.sum())
        fillers = -total % max(1, 2 ** (total.bit_length() - 5))
        rising = F.pad(rising, (fillers, 0), value=1)
        segments = cls(Runs(rising), F.pad(rising.cumsum(0), (1, 0)).int(), longest, fillers)
        return segments, order, order.argsort() + fillers

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Segments":
        return self._replace(boundaries=self.boundaries.to(device, non_blocking=non_blocking))


def attend(q, k, v, dropout: float, is_causal: bool, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Attention of a batch: (B, M, H, D/H) to (B, N, H, D/H) twice, to (B, M, H, D/H); mask as `Extent` has it."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, H, N, D/H)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
    return attended.transpose(1, 2)


def attend_within(q, k, v, segments: Segments, dropout: float, is_causal: bool) -> torch.Tensor:
    """Attention of each segment to itself alone: (T, H, D/H) each, to the same; or of one query each, (S, H, D/H).

    By one kernel where there is one; else segments of equal length, which lie together, are a batch without padding.
    """
    if _has_varlen_kernel(q, dropout):
        from torch.nn.attention.varlen import varlen_attn  # which imports much

        window = (-1, 0 if is_causal else -1)
        ends, longest = segments.boundaries, segments.longest
        of_queries = (ends, longest) if len(q) == len(k) else (torch.arange(len(ends), device=q.device).int(), 1)
        return varlen_attn(q, k, v, of_queries[0], ends, of_queries[1], longest, window_size=window)
    by_length = _uncompiled(_attend_by_length) if torch.compiler.is_compiling() else _attend_by_length
    return by_length(q, k, v, segments, dropout, is_causal)


def _attend_by_length(q, k, v, segments: Segments, dropout: float, is_causal: bool) -> torch.Tensor:
    numbers, sizes = segments.runs.numbers, segments.runs.sizes
    of_queries = q.split(sizes if len(q) == len(k) else numbers)
    attended = []
    for number, *run in zip(numbers, of_queries, k.split(sizes), v.split(sizes), strict=True):
        batch = (part.unflatten(0, (number, -1)) for part in run)
        attended.append(attend(*batch, dropout, is_causal).flatten(0, 1))
    return torch.cat([q[:0], *attended])  # there may be no sequence


def _has_varlen_kernel(q: torch.Tensor, dropout: float) -> bool:
    """Whether torch's flash attention over packed sequences can be had for queries (T, H, D/H)."""
    fits = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return fits and not dropout and torch.cuda.get_device_capability(q.device) >= (8, 0)


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
