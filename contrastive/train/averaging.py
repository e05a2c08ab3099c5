"""The mean of the weights of several checkpoints, as a model of its own.

Wortsman et al. 2022, "Model soups"; Kaddour 2022, "Stop Wasting My Time!", for those of one run.
"""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from contrastive.config import flatten
from contrastive.errors import UserError
from contrastive.files import check_writable, read_json, write_manifest, write_new_folder

WEIGHTS = "model.safetensors"


def write_average(checkpoints: Sequence[Path], out: Path) -> None:
    """Write a model folder with the mean of the weights; all else is that of the last one.

    Args:
        checkpoints: whole ones, oldest first.

    Raises:
        UserError: they are of different architectures; `out` is there, or cannot be written.
    """
    if out.exists():
        raise UserError(f"--out {out} exists; give another folder")
    check_writable(out, "give another --out")
    newest = checkpoints[-1]
    expected = flatten(read_json(newest / "config.json"))
    for path in checkpoints:
        found = flatten(read_json(path / "config.json"))
        for name in sorted(expected.keys() | found.keys()):
            if found.get(name) != expected.get(name):
                there = f"{name} is {found.get(name)} in {path}, and {expected.get(name)} in {newest.name}"
                raise UserError(f"{there}: only checkpoints of one architecture have a mean; leave one out")

    def fill(folder: Path) -> None:
        save_file(_mean([path / WEIGHTS for path in checkpoints]), folder / WEIGHTS)
        shutil.copy(newest / "config.json", folder)
        if (newest / "tokenizer").exists():
            shutil.copytree(newest / "tokenizer", folder / "tokenizer")
        write_manifest(folder)

    write_new_folder(out, fill)


def _mean(files: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Return the mean of each tensor, computed in float64, in its own dtype: one at a time, the files are large."""
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
        names = set(opened[-1].keys())
        for file, each in zip(files, opened, strict=True):
            if set(each.keys()) != names:
                raise UserError(f"{file} has other weights than {files[-1]}: {sorted(names ^ set(each.keys()))[0]}")
        means = {}
        for name in names:
            tensors = [each.get_tensor(name) for each in opened]
            means[name] = (sum(tensor.double() for tensor in tensors) / len(tensors)).to(tensors[-1].dtype)
    return means
