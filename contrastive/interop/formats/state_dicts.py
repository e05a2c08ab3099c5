"""Weights out of files, into a model (every key and shape exactly, or an error), and out of a model again."""

import json
from collections.abc import Iterable, Mapping
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
