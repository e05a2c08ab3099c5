"""Data sets of the `datasets` library: folders made by `save_to_disk`, and names on the Hugging Face hub."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contrastive.data.class_sets import class_names_beside
from contrastive.data.record import fingerprint_of
from contrastive.data.sources.columns import (
    Cells,
    Columns,
    ColumnSource,
    TablePart,
    check_types,
    find_columns,
    read_labels,
)
from contrastive.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset


def is_saved_dataset(folder: str) -> bool:
    """True for a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` made."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))


def open_saved(name: str, folder: str, split: str | None, asked: Columns) -> ColumnSource:
    """Open a folder made by `save_to_disk`; one with splits needs `split`, unless it has a single one."""
    from datasets import load_from_disk

    splits_file = Path(folder) / "dataset_dict.json"
    try:
        if splits_file.is_file():
            splits = json.loads(splits_file.read_text("utf-8"))["splits"]
            folder = os.path.join(folder, _chosen(name, split, splits))
        elif split is not None:
            raise UserError(f"{name}: this folder has no splits; give it without ':{split}'")
        state = json.loads((Path(folder) / "state.json").read_text("utf-8"))
        if not state["_data_files"]:  # the library cannot open what it saved without rows
            raise UserError(f"{name} has no rows")
        dataset = load_from_disk(folder)
    except Exception as error:  # whatever a damaged folder leads the library to
        raise _cannot_open(name, error) from None
    return _from_dataset(name, dataset, folder, asked)


def open_hub(argument: str, asked: Columns) -> ColumnSource:
    """Open 'NAME[:SPLIT]' through `datasets.load_dataset` (split 'train' by default), cached as it caches."""
    from datasets import load_dataset

    path, _, split = argument.partition(":")
    name = f"hf:{argument}"
    if not path:
        raise UserError("hf: needs a name, as 'hf:OWNER/NAME:train'")
    try:
        dataset = load_dataset(path, split=split or "train")
    except Exception as error:  # the network, the hub, the builder: all of theirs
        raise _cannot_open(name, error) from None
    return _from_dataset(name, dataset, None, asked)


def _chosen(name: str, split: str | None, splits: list[str]) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None:
        raise UserError(f"{name} has the splits {', '.join(splits)}; choose one, as '{name}:{splits[0]}'")
    if split not in splits:
        raise UserError(f"{name}: no split '{split}'; there are {', '.join(splits)}.{did_you_mean(split, splits)}")
    return split


def _cannot_open(name: str, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    return UserError(f"{name}: datasets cannot open it ({reason})")


def _from_dataset(name: str, dataset: Dataset, folder: str | None, asked: Columns) -> ColumnSource:
    import datasets

    if not len(dataset):
        raise UserError(f"{name} has no rows")
    dataset = dataset.with_format(None)
    columns = find_columns(dataset.column_names, asked, name)
    fingerprint = _fingerprint(dataset)
    features = dataset.features
    if isinstance(features[columns.image], datasets.Image):
        # Undecoded: our own decoder sees the bytes, and no picture goes through Pillow twice.
        dataset = dataset.cast_column(columns.image, datasets.Image(decode=False))
    check_types(columns, {field.name: field.type for field in dataset.features.arrow_schema}, name)
    labels = class_names = None
    if columns.label:
        known = getattr(features[columns.label], "names", None)
        table = dataset.select_columns([columns.label]).with_format("arrow")[:]
        known = tuple(known) if known else folder and class_names_beside(Path(folder))
        labels, class_names = read_labels(table.column(0), known, name)
    return ColumnSource(
        name=name,
        parts=[TablePart(name, folder or "", len(dataset))],
        images=_cells(dataset, columns.image),
        captions=[(_cells(dataset, caption), weight) for caption, weight in columns.weighted],
        labels=labels,
        class_names=class_names,
        fingerprint=fingerprint,
    )


def _cells(dataset: Dataset, column: str) -> Cells:
    """One column of a map-style Dataset: memory-mapped, so that pickling carries paths, not rows."""
    return partial(_cell, dataset.select_columns([column]), column)


def _cell(dataset: Dataset, column: str, row: int) -> Any:
    return dataset[row][column]


def _fingerprint(dataset: Dataset) -> str:
    """Of the Arrow files and the rows. Not the library's own, which any transformation draws anew."""
    files = sorted(entry["filename"] for entry in dataset.cache_files)
    parts = [f"{os.path.basename(path)} {os.path.getsize(path)}" for path in files]
    return fingerprint_of("\n".join((str(len(dataset)), str(dataset.features), *parts)))
