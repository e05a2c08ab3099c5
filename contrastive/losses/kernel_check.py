"""Whether the Triton kernels can be trusted here: each is tried on a small tile before a loss first uses it.

A kernel is compiled for the GPU, driver and Triton at hand, and a compiler can fail, or be wrong. Then a warning is
given, once, and the losses are plain torch for the rest of the process: slower, and the same numbers.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from contrastive.log import warn
from contrastive.losses.all_pairs import Tile
from contrastive.losses.checks import Duplicates

ROWS, COLUMNS = 144, 272
"""A block of each configuration fits in along both, and a part of a further one."""
TOLERANCE = 0.02
"""Relative and absolute, of numbers that are about 1: what bfloat16 and TF32 round is a fifth of it."""

_found: dict[tuple, str | None] = {}
"""What is wrong with each kernel tried in this process, None where nothing is."""


def checked_kernels(of: Callable, like: torch.Tensor, rows: int, columns: int, duplicates: Duplicates, gradient: bool):
    """Return `TritonTiles(like, rows, columns)` to stand in for `of`, or None where its kernel does not work.

    The first call for a kind of tile tries the kernel in each configuration that could be chosen for a large one, and
    waits for the device. It compiles what the loss is about to use anyway. Later calls look the answer up. Once a
    kernel has failed, no other is tried.

    Ranks need not agree, and do not ask each other. The answer decides how a rank computes its own tiles; what it
    exchanges with others, and when, and in which types, is the same either way.

    Args:
        of: one of the tile functions in sigmoid.py and softmax.py. like: features (n, E) that give device, type and E.
        rows, columns: size of the largest tile. gradient: whether ∂/∂z is wanted of `sigmoid_tile` too.

    Raises:
        torch.OutOfMemoryError: no room, which is not the kernel's fault.
        torch.AcceleratorError: a kernel that read or wrote outside its memory leaves the process's GPU unusable.
    """
    key = of, like.device, like.dtype, like.shape[1], duplicates, gradient, torch.backends.cuda.matmul.fp32_precision
    if key not in _found and not any(_found.values()):
        _found[key] = _problem(of, like, duplicates, gradient)
        if _found[key]:
            warn(
                f"a Triton kernel of the loss does not work here ({_found[key]}): plain torch instead, which is slower"
            )
    if any(_found.values()):
        return None
    from contrastive.losses.triton_tiles import TritonTiles  # needs a GPU, and takes a while to import

    return TritonTiles(like, rows, columns)


def _problem(of: Callable, like: torch.Tensor, duplicates: Duplicates, gradient: bool) -> str | None:
    """Return what is wrong with the kernel behind `of` in one line, or None."""
    tile, arguments = _small_tile(like, duplicates), _arguments(of, like.device, gradient)
    exact = replace(tile, x=tile.x.double(), y=tile.y.double(), buffers=[])
    expected = of(exact, *(a.double() if torch.is_tensor(a) else a for a in arguments))
    try:
        # Here, since Triton may not be installed, or not load.
        from contrastive.losses.triton_tiles import TOO_LARGE, TritonTiles, configurations, configured

        too_large, tried = None, 0
        for configuration in configurations(of.__name__, like):
            try:
                with configured(of.__name__, configuration):
                    found = of(replace(tile, kernels=TritonTiles(like, ROWS, COLUMNS)), *arguments)
            except TOO_LARGE as error:  # for this GPU: it will not be chosen
                too_large = error
                continue
            tried += 1
            if not _agree(found, expected):
                return f"{of.__name__} gives wrong numbers with {configuration}"
        if not tried:
            raise too_large
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton, its compiler, the assembler, the driver: all kinds
        return f"{of.__name__}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None


def _small_tile(like: torch.Tensor, duplicates: Duplicates) -> Tile:
    """Unit rows in the type of `like`; some columns are matched, some captions equal, and no random state is used."""
    dim = like.shape[1]
    count = torch.arange((ROWS + COLUMNS) * dim, dtype=torch.float64, device=like.device)
    rows = torch.nn.functional.normalize((count.square() * 0.7).sin().view(-1, dim), dim=1).to(like.dtype)
    diagonal = 20
    row_ids, column_ids = (torch.arange(n, device=like.device) - shift for n, shift in ((ROWS, 0), (COLUMNS, diagonal)))
    ids = () if duplicates == "negative" else (row_ids % 97, column_ids % 97)
    return Tile(rows[:ROWS], rows[ROWS:], diagonal, duplicates, *ids)


def _arguments(of: Callable, device: torch.device, gradient: bool) -> tuple:
    """What `of` takes beside its tile, such that all it returns is about 1: no entry's error is lost in another's."""
    scale = torch.tensor(5.0, device=device)
    if of.__name__ == "sigmoid_tile":
        return scale, torch.tensor(-1.0, device=device), gradient
    if of.__name__ == "statistics_tile":
        return (scale,)
    vectors = (torch.linspace(-1, 1, n, device=device) for n in (ROWS, COLUMNS, ROWS))
    return scale, *vectors


def _agree(found: tuple | torch.Tensor, expected: tuple | torch.Tensor) -> bool:
    pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
    return all(
        ours is right if right is None else torch.allclose(ours.double(), right, rtol=TOLERANCE, atol=TOLERANCE)
        for ours, right in pairs
    )
