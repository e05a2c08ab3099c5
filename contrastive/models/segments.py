"""Sequences without padding, and attention within each of them.

S sequences, T tokens of all of them, H heads, D width.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

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
