"""Renaming of state dicts, and the one way to fill a model: every key and shape exactly, or an error."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from contrastive.errors import UserError

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def renamed(name: str, table: Mapping[str, str]) -> str:
    """Replace each key of the table that occurs in `name` by its value, in the table's order."""
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def read_safetensors(folder: Path, names: Iterable[str] = ("model.safetensors",)) -> dict[str, torch.Tensor]:
    """Read the first of these files that the folder has, sharded ones by their index.json.

    Raises:
        UserError: none of them is there (a pickle is named and refused), or one cannot be read.
    """
    for name in names:
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            files = [folder / name]
        elif index.exists():
            files = _shards(index)
        else:
            continue
        tensors: dict[str, torch.Tensor] = {}
        for file in files:
            try:
                tensors |= load_file(file)
            except (OSError, SafetensorError) as error:
                raise UserError(f"cannot read the weights {file}: {error}") from None
        return tensors
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} has its weights in a pickle ({pickles[0]}), which can run any code when read: save them as "
            f"{next(iter(names))} with the library they come from (safetensors.torch.save_file)"
        )
    raise UserError(f"{folder} has no weights: {' or '.join(names)} is missing")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is damaged: copy it again from where the model came from") from None
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise UserError(f"{index.parent} lacks {absent[0]}, one of {len(files)} files of weights: copy it as well")
    return files


def fill(model: nn.Module, weights: Mapping[str, torch.Tensor], where: Path, theirs: Mapping[str, str]) -> None:
    """Load `weights`, by our names, into the model as float32.

    Args:
        theirs: what each of our names is called in the file, for messages; our own name where it is not in here.

    Raises:
        UserError: a key is missing or unknown, or a shape differs; it names the key of the file and the file.
    """
    own = model.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    for names, what in ((missing, "lacks"), (extra, "has an unknown")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"{where} does not fit the architecture that its config names: it {what} key "
                f"'{theirs.get(names[0], names[0])}'{more}; nothing was loaded"
            )
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"{where}: '{theirs.get(name, name)}' is {tuple(tensor.shape)}, its config asks for "
                f"{tuple(own[name].shape)}"
            )
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
