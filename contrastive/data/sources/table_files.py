"""Read the small columns of one table file: paths, captions, labels. Embedded images stay where they are."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from contrastive.data.sources.cells import is_text_type
from contrastive.data.sources.columns import Columns, find_columns
from contrastive.errors import UserError
from contrastive.files import sha256

if TYPE_CHECKING:
    import pyarrow as pa

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_BLOCK_BYTES = 32 * 2**20  # no row may be longer: captions of megabytes do occur


@dataclass(frozen=True)
class TableFile:
    """One table.

    columns: which were read. rows: those columns, without embedded images. image_type: of the image column,
    text where it holds paths. class_names: from the file itself. digest: changes with the content.
    """

    path: str
    columns: Columns
    rows: pa.Table
    image_type: pa.DataType
    class_names: tuple[str, ...] | None
    digest: str


def read_table_file(path: str, asked: Columns) -> TableFile:
    """Read a .csv, .tsv, .jsonl or .parquet. A damaged one, one without rows, a missing column: UserError."""
    import pyarrow as pa

    suffix = os.path.splitext(path)[1].lower()
    try:
        if not os.path.getsize(path):
            raise UserError(f"{path} is empty")
        if suffix == ".parquet":
            file = _read_parquet(path, asked)
        else:
            file = _read_jsonl(path, asked) if suffix == ".jsonl" else _read_csv(path, asked, _DELIMITERS[suffix])
    except (OSError, csv.Error, pa.ArrowException) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path}: cannot be read as {suffix[1:]} ({reason})") from None
    if not file.rows.num_rows:
        raise UserError(f"{path} has no rows")
    return file


def _read_csv(path: str, asked: Columns, delimiter: str) -> TableFile:
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import csv as arrow_csv

    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        columns = find_columns(next(csv.reader(file, delimiter=delimiter), []), asked, path)
    # As bytes, then unchecked: a row of bad UTF-8 costs one sample when it is read, not the table now.
    raw = {name: pa.binary() for name in (columns.image, *columns.captions)}
    rows = arrow_csv.read_csv(
        path,
        read_options=arrow_csv.ReadOptions(block_size=_BLOCK_BYTES),
        parse_options=arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=arrow_csv.ConvertOptions(include_columns=columns.names(), column_types=raw),
    )
    unchecked = pc.CastOptions(target_type=pa.string(), allow_invalid_utf8=True)
    for name in raw:
        rows = rows.set_column(rows.column_names.index(name), name, rows.column(name).cast(options=unchecked))
    return TableFile(path, columns, rows, pa.string(), None, sha256(path))


def _read_jsonl(path: str, asked: Columns) -> TableFile:
    from pyarrow import json as arrow_json

    rows = arrow_json.read_json(path, read_options=arrow_json.ReadOptions(block_size=_BLOCK_BYTES))
    columns = find_columns(rows.column_names, asked, path)
    rows = rows.select(columns.names())
    return TableFile(path, columns, rows, rows.column(columns.image).type, None, sha256(path))


def _read_parquet(path: str, asked: Columns) -> TableFile:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, memory_map=True) as file:
        schema = file.schema_arrow
        columns = find_columns(schema.names, asked, path)
        image_type = _plain(schema.field(columns.image).type)
        wanted = [name for name in columns.names() if name != columns.image or is_text_type(image_type)]
        rows = file.read(columns=wanted)
    for place, name in enumerate(rows.column_names):
        rows = rows.set_column(place, name, rows.column(name).cast(_plain(rows.column(name).type)))
    return TableFile(path, columns, rows, image_type, _hub_class_names(schema, columns.label), _footer_digest(path))


def _plain(column_type: pa.DataType) -> pa.DataType:
    """The type of the values where they are stored by number (pandas' categories)."""
    import pyarrow as pa

    return column_type.value_type if pa.types.is_dictionary(column_type) else column_type


def _hub_class_names(schema: pa.Schema, label: str | None) -> tuple[str, ...] | None:
    """The names of a ClassLabel, as `datasets` writes them into the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features[label]["names"]) if features[label]["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None


def _footer_digest(path: str) -> str:
    """Of the file's size and its footer, which holds the place, size and range of every column of every group."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(-8, os.SEEK_END)
        footer_bytes = int.from_bytes(file.read(4), "little")
        file.seek(-8 - footer_bytes, os.SEEK_END)
        return hashlib.sha256(f"{size} ".encode() + file.read(footer_bytes)).hexdigest()
