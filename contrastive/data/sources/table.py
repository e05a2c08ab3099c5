"""Tables of image-text pairs or labelled images: CSV, TSV, JSON lines, Parquet."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from contrastive.data.class_sets import class_names_beside
from contrastive.data.sources.cells import ArrowCells, is_caption_type, is_image_type, is_text_type, read_labels
from contrastive.data.sources.column_source import ColumnSource, TablePart
from contrastive.data.sources.columns import Columns
from contrastive.data.sources.parquet_images import ParquetImages
from contrastive.data.sources.paths import short_names
from contrastive.data.sources.table_files import TableFile, read_table_file
from contrastive.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa


def open_table(name: str, paths: Sequence[str], asked: Columns) -> ColumnSource:
    """Open tables with the same columns, one after the other.

    Image paths are relative to the table's folder. Class names come from the `datasets` metadata of a
    Parquet file, else from classes.json or classnames.txt beside the first table, else they are the distinct
    texts of the label column.

    Raises:
        UserError: an empty or damaged table, a missing column, or one of another kind than it should be.
    """
    files = [read_table_file(path, asked) for path in paths]
    first, rows = files[0], _joined(files)
    columns = first.columns
    if not is_image_type(first.image_type):
        held = first.image_type
        raise UserError(f"{name}: column '{columns.image}' holds {held}; images must be paths or bytes")
    if is_text_type(first.image_type):
        images = _path_cells(rows.column(columns.image), columns.image, name)
    else:
        images = ParquetImages(paths, columns.image)
    for caption in columns.captions:
        held = rows.column(caption).type
        if not is_caption_type(held):
            raise UserError(f"{name}: column '{caption}' holds {held}; captions must be texts or lists of texts")
    labels = class_names = None
    if columns.label:
        known = first.class_names or class_names_beside(Path(first.path).parent)
        labels, class_names = read_labels(rows.column(columns.label), known, name)
    labelled = zip(short_names(paths), files, strict=True)
    return ColumnSource(
        name=name,
        parts=[TablePart(short, os.path.dirname(file.path), file.rows.num_rows) for short, file in labelled],
        images=images,
        captions=[(ArrowCells(rows.column(caption)), weight) for caption, weight in columns.weighted],
        labels=labels,
        class_names=class_names,
        fingerprint=_fingerprint(files, short_names(paths)),
    )


def _joined(files: Sequence[TableFile]) -> pa.Table:
    import pyarrow as pa

    first = files[0]
    for file in files:
        same = file.columns == first.columns and file.image_type == first.image_type
        if not same or file.class_names != first.class_names:
            raise UserError(f"{file.path}: its columns or class names differ from those of {first.path}")
    try:
        return pa.concat_tables([file.rows for file in files], promote_options="permissive")
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{first.path} and the tables after it have different columns ({reason})") from None


def _path_cells(column: pa.ChunkedArray, column_name: str, where: str) -> ArrowCells:
    first = column[0].as_buffer()
    if first is not None and first.to_pybytes().startswith((b"http://", b"https://")):
        raise UserError(
            f"{where}: column '{column_name}' holds web addresses; download the images first, "
            "as img2dataset does into .tar shards"
        )
    return ArrowCells(column)


def _fingerprint(files: Sequence[TableFile], names: Sequence[str]) -> str:
    rows = (f"{name} {file.columns} {file.digest}" for name, file in zip(names, files, strict=True))
    return hashlib.blake2b("\n".join(rows).encode("utf-8", "replace"), digest_size=8).hexdigest()
