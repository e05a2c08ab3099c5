"""Tables of image-text pairs or labelled images: CSV, TSV, JSON lines, Parquet; all but the last also as .gz.

The small columns (paths, captions, labels) are read at once. Images that a Parquet file holds stay where they are.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from contrastive.data.record import FaultCounts, fingerprint_of, part_and_row
from contrastive.data.sources.column_source import ColumnSource, TablePart
from contrastive.data.sources.columns import Columns, find_columns, is_text
from contrastive.data.sources.delimited import BLOCK_BYTES, read_delimited
from contrastive.data.sources.paths import IMAGE_SUFFIXES, short_names, table_suffix
from contrastive.errors import UserError, reason_of
from contrastive.files import sha256

if TYPE_CHECKING:
    import pyarrow as pa

# Decoded row groups that one process keeps. Rows are compressed by the group, so a set that fits is read
# once, and of a larger one each visit to another group costs its decoding.
CACHE_BYTES = 512 * 2**20
_DAMAGE = (ValueError, TypeError, LookupError, ArithmeticError, RecursionError)
MOST_NESTED = 500  # lists and objects in a line of JSON that is not looked at any further
_MORE = re.compile(rb"\}\s*[^\s,\]}]")  # after the end of an object, unless that is within a text


@dataclass(frozen=True)
class TableFile:
    """One table.

    columns: which were read. rows: those columns, without embedded images. image_type: of the image column,
    text where it holds paths. class_names: from the file itself. digest: changes with the content. notes: what there
    was to decide.
    """

    path: str
    columns: Columns
    rows: pa.Table
    image_type: pa.DataType
    class_names: tuple[str, ...] | None
    digest: str
    notes: tuple[str, ...] = ()
    left_aside: FaultCounts = field(default_factory=FaultCounts)


def open_table(name: str, paths: Sequence[str], asked: Columns) -> ColumnSource:
    """Open tables with the same columns, one after the other.

    Image paths are relative to the table's folder. Class names come from the `datasets` metadata of a
    Parquet file, else as ColumnSource finds them.

    Raises:
        UserError: an empty or damaged table, a missing column, or one of another kind than it should be.
    """
    files = [_read_table(path, asked) for path in paths]
    rows, columns, image = _joined(files), files[0].columns, files[0].columns.image
    cells = {held: rows.column(held) for held in rows.column_names}
    types = {held.name: held.type for held in rows.schema} | {image: files[0].image_type}
    named = list(zip(short_names(paths), files, strict=True))
    parts = [TablePart(short, os.path.dirname(file.path) or os.curdir, file.rows.num_rows) for short, file in named]
    apart = image not in cells  # bytes in Parquet
    for pictures in filter(None, (image, columns.mask)):
        if pictures not in cells:
            cells[pictures] = ParquetImages(paths, pictures)
    source = ColumnSource(
        name=name,
        parts=parts,
        columns=columns,
        types=types,
        cells=cells,
        class_names=files[0].class_names,
        fingerprint=fingerprint_of("\n".join(f"{short} {columns!r} {file.digest}" for short, file in named)),
        embedded=cells[image].groups() if apart else cells[image].chunks,
        notes=tuple(dict.fromkeys(note for file in files for note in file.notes)),
    )
    source.left_aside = FaultCounts()
    for file in files:
        source.left_aside.include(file.left_aside)
    return source


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
        raise UserError(f"{first.path} and the tables after it have different columns ({reason_of(error)})") from None


def _read_table(path: str, asked: Columns) -> TableFile:
    import pyarrow as pa

    suffix = table_suffix(path)
    try:
        if not os.path.getsize(path):
            raise UserError(f"{path} is empty")
        if suffix != ".parquet":
            _check_text(path)
        file = READERS[suffix](path, asked)
    except (OSError, csv.Error, pa.ArrowException, *_DAMAGE) as error:
        hint = "; JSON is read as a list of records, or as one a line" if "json" in suffix else ""
        raise UserError(f"{path}: cannot be read as {suffix[1:]} ({reason_of(error)}){hint}") from None
    if not file.rows.num_rows:
        raise UserError(f"{path} has no rows")
    return file


def _check_text(path: str) -> None:
    """Raise UserError where a file is no UTF-8 text by its first bytes."""
    import pyarrow as pa

    with pa.input_stream(path) as file:
        head = file.read(1000)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or head.count(0) > len(head) / 4:
        raise UserError(f"{path} is UTF-16 text; write it as UTF-8: iconv -f UTF-16 -t UTF-8 OLD > NEW")
    for magic, kind in (
        (b"\x1f\x8b", "gzip: name it .gz"),
        (b"PK", "a workbook or .zip"),
        (b"PAR1", "a .parquet file"),
    ):
        if head.startswith(magic):
            raise UserError(f"{path} is no text, but {kind}")


def _read_csv(path: str, asked: Columns, separator: str = ",") -> TableFile:
    import pyarrow as pa

    columns, rows, notes, left_aside = read_delimited(path, separator, asked)
    return TableFile(path, columns, rows, pa.string(), None, sha256(path), notes, left_aside)


def _read_jsonl(path: str, asked: Columns) -> TableFile:
    import pyarrow as pa
    from pyarrow import json as arrow_json

    if (records := _records(path)) == []:
        raise UserError(f"{path} has no rows")
    if records is not None:
        rows = pa.Table.from_struct_array(pa.array(records))
    else:
        _check_lines(path)
        rows = arrow_json.read_json(path, read_options=arrow_json.ReadOptions(block_size=BLOCK_BYTES))
    columns = find_columns([(held.name, str(held.type)) for held in rows.schema], asked, path)
    rows = rows.select(columns.names())
    return TableFile(path, columns, rows, rows.column(columns.image).type, None, sha256(path))


def _check_lines(path: str) -> None:
    """Raise ValueError for a line at which Arrow ends the process: no object, several, or one nested very deep."""
    import pyarrow as pa

    with io.BufferedReader(pa.input_stream(path)) as file:
        number, line = 1, file.readline(BLOCK_BYTES).removeprefix(b"\xef\xbb\xbf")
        while line:
            if len(line) == BLOCK_BYTES:
                raise ValueError(f"line {number} is longer than {BLOCK_BYTES:,} bytes")
            line = line.strip()
            plain = line.startswith(b"{") and line.endswith(b"}") and line.count(b"{") + line.count(b"[") < MOST_NESTED
            sure = not line or (plain and not _MORE.search(line))
            if not sure and not isinstance(json.loads(line.decode("utf-8", "replace")), dict):
                raise ValueError(f"line {number} is no object")
            number, line = number + 1, file.readline(BLOCK_BYTES)


def _records(path: str) -> list | None:
    """Return the records of a file that is one JSON; None of one with a record a line.

    They are a list, or the images and annotations of COCO, the images of Karpathy's splits, or captions by path.
    """
    import pyarrow as pa

    with pa.input_stream(path) as file:
        head = file.read(2**20).removeprefix(b"\xef\xbb\xbf").lstrip()
        is_list = head.startswith(b"[")
        if not is_list and (table_suffix(path) != ".json" or re.match(rb"\{.*\}\s*\n\s*\{", head)):  # a record a line
            return None
        file.seek(0)
        try:
            held = json.loads(file.read())
        except json.JSONDecodeError:
            if is_list:
                raise
            return None
    if is_list:
        return held
    if not isinstance(held, dict):
        raise ValueError("it holds neither a list nor an object")
    if isinstance(images := held.get("images"), list):
        if "annotations" not in held:
            return images
        names = {image["id"]: image["file_name"] for image in images}
        return [{"image": names[each["image_id"]], "caption": each["caption"]} for each in held["annotations"]]
    if all(name.lower().endswith(IMAGE_SUFFIXES) for name in held):
        return [{"image": name, "caption": text if isinstance(text, list) else [text]} for name, text in held.items()]
    return [held]


def _read_parquet(path: str, asked: Columns) -> TableFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, memory_map=True) as file:
        schema = file.schema_arrow
        columns = find_columns([(held.name, str(_plain(held.type))) for held in schema], asked, path)
        image_type = _plain(schema.field(columns.image).type)
        pictures = {
            name for name in (columns.image, columns.mask) if name and not is_text(_plain(schema.field(name).type))
        }
        wanted = [name for name in columns.names() if name not in pictures]
        # A table of no columns would have no rows.
        rows = file.read(columns=wanted) if wanted else pa.table({"": pa.nulls(file.metadata.num_rows)})
    rows = rows.cast(pa.schema([(held.name, _plain(held.type)) for held in rows.schema]))
    return TableFile(path, columns, rows, image_type, _hub_class_names(schema, columns.label), _footer_digest(path))


READERS = {
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, separator="\t"),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".ndjson": _read_jsonl,
    ".json": _read_jsonl,
    ".txt": _read_csv,
}
"""What reads a table, by its suffix."""


def _plain(column_type: pa.DataType) -> pa.DataType:
    """The type of the values where they are stored by number (pandas' categories)."""
    import pyarrow as pa

    return column_type.value_type if pa.types.is_dictionary(column_type) else column_type


def _hub_class_names(schema: pa.Schema, label: str | None) -> tuple[str, ...] | None:
    """The names of a ClassLabel, as `datasets` writes them into the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"] if features[label]["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _footer_digest(path: str) -> str:
    """Of the file's size and its footer, which holds the place, size and range of every column of every group."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(-8, os.SEEK_END)
        footer_bytes = int.from_bytes(file.read(4), "little")
        file.seek(-8 - footer_bytes, os.SEEK_END)
        return hashlib.sha256(f"{size} ".encode() + file.read(footer_bytes)).hexdigest()


class ParquetImages:
    """Cells of one column, read by row group when first touched; nothing is held before that.

    Args:
        paths: of the Parquet files. column: its name.
        cache_bytes: how much of decoded row groups a process keeps, the last used ones.
    """

    def __init__(self, paths: Sequence[str], column: str, cache_bytes: int = CACHE_BYTES):
        import pyarrow.parquet as pq

        self._column, self._cache_bytes = column, cache_bytes
        self._groups, sizes = [], []
        for path in paths:
            metadata = pq.read_metadata(path)
            self._groups += [(path, group) for group in range(metadata.num_row_groups)]
            sizes += [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self._decoded: dict[int, pa.ChunkedArray] = {}

    def __getitem__(self, row: int) -> pa.Scalar:
        number, row = part_and_row(self._ends, row)
        return self._group(number)[row]

    def groups(self) -> Iterator[pa.Array]:
        """All cells, one row group after the other; none is kept."""
        for number in range(len(self._groups)):
            yield from self._read(number).chunks

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_decoded": {}}

    def _group(self, number: int) -> pa.ChunkedArray:
        decoded = self._decoded.pop(number, None)
        if decoded is None:
            decoded = self._read(number)
            held = decoded.nbytes + sum(group.nbytes for group in self._decoded.values())
            while self._decoded and held > self._cache_bytes:
                held -= self._decoded.pop(next(iter(self._decoded))).nbytes
        self._decoded[number] = decoded  # last: the most recently used
        return decoded

    def _read(self, number: int) -> pa.ChunkedArray:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path, group = self._groups[number]
        try:
            # Opened anew: no file is shared with a forked worker. One thread: workers are the parallelism.
            with pq.ParquetFile(path, memory_map=True) as file:
                return file.read_row_group(group, columns=[self._column], use_threads=False).column(0)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: row group {group} cannot be read ({reason_of(error)})") from None


def columns_of(path: str) -> list[str]:
    """Return the names of the columns of a table, none where it cannot be read as one."""
    suffix = os.path.splitext(path)[1].lower()
    try:
        if suffix == ".parquet":
            from pyarrow.parquet import read_schema

            return read_schema(path).names
        if suffix not in (".csv", ".tsv", ".txt", ".jsonl", ".json"):
            return []
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            first = file.read(2**20) if suffix.startswith(".json") else file.readline(2**20)
        if suffix.startswith(".json"):  # a record a line, or a list of them
            return list(json.JSONDecoder().raw_decode(first.lstrip("[ \r\n\t"))[0])
        return re.split(r"[,\t;|]", first.replace('"', "").strip())
    except (OSError, ValueError, TypeError):  # Arrow's own errors are among them
        return []
