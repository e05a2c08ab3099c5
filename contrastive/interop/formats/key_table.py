"""A table from the keys of a foreign state dict to ours, read in either direction."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from contrastive.errors import UserError
from contrastive.interop.formats.state_dicts import check_floating


@dataclass(frozen=True)
class TensorNames:
    """One tensor of theirs and what it is called here."""

    theirs: str
    ours: tuple[str, ...]
    """Several names: theirs holds these stacked along the first axis, as queries, keys and values often are."""
    transposed: bool = False
    """Theirs is the matrix (in, out) where a Linear has (out, in)."""
    unit_axes: int = 0
    """Leading axes of length 1 that theirs has and ours has not."""
    scale: str | None = None
    """A vector of theirs that multiplies the layer's output (LayerScale); it is folded into ours."""


Renames = Iterable[tuple[str, str]]
"""Regular expressions and what they become, as `re.sub` takes them, applied one after the other."""


def renamed_table(
    names: Iterable[str],
    renames: Renames,
    transposed: Iterable[str] = (),
    unit_axes: Mapping[str, int] | None = None,
    scales: Renames = (),
) -> list[TensorNames]:
    """Return the table of the tensors of ours that have these names.

    Args:
        renames: from our names to theirs. Names of ours that become one are stacked under it, in their order.
        transposed, unit_axes: of which of their names; see `TensorNames`.
        scales: from their name to that of its scale, where it has one.
    """
    stacked: dict[str, list[str]] = {}
    for name in names:
        stacked.setdefault(_renamed(name, renames), []).append(name)
    table = []
    for theirs, ours in stacked.items():
        scale = _renamed(theirs, scales)
        axes = (unit_axes or {}).get(theirs, 0)
        table.append(TensorNames(theirs, tuple(ours), theirs in transposed, axes, None if scale == theirs else scale))
    return table


def _renamed(name: str, renames: Renames) -> str:
    for pattern, new in renames:
        name = re.sub(pattern, new, name)
    return name


def to_ours(
    table: Iterable[TensorNames], file: Mapping[str, torch.Tensor], where: Path
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors by our names, float32, and what each of our names is called in the file.

    Keys that no entry names keep their names, so that `fill` refuses them; missing ones stay missing.

    Raises:
        UserError: a stacked tensor that cannot be split, a scale that is missing, or a tensor of whole numbers.
    """
    rest, weights, theirs = dict(file), {}, {}
    for entry in table:
        theirs |= dict.fromkeys(entry.ours, entry.theirs)
        if entry.theirs not in file:
            continue
        tensor = rest.pop(entry.theirs)
        check_floating(entry.theirs, tensor, where)
        tensor = tensor.float()
        if entry.scale is not None:
            rest.pop(entry.scale, None)
            tensor = _scaled(tensor, entry, file, where)
        tensor = _without_unit_axes(tensor, entry.unit_axes)
        if entry.transposed and tensor.ndim == 2:
            tensor = tensor.T.contiguous()
        weights |= dict(zip(entry.ours, _parts(tensor, entry, where), strict=True))
    return weights | rest, theirs


def to_theirs(table: Iterable[TensorNames], weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return our tensors by their names, each with its own memory, as safetensors wants them."""
    file = {}
    for entry in table:
        parts = [weights[name] for name in entry.ours]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        tensor = tensor.T if entry.transposed else tensor
        shape = (1,) * entry.unit_axes + tuple(tensor.shape)
        file[entry.theirs] = tensor.detach().reshape(shape).clone(memory_format=torch.contiguous_format)
    return file


def _scaled(tensor: torch.Tensor, entry: TensorNames, file: Mapping[str, torch.Tensor], where: Path) -> torch.Tensor:
    scale = file.get(entry.scale)
    if scale is None or scale.shape != tensor.shape[:1]:
        problem = "is missing" if scale is None else f"is {tuple(scale.shape)}, not {tuple(tensor.shape[:1])}"
        raise UserError(f"{where} does not fit the architecture that its config names: key '{entry.scale}' {problem}")
    return tensor * scale.float().reshape(-1, *[1] * (tensor.ndim - 1))


def _without_unit_axes(tensor: torch.Tensor, count: int) -> torch.Tensor:
    # Another shape is left as it is, for `fill` to report.
    return tensor.reshape(tensor.shape[count:]) if tensor.shape[:count] == (1,) * count else tensor


def _parts(tensor: torch.Tensor, entry: TensorNames, where: Path) -> tuple[torch.Tensor, ...]:
    count = len(entry.ours)
    if count == 1:
        return (tensor,)
    if tensor.ndim == 0 or tensor.shape[0] % count:
        raise UserError(f"{where}: '{entry.theirs}' is {tuple(tensor.shape)}, which cannot hold {count} equal parts")
    return tensor.chunk(count)
