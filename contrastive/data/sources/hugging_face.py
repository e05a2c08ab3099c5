"""Data sets of the `datasets` library: folders made by `save_to_disk`, and names on the Hugging Face hub."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from contrastive.data.record import fingerprint_of
from contrastive.data.sources.column_source import ColumnSource, TablePart
from contrastive.data.sources.columns import Columns, find_columns, is_text
from contrastive.errors import UserError, did_you_mean, needs, reason_of

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

SPLITS_FILE = "dataset_dict.json"


def is_saved_dataset(folder: str) -> bool:
    """True for a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` made."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", SPLITS_FILE))


def saved_splits(folder: str) -> list[str]:
    """Return the splits of such a folder, none where it has no splits."""
    file = Path(folder, SPLITS_FILE)
    return json.loads(file.read_text("utf-8"))["splits"] if file.is_file() else []


def open_saved(name: str, folder: str, split: str | None, asked: Columns) -> ColumnSource:
    """Open a folder made by `save_to_disk`; one with splits needs `split`, unless it has a single one."""
    needs(name, "datasets")
    from datasets import load_from_disk

    with _library_errors(name):
        if splits := saved_splits(folder):
            folder = os.path.join(folder, _chosen(name, split, splits))
        elif split is not None:
            raise UserError(f"{name}: this folder has no splits; give it without ':{split}'")
        state = json.loads((Path(folder) / "state.json").read_text("utf-8"))
        if not state["_data_files"]:  # the library cannot open what it saved without rows
            raise UserError(f"{name} has no rows")
        dataset = load_from_disk(folder)
    return _from_dataset(name, dataset, folder, asked)


def open_hub(argument: str, asked: Columns) -> ColumnSource:
    """Open 'NAME[:SPLIT]' through `datasets.load_dataset` (split 'train' by default), cached as it caches."""
    path, _, split = argument.partition(":")
    name = f"hf:{argument}"
    if not path:
        raise UserError("hf: needs a name, as 'hf:OWNER/NAME:train'")
    needs(name, "datasets")
    from datasets import load_dataset

    with _library_errors(name):
        dataset = load_dataset(path, split=split or "train")
    source = _from_dataset(name, dataset, "", asked)
    source.reading += "" if split else f"; split train ('{name}:SPLIT' names another)"
    return source


def _chosen(name: str, split: str | None, splits: list[str]) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None:
        raise UserError(f"{name} has the splits {', '.join(splits)}; choose one, as '{name}:{splits[0]}'")
    if split not in splits:
        raise UserError(f"{name}: no split '{split}'; there are {', '.join(splits)}.{did_you_mean(split, splits)}")
    return split


class DatasetColumn:
    """One column of a map-style Dataset: memory-mapped, so that pickling carries paths, not rows."""

    def __init__(self, dataset: Dataset, name: str):
        # The library's own columns select themselves anew for every cell, which reads seven times slower.
        self._column = dataset.select_columns([name]).with_format("arrow")

    def __getitem__(self, row: int) -> pa.Scalar:
        return self._column[row].column(0)[0]


@contextmanager
def _library_errors(name: str) -> Iterator[None]:
    """Whatever a damaged folder, the network, the hub or a builder leads the library to is a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}: datasets cannot open it ({reason_of(error)})") from None


def _from_dataset(name: str, dataset: Dataset, folder: str, asked: Columns) -> ColumnSource:
    import datasets

    if not len(dataset):
        raise UserError(f"{name} has no rows")
    dataset = dataset.with_format(None)
    types = {held.name: held.type for held in dataset.features.arrow_schema}
    columns = find_columns([(held, str(kind)) for held, kind in types.items()], asked, name)
    if folder:
        for held in columns.names():
            _check_offsets(f"{name}: column '{held}'", _in_memory(dataset, held))
    fingerprint, features = _fingerprint(dataset), dataset.features
    pictures = [held for held in (columns.image, columns.mask) if held]
    for held in pictures:
        if isinstance(features[held], datasets.Image):
            # Undecoded: our own decoder sees the bytes, and no picture goes through Pillow twice.
            dataset = dataset.cast_column(held, datasets.Image(decode=False))
    cells = {held: DatasetColumn(dataset, held) for held in (*pictures, *dict(columns.weighted))}
    if columns.label:
        cells[columns.label] = _in_memory(dataset, columns.label)
    images = _in_memory(dataset, columns.image)
    if is_text(types[columns.image]):
        cells[columns.image] = images
    return ColumnSource(
        name=name,
        parts=[TablePart(name, folder, len(dataset))],
        columns=columns,
        types=types,
        cells=cells,
        class_names=tuple(getattr(features.get(columns.label), "names", None) or ()),
        fingerprint=fingerprint,
        embedded=images.chunks,
    )


def _check_offsets(where: str, column: pa.ChunkedArray) -> None:
    """Raise UserError where values lie outside of their Arrow file, which is mapped into memory and believed.

    Texts are taken as bytes: one of bad UTF-8 costs its sample alone. Of bytes only the offsets are read.
    """
    import pyarrow as pa

    def as_bytes(kind: pa.DataType) -> pa.DataType:
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return pa.binary() if pa.types.is_string(kind) else pa.large_binary()
        if pa.types.is_list(kind):
            return pa.list_(kind.value_field.with_type(as_bytes(kind.value_type)))
        return pa.struct([part.with_type(as_bytes(part.type)) for part in kind]) if pa.types.is_struct(kind) else kind

    try:
        column.validate()
        column.cast(as_bytes(column.type)).validate(full=True)
    except pa.ArrowException as error:
        raise UserError(f"{where} is damaged ({reason_of(error)}); copy the folder again") from None


def _in_memory(dataset: Dataset, column: str) -> pa.ChunkedArray:
    """The column as Arrow maps it into memory: only what is touched is read."""
    return dataset.select_columns([column]).with_format("arrow")[:].column(0)


def _fingerprint(dataset: Dataset) -> str:
    """Of the Arrow files and the rows. Not the library's own, which any transformation draws anew."""
    files = sorted(entry["filename"] for entry in dataset.cache_files)
    parts = [f"{os.path.basename(path)} {os.path.getsize(path)}" for path in files]
    return fingerprint_of("\n".join((str(len(dataset)), str(dataset.features), *parts)))
