"""Weights out of files, into a model (every key and shape exactly, or an error), and out of a model again.

Also the table from the keys of a foreign state dict to ours, read in either direction.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from contrastive.errors import UserError
from contrastive.interop.bundle import tensors_in

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_safetensors(folder: Path, names: Iterable[str] = ("model.safetensors",)) -> dict[str, torch.Tensor]:
    """Read the first of these files that the folder has, sharded ones by their index.json.

    Raises:
        UserError: none of them is there (a pickle is named and refused), or one cannot be read.
    """
    for name in names:
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return tensors_in(folder / name)
        if index.exists():
            return _sharded(index)
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} has its weights in a pickle ({pickles[0]}), which can run any code when read: save them as "
            f"{next(iter(names))} with the library they come from (safetensors.torch.save_file)"
        )
    raise UserError(f"{folder} has no weights: {' or '.join(names)} is missing")


def check_floating(name: str, tensor: torch.Tensor, where: Path) -> None:
    """Raise UserError where a weight is not of floating point numbers: it is a quantized one, or something else."""
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(
            f"{where}: '{name}' is {kind}, not of floating point numbers: take weights that are not quantized"
        )


def _sharded(index: Path) -> dict[str, torch.Tensor]:
    """The tensors of all files that the index names, each from the file that it is said to be in."""
    damaged = UserError(f"{index} is damaged: copy it again from where the model came from")
    try:
        file_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(file_of.values()))
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise damaged from None
    if not names or not all(isinstance(name, str) and name.endswith(".safetensors") for name in names):
        raise damaged
    for name in names:
        if "/" in name or "\\" in name:
            raise UserError(f"{index} names '{name}': weights have to lie beside it; mend the name or copy it again")
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent} lacks {name}, one of {len(names)} files of weights: copy it as well")
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        found = tensors_in(index.parent / name)
        named = {key for key, file in file_of.items() if file == name}
        if found.keys() != named:
            key = min(found.keys() ^ named)
            what = f"holds '{key}', which is not in it by" if key in found else f"has no '{key}', which is in it by"
            raise UserError(
                f"{index.parent / name} {what} {index.name}: copy both again from where the model came from"
            )
        tensors |= found
    return tensors


def fill(model: nn.Module, weights: Mapping[str, torch.Tensor], where: Path, theirs: Mapping[str, str]) -> None:
    """Load `weights`, by our names, into the model as float32.

    Args:
        theirs: what each of our names is called in the file, for messages; our own name where it is not in here.

    Raises:
        UserError: a key is missing or unknown, a shape differs, or a tensor is of whole numbers or not finite; it names
            the key of the file and the file.
    """
    own, called = model.state_dict(), {name: theirs.get(name, name) for name in weights}
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    for names, what in ((missing, "lacks"), (extra, "has an unknown")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"{where} does not fit the architecture that its config names: it {what} key "
                f"'{theirs.get(names[0], names[0])}'{more}; nothing was loaded"
            )
    for name, tensor in weights.items():
        shape, wanted = tuple(tensor.shape), tuple(own[name].shape)
        if shape != wanted:
            raise UserError(f"{where}: '{called[name]}' is {shape}, its config asks for {wanted}")
        check_floating(called[name], tensor, where)
        if not tensor.isfinite().all():
            raise UserError(
                f"{where}: '{called[name]}' holds NaN or infinity: the model is broken, take it from before"
            )
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's weights as they are written: by our names, float32, on the CPU.

    Fixed positions, which no state dict holds, are among them: other libraries have learned ones alone.
    """
    state = model.state_dict()
    if hasattr(model, "image_tower"):
        state["image_tower.position_embedding"] = model.image_tower.position_embedding
    return {name: tensor.detach().cpu().float() for name, tensor in state.items()}


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
        if tensor.shape[: entry.unit_axes] == (1,) * entry.unit_axes:  # another shape is for `fill` to report
            tensor = tensor.reshape(tensor.shape[entry.unit_axes :])
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


def patch_convolution(weight: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Return a Linear over (row, column, channel), (D, P·P·3), as the convolution (D, 3, P, P) that ours is."""
    if weight.ndim != 2 or weight.shape[1] != 3 * patch_size**2:
        return weight  # for `fill` to report
    return weight.unflatten(1, (patch_size, patch_size, 3)).permute(0, 3, 1, 2).contiguous()


def patch_linear(weight: torch.Tensor) -> torch.Tensor:
    """Return the convolution (D, 3, P, P) of a patch embedding as a Linear over (row, column, channel)."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _scaled(tensor: torch.Tensor, entry: TensorNames, file: Mapping[str, torch.Tensor], where: Path) -> torch.Tensor:
    scale = file.get(entry.scale)
    if scale is None or scale.shape != tensor.shape[:1]:
        problem = "is missing" if scale is None else f"is {tuple(scale.shape)}, not {tuple(tensor.shape[:1])}"
        raise UserError(f"{where} does not fit the architecture that its config names: key '{entry.scale}' {problem}")
    return tensor * scale.float().reshape(-1, *[1] * (tensor.ndim - 1))


def _parts(tensor: torch.Tensor, entry: TensorNames, where: Path) -> tuple[torch.Tensor, ...]:
    count = len(entry.ours)
    if count == 1:
        return (tensor,)
    if tensor.ndim == 0 or tensor.shape[0] % count:
        raise UserError(f"{where}: '{entry.theirs}' is {tuple(tensor.shape)}, which cannot hold {count} equal parts")
    return tensor.chunk(count)
