"""Which data to test on what was trained on some data."""

import fnmatch
import json
import os
import re
from collections.abc import Collection
from pathlib import Path

from contrastive.data.sources.derived import split_mixture
from contrastive.data.sources.torchvision_sets import SETS, is_cifar_folder

HELD_OUT = ("test", "val", "valid", "validation", "dev")
"""Names of held-out splits, the preferred one first."""

_TRAIN = re.compile(r"train(?![a-z])")  # 'train-00000', but not 'training'


def held_out_spec(spec: str) -> str | None:
    """Return the specification of the held-out split that belongs to `spec`, the training split; None without one.

        digits, mnist:train, imagenette digits:test, mnist:test, imagenette:val
        FOLDER, FOLDER:train            FOLDER:test, of MNIST's files, CIFAR's, or saved by datasets
        DIR/train                       DIR/test, where there is such a folder; else val, ...
        DIR/train-{00..09}.tar          DIR/test*.tar, where there are such files; else val*.tar, ...
        hf:NAME, hf:NAME:train          hf:NAME:test, where the hub has it

    Splits are looked for by the names of `HELD_OUT`, in that order. Of a mixture, and of data that are no training
    split themselves, there is none.
    """
    spec = spec.strip()
    if not spec or len(split_mixture(spec)[0]) > 1:
        return None
    scheme, _, argument = spec.partition(":")
    if scheme in ("digits", "scenes"):
        return f"{scheme}:test" if argument in ("", "train") else None
    if scheme in SETS:
        return _first(scheme, SETS[scheme].splits) if argument in ("", "train", "trainval") else None
    if scheme == "hf":
        return _on_hub(argument)
    if "://" in spec:
        return None
    folder, split = spec, "train"
    if not os.path.exists(os.path.expanduser(spec)) and ":" in spec:
        folder, _, split = spec.rpartition(":")
    inside = os.path.expanduser(folder)
    if os.path.isdir(inside):
        return _of_folder(folder, inside, split)
    return _sibling(spec)


def _of_folder(folder: str, inside: str, split: str) -> str | None:
    from contrastive.data.sources.arrays import is_idx_folder
    from contrastive.data.sources.hugging_face import is_saved_dataset

    if split != "train":
        return None
    if is_saved_dataset(inside):
        splits = Path(inside) / "dataset_dict.json"
        return _first(folder, json.loads(splits.read_text("utf-8"))["splits"] if splits.is_file() else ())
    if is_idx_folder(inside) or is_cifar_folder(inside):
        return f"{folder}:test"
    return _sibling(folder.rstrip(os.sep))


def _on_hub(argument: str) -> str | None:
    from datasets import get_dataset_split_names

    path, _, split = argument.partition(":")
    if split not in ("", "train"):
        return None
    try:
        return _first(f"hf:{path}", get_dataset_split_names(path))
    except Exception:  # the network's and the hub's; training itself says what is wrong with the name
        return None


def _first(name: str, splits: Collection[str]) -> str | None:
    return next((f"{name}:{split}" for split in HELD_OUT if split in splits), None)


def _sibling(spec: str) -> str | None:
    """What lies beside a folder 'train' or beside files 'train...', of the same kind and named for a held-out split."""
    place, name = os.path.split(spec)
    here = os.path.expanduser(place) or os.curdir
    if not _TRAIN.match(name) or not os.path.isdir(here):
        return None
    suffix = os.path.splitext(name)[1]
    entries = sorted(os.listdir(here))
    for split in HELD_OUT:
        pattern = f"{split}*{suffix}" if suffix else split
        found = fnmatch.filter(entries, pattern)
        if found:
            return os.path.join(place, found[0] if len(found) == 1 else pattern)
    return None
