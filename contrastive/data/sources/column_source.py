"""Rows of a table, of whichever kind, as samples: what their cells say, and which rows are one sample."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from contrastive.data.class_sets import class_names_beside
from contrastive.data.record import SAMPLES_ASKED, BadSample, Record, Source, check_index, fingerprint_of, part_and_row
from contrastive.data.sources.columns import CAPTION_KEYS, Columns, shared_out, texts_in
from contrastive.data.sources.paths import MAX_IMAGE_BYTES, read_image_file
from contrastive.data.sources.row_images import TablePart, byte_keys, find_images, path_keys, rows_by_image
from contrastive.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

_LIST_TEXT = re.compile(r"""\s*\[\s*(["']|\]\s*$)""")
_LIST_CELL = re.compile(r"\[.*\]")
_NO_NUMBER = ("nan", "na", "n/a", "null", "none")


class Cells(Protocol):
    """One column, by row. Picklable, safe to fork."""

    def __getitem__(self, row: int) -> pa.Scalar: ...


class ColumnSource(Source):
    """Rows of an image column with captions, labels or both.

    Args:
        name: the specification, for messages.
        parts: where the rows come from, in order.
        columns: those to read, as `find_columns` has them.
        types: of those columns.
        cells: those columns. An image is bytes, a path, relative to the part's folder, or {'bytes', 'path'}. Captions
            are what `texts_in` makes of a cell, or of the list that its text prints ("['a dog', 'a pet']"), weighed as
            `shared_out` does. Labels and paths are pa.ChunkedArrays, in memory.
        class_names: those that come with the labels; else they are those of classes.json or classnames.txt in the
            folder of the first part, else the distinct texts of the label column.
        embedded: the cells of images that are not paths, for one pass. Rows of one image are one sample where there are
            captions, at the place of the first.
        notes: what else there was to decide, for `reading`.

    Raises:
        UserError: a column of another kind than it should be, a label without a class name, several of one image.
    """

    columns_read = ("image_column", "caption_column")

    def __init__(
        self,
        name: str,
        parts: Sequence[TablePart],
        columns: Columns,
        types: Mapping[str, pa.DataType],
        cells: Mapping[str, Cells],
        class_names: tuple[str, ...] | None,
        fingerprint: str,
        embedded: Iterable[pa.Array] = (),
        notes: Sequence[str] = (),
    ):
        _check_types(columns, types, name)
        self.name, self._parts, self._images_in, notes = name, tuple(parts), columns.image, list(notes)
        self._ends = np.cumsum([part.num_rows for part in parts])
        self._rows = self._row_ends = None  # of the rows of each sample, where they end; None: a row is a sample
        self._images, keys = cells[columns.image], None
        self.masked, self._masks_in = columns.mask is not None, columns.mask
        self._masks = cells[columns.mask] if columns.mask else None
        if self.masked and parts[0].folder and not columns.label:  # whose names those are, where there is one
            self.mask_names = class_names_beside(parts[0].folder)
        if is_text(types[columns.image]):
            self._images, said = find_images(name, columns.image, self._images, parts)
            notes += said
            keys = path_keys(self._images, parts) if columns.weighted else None
        elif columns.weighted:
            keys = byte_keys(embedded)
        self._captions = [
            (cells[caption], weight, is_text(types[caption]) and _hold_lists(name, caption, cells[caption], len(self)))
            for caption, weight in columns.weighted
        ]
        notes += ["lists written as texts"] * any(lists for *_, lists in self._captions)
        if keys is not None and (found := rows_by_image(keys)):
            self._rows, self._row_ends = found
            notes.append(f"{len(self._rows):,} rows, {len(self):,} images")
        # A run that began when such data were read otherwise is not resumed on them.
        self.fingerprint = fingerprint_of(f"{fingerprint} {notes}") if notes else fingerprint
        if columns.label:
            known = class_names or (parts[0].folder and class_names_beside(parts[0].folder)) or None
            labels, self.class_names, fault = _read_labels(cells[columns.label], known, name)
            if fault and not columns.weighted:
                raise UserError(f"{name} has neither captions nor labels: column '{columns.label}' holds {fault}")
            if fault:
                notes.append(f"no labels: column '{columns.label}' holds {fault}")
                columns = replace(columns, label=None)
            self._labels = labels if labels is None or self._rows is None else self._one_each(labels)
        self.reading = "; ".join((str(columns), *notes))

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._rows is None else len(self._row_ends)

    def __getitem__(self, index: int) -> Record:
        rows = self._rows_of(index)
        part, key = self._locate(rows[0])
        image = self._image_bytes(_read(self._images, rows[0], key), part.folder, key, self._images_in)
        captions, weights = self._weighted_captions(rows)
        mask = self._mask_bytes(rows[0], part.folder, key) if self.masked else None
        weights = weights if len(self._captions) > 1 else None
        return Record(key, image, captions, self.label(index), weights, mask=mask)

    def _mask_bytes(self, row: int, folder: str, key: str) -> bytes | None:
        try:
            return self._image_bytes(_read(self._masks, row, key), folder, key, self._masks_in)
        except BadSample:  # which does not spoil it for those who ask for no masks
            return None

    def image_paths(self) -> set[str]:
        """Return the paths of the image column, which holds paths, in one spelling."""
        return {os.path.normpath(os.fsdecode(path)) for path in self._images.cast("binary").to_pylist() if path}

    def captions(self, index: int) -> tuple[str, ...]:
        return self._weighted_captions(self._rows_of(index))[0]

    def _weighted_captions(self, rows: Sequence[int]) -> tuple[tuple[str, ...], tuple[float, ...]]:
        captions = []
        for cells, _, lists in self._captions:
            texts = []
            for row in rows:
                key = self._locate(row)[1]
                value = _read(cells, row, key, keep=len(rows) > 1)
                found = texts_in(_listed(value) if lists and value else value)
                if not all(isinstance(text, str) for text in found):
                    raise BadSample("bad_caption", key)
                texts += found
            captions.append(texts)
        return shared_out(captions, [weight for _, weight, _ in self._captions])

    def _image_bytes(self, value: Any, folder: str, key: str, column: str) -> bytes:
        if isinstance(value, dict):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, bytes):
            if len(value) > MAX_IMAGE_BYTES:
                raise BadSample("too_large", key)
            return value
        if not value:
            raise BadSample("missing_image", f"{key}: column '{column}' is empty")
        path = os.path.join(folder, value)
        return read_image_file(path, f"{key}: column '{column}', {os.path.abspath(path)}")

    def _rows_of(self, index: int) -> Sequence[int]:
        index = check_index(self, index)
        if self._rows is None:
            return (index,)
        return self._rows[self._row_ends[index - 1] if index else 0 : self._row_ends[index]].tolist()

    def _locate(self, row: int) -> tuple[TablePart, str]:
        """The part of the row, and its key: the part's label and the row in it, counted from 0."""
        number, row = part_and_row(self._ends, row)
        part = self._parts[number]
        return part, f"{part.label}:{row}"

    def _one_each(self, labels: np.ndarray) -> np.ndarray:
        """The label of each sample. A row without one says nothing."""
        labels, starts = labels[self._rows], np.r_[0, self._row_ends[:-1]]
        most = np.maximum.reduceat(labels, starts)
        least = np.minimum.reduceat(np.where(labels < 0, np.iinfo(np.int64).max, labels), starts)
        several = np.flatnonzero((least < most) & (most >= 0))
        if len(several):
            keys = ", ".join(self._locate(row)[1] for row in self._rows_of(several[0])[:5])
            raise UserError(
                f"{self.name}: rows of one image have different labels, as {keys} ({len(several):,} images); give one "
                "label an image, or leave the column out"
            )
        return most


def is_text(column_type: pa.DataType) -> bool:
    from pyarrow import types

    return types.is_string(column_type) or types.is_large_string(column_type) or types.is_string_view(column_type)


def _check_types(columns: Columns, types: Mapping[str, pa.DataType], where: str) -> None:
    """Raise UserError where the image column holds no images, or a caption column no texts."""
    from pyarrow import types as kinds

    held = types[columns.image]
    # The image format of `datasets` is a struct of bytes and path.
    packed = kinds.is_struct(held) and any(field.name == "bytes" and not is_text(field.type) for field in held)
    if not (packed or is_text(held) or kinds.is_binary(held) or kinds.is_large_binary(held)):
        raise UserError(
            f"{where}: column '{columns.image}' holds {held}; images must be paths, bytes or an Image feature"
        )
    for caption, _ in columns.weighted:
        inner = held = types[caption]
        while inner is not None and kinds.is_nested(inner):
            known = [name for name in CAPTION_KEYS if kinds.is_struct(inner) and inner.get_field_index(name) >= 0]
            inner = inner.field(known[0]).type if known else getattr(inner, "value_type", None)
        if inner is None or not (is_text(inner) or kinds.is_null(inner)):
            raise UserError(
                f"{where}: column '{caption}' holds {held}; captions must be texts or lists of texts; of a dict "
                f"{' or '.join(CAPTION_KEYS)} is read; name another column with caption_column"
            )


def _hold_lists(where: str, column: str, cells: Cells, num_rows: int) -> bool:
    """Whether the texts of a caption column are lists: all of the first 100. UserError where they cannot be read."""
    texts = []
    for row in range(min(SAMPLES_ASKED, num_rows)):
        try:
            texts.append(_read(cells, row, ""))
        except BadSample:
            continue
    texts = [text for text in texts if text and text.strip()]
    if not texts or not all(map(_LIST_TEXT.match, texts)):
        return False
    for text in texts:
        if not all(isinstance(part, str) for part in texts_in(_listed(text))):
            raise UserError(
                f"{where}: column '{column}' holds {text[:60]!r}, a list of texts neither as JSON nor as Python"
            )
    return True


def _listed(text: str) -> Any:
    """The list that `text` is, else something that is no caption."""
    try:
        return json.loads(text)
    except ValueError:
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [False]
        # What numpy prints has no commas, and its texts would run together.
        return value if repr(value) == text.strip() else [False]


def _read_labels(
    column: pa.ChunkedArray, class_names: tuple[str, ...] | None, where: str
) -> tuple[np.ndarray | None, tuple[str, ...] | None, str]:
    """Return (labels int64, -1 for none; class names; ''), or (None, None, what the column holds instead of labels).

    Whole numbers are labels, as 1, 1.0, '1' or True; null, NaN and what is below 0 is none. Other texts are class
    names, of `class_names` or else of the sorted distinct texts.

    Raises:
        UserError: a label outside `class_names`, or bad UTF-8.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_binary(column.type) or is_text(column.type):
        try:
            column = pc.utf8_trim_whitespace(column.cast(pa.string()))
            present = sorted(name for name in pc.unique(column).to_pylist() if name)
            if several := next(filter(partial(_says_several, known=set(present)), present), ""):
                return None, None, f"several labels in a cell, as '{several}'; a label is one whole number or one text"
            column, class_names = _numbered(column, present, class_names, where)
        except (pa.ArrowInvalid, UnicodeDecodeError):
            raise UserError(f"{where}: the labels are not UTF-8 text") from None
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_null(column.type)):
        return None, None, f"{column.type}; a label is one whole number or one text"
    try:
        labels = pc.fill_null(column.cast(pa.int64()), -1).to_numpy()
    except pa.ArrowInvalid:
        return None, None, f"{column.type}s that are no whole numbers"
    if labels.max(initial=-1) < 0:
        return None, None, "not a single label"
    if class_names and labels.max() >= len(class_names):
        raise UserError(f"{where}: label {labels.max()}, but there are {len(class_names)} class names")
    return np.maximum(labels, -1), class_names, ""


def _says_several(label: str, known: Collection[str]) -> bool:
    """Whether a label is a list: in brackets, of others that occur, or with bars between any that does."""
    parts = [part.strip() in known for part in re.split(r"[|;,]", label)]
    return bool(_LIST_CELL.fullmatch(label)) or (len(parts) > 1 and (all(parts) or ("|" in label and any(parts))))


def _numbered(
    column: pa.ChunkedArray, present: Sequence[str], class_names: tuple[str, ...] | None, where: str
) -> tuple[pa.ChunkedArray, tuple[str, ...] | None]:
    """Return texts, all those `present`, as numbers: what they say, where all say numbers or 'true' and 'false'; else
    their place among the class names."""
    import pyarrow as pa
    import pyarrow.compute as pc

    unknown = [name for name in present if name not in (class_names or ())]
    said = [name for name in present if name.lower() not in _NO_NUMBER]
    if unknown and said:
        numbers = pc.if_else(pc.is_in(column, pa.array(said, pa.string())), column, None)
        if {name.lower() for name in said} <= {"true", "false"}:
            return pc.equal(pc.utf8_lower(numbers), "true"), class_names
        try:
            return numbers.cast(pa.float64()), class_names
        except pa.ArrowInvalid:
            pass  # names of classes
    if class_names and unknown:
        raise UserError(
            f"{where}: label '{unknown[0]}' is not among the {len(class_names)} class names."
            f"{did_you_mean(unknown[0], class_names)}"
        )
    class_names = class_names or tuple(present)
    return pc.index_in(column, value_set=pa.array(class_names, pa.string())), class_names


def _read(cells: Cells, row: int, key: str, keep: bool = False) -> Any:
    """Return the value. keep: a text of bad UTF-8 as one that the loader refuses, not the whole sample with it."""
    value = cells[row]
    try:
        return value.as_py()
    except UnicodeDecodeError:  # bad UTF-8, which Arrow keeps until it is read
        if keep and hasattr(value, "as_buffer"):
            return value.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")
        raise BadSample("bad_utf8", key) from None
