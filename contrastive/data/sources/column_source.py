"""Rows of a table, of whichever kind, as samples: what their cells say, and which rows are one sample."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from contrastive.data.class_sets import class_names_beside
from contrastive.data.record import (
    SAMPLES_ASKED,
    BadSample,
    Record,
    Source,
    check_index,
    evenly_spread,
    fingerprint_of,
    part_and_row,
)
from contrastive.data.sources.columns import Columns, check_types, is_text, listed, read_labels, shared_out, texts_in
from contrastive.data.sources.paths import IMAGE_SUFFIXES, MAX_IMAGE_BYTES, read_image_file
from contrastive.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

SCAN_BYTES = 128 * 2**20
"""Of embedded images: what is read before it is believed that no two rows show the same one."""
# How paths are written that lead nowhere as they stand. '#0' is the number of a caption in Flickr's lists.
_OTHERWISE = ((r"\\", "/", "backslashes taken for '/'"), (r"#\d+$", "", "'#0', '#1', ... taken off the paths"))
_BASE64 = ("data:image/", "/9j/4", "iVBORw0KGgo")
_LIST_TEXT = re.compile(r"""\s*\[\s*(["']|\]\s*$)""")


class TablePart(NamedTuple):
    """Consecutive rows with one origin. label: names it in keys. folder: of relative image paths, '' for none."""

    label: str
    folder: str
    num_rows: int


class ColumnSource(Source):
    """Rows of an image column with captions, labels, masks or several of these.

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
        cells: Mapping[str, Any],
        class_names: tuple[str, ...] | None,
        fingerprint: str,
        embedded: Iterable[pa.Array] = (),
        notes: Sequence[str] = (),
    ):
        check_types(columns, types, name)
        self.name, self._parts, notes, keys = name, tuple(parts), list(notes), None
        self._ends = np.cumsum([part.num_rows for part in parts])
        self._rows = self._row_ends = None  # of the rows of each sample, where they end; None: a row is a sample
        self._image_column, self._mask_column, self.masked = columns.image, columns.mask, columns.mask is not None
        self._pictures = {column: cells[column] for column in (columns.image, columns.mask) if column}
        if self.masked and parts[0].folder and not columns.label:  # whose names those are, where there is one
            self.mask_names = class_names_beside(parts[0].folder)
        if is_text(types[columns.image]):
            paths, said = self._paths_that_lead(cells[columns.image])
            self._pictures[columns.image], notes = paths, notes + said
            keys = path_keys(paths, parts) if columns.weighted else None
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
            labels, self.class_names, fault = read_labels(cells[columns.label], known, name)
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
        rows, mask = self._rows_of(index), None
        _, key = self._locate(rows[0])
        image = self._picture(self._image_column, rows[0])
        captions, weights = self._weighted_captions(rows)
        if self.masked:
            with suppress(BadSample):  # a bad mask does not spoil the sample for those who ask for no masks
                mask = self._picture(self._mask_column, rows[0])
        weights = weights if len(self._captions) > 1 else None
        return Record(key, image, captions, self.label(index), weights, mask=mask)

    def image_paths(self) -> set[str]:
        """Return the paths of the image column, which holds paths, in one spelling."""
        paths = self._pictures[self._image_column].cast("binary").to_pylist()
        return {os.path.normpath(os.fsdecode(path)) for path in paths if path}

    def captions(self, index: int) -> tuple[str, ...]:
        return self._weighted_captions(self._rows_of(index))[0]

    def _weighted_captions(self, rows: Sequence[int]) -> tuple[tuple[str, ...], tuple[float, ...]]:
        captions = []
        for cells, _, lists in self._captions:
            texts = []
            for row in rows:
                key = self._locate(row)[1]
                value = _read(cells, row, key, keep=len(rows) > 1)
                found = texts_in(listed(value) if lists and value else value)
                if not all(isinstance(text, str) for text in found):
                    raise BadSample("bad_caption", key)
                texts += found
            captions.append(texts)
        return shared_out(captions, [weight for _, weight, _ in self._captions])

    def _picture(self, column: str, row: int) -> bytes:
        """The bytes of an image or of a mask, which a cell holds or leads to."""
        part, key = self._locate(row)
        value = _read(self._pictures[column], row, key)
        if isinstance(value, dict):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, bytes):
            if len(value) > MAX_IMAGE_BYTES:
                raise BadSample("too_large", key)
            return value
        if not value:
            raise BadSample("missing_image", f"{key}: column '{column}' is empty")
        path = os.path.join(part.folder, value)
        return read_image_file(path, f"{key}: column '{column}', {os.path.abspath(path)}")

    def _paths_that_lead(self, paths: pa.ChunkedArray) -> tuple[pa.ChunkedArray, list[str]]:
        r"""Return the paths as they lead to images, told by 100 of them, and what was decided.

        '\' may become '/', '#0' go.

        Raises:
            UserError: they hold something else than paths, or none of them leads to a file.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        tried, where = [], f"column '{self._image_column}'"
        for row in evenly_spread(len(paths)):
            part, key = self._locate(row)
            value = (paths[row].cast(pa.binary()).as_py() or b"").decode("utf-8", "replace")
            if value.startswith(("http://", "https://", "s3://", "gs://")):
                raise UserError(
                    f"{self.name}: {where} holds web addresses; download the images first, "
                    "as img2dataset does into .tar shards"
                )
            if value.startswith(_BASE64) and len(value) > 200:
                raise UserError(f"{self.name}: {where} holds base64 text; decode it to files, or to bytes in a table")
            if os.path.isfile(os.path.join(part.folder, value)):
                return paths, []
            tried.append((part.folder, value, key))
        for written, meant, note in _OTHERWISE:
            if any(os.path.isfile(os.path.join(folder, re.sub(written, meant, value))) for folder, value, _ in tried):
                return pc.replace_substring_regex(paths, written, meant), [note]
        folder, value, key = tried[0]
        slashes = " and with '/' for '\\'" if "\\" in value else ""
        raise UserError(
            f"{self.name}: no image is there, of {len(tried)} that were looked for: {where} has '{value}' ({key}), "
            f"looked for as '{os.path.abspath(os.path.join(folder, value))}'{slashes}; relative paths start at "
            f"the table's folder{_elsewhere(folder, value)}"
        )

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


def _hold_lists(where: str, column: str, cells: Any, num_rows: int) -> bool:
    """Whether the texts of a caption column are lists: all of the first 100. UserError where they cannot be read."""
    texts = []
    for row in range(min(SAMPLES_ASKED, num_rows)):
        with suppress(BadSample):
            texts.append(_read(cells, row, ""))
    texts = [text for text in texts if text and text.strip()]
    if not texts or not all(map(_LIST_TEXT.match, texts)):
        return False
    for text in texts:
        if not all(isinstance(part, str) for part in texts_in(listed(text))):
            raise UserError(
                f"{where}: column '{column}' holds {text[:60]!r}, a list of texts neither as JSON nor as Python"
            )
    return True


def _read(cells: Any, row: int, key: str, keep: bool = False) -> Any:
    """Return the value. keep: a text of bad UTF-8 as one that the loader refuses, not the whole sample with it."""
    value = cells[row]
    try:
        return value.as_py()
    except UnicodeDecodeError:  # bad UTF-8, which Arrow keeps until it is read
        if keep and hasattr(value, "as_buffer"):
            return value.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")
        raise BadSample("bad_utf8", key) from None


# The images of the rows: where their paths lead, and which rows show the same one


def _elsewhere(folder: str, value: str) -> str:
    """Say where such a file lies, if it is near."""
    value, above = value.replace("\\", "/"), os.path.join(folder, os.pardir)
    near = [f"{os.path.join(glob.escape(at), '*')}/" for at in (folder, above)]
    starts = [os.curdir, folder, above, *(path for pattern in near for path in sorted(glob.glob(pattern))[:50])]
    for path in (value.lstrip("/"), os.path.basename(value)):
        for end in ("", *(f".{suffix}" for suffix in IMAGE_SUFFIXES)):
            for start in starts:
                if os.path.isfile(os.path.join(start, path + end)):
                    found = os.path.abspath(os.path.join(start, path + end))
                    return f"; there is '{found}', where its paths have to lead"
    return ""


def path_keys(paths: pa.ChunkedArray, parts: Sequence[TablePart]) -> pa.ChunkedArray:
    """Return the paths in one spelling, null for none: './a.jpg', 'a.jpg' and '/DATA/a.jpg' are the same."""
    import pyarrow as pa
    import pyarrow.compute as pc

    paths = paths.cast(pa.large_binary())  # bad UTF-8 costs a sample, not the table
    paths = pc.if_else(pc.equal(paths, b""), None, paths)
    if any(pc.any(pc.match_substring(paths, odd)).as_py() for odd in ("./", "//")):
        paths = pc.replace_substring_regex(paths, r"/(\.?/)+", "/")
        paths = pc.replace_substring_regex(paths, r"^(\./)+", "")
    absolute = pc.starts_with(paths, "/")
    if len({part.folder for part in parts}) == 1 and not pc.any(absolute).as_py():
        return paths
    spelled, first = [], 0
    for part in parts:
        own, folder = paths.slice(first, part.num_rows), os.fsencode(os.path.join(os.path.abspath(part.folder), ""))
        joined = pc.binary_join_element_wise(pa.scalar(folder, own.type), own, pa.scalar(b"", own.type))
        spelled += pc.if_else(absolute.slice(first, part.num_rows), own, joined).chunks
        first += part.num_rows
    return pa.chunked_array(spelled, paths.type)


def byte_keys(groups: Iterable[pa.Array]) -> pa.ChunkedArray | None:
    """Return a key a row, the same where bytes and path of two images are; None where none seems to be there twice.

    groups: bytes, or structs of bytes and path, in the order of the rows. Of a large table all are read only where
    there is a pair in the first SCAN_BYTES.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    keys, seen, read = [], set(), 0
    for group in groups:
        fields = [held.name for held in group.type] if pa.types.is_struct(group.type) else []
        texts = pc.struct_field(group, "path").to_pylist() if "path" in fields else [None] * len(group)
        for value, text in zip(pc.struct_field(group, "bytes") if fields else group, texts, strict=True):
            buffer, path = value.as_buffer() if value.is_valid else None, os.fsencode(text or "")
            keys.append(path or None if buffer is None else hashlib.blake2b(buffer, digest_size=16).digest() + path)
            seen.add(keys[-1])
            read += len(buffer or b"")
        if read > SCAN_BYTES and len(seen) == len(keys):
            return None
    return pa.chunked_array([pa.array(keys, pa.large_binary())])


def rows_by_image(keys: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the rows of each image, image after image by its first row, and where those of each end; None: no repeats.

    keys: one a row, equal for equal images; a row whose key is null stands alone. Of a, b, a, null the rows are
    0, 2 (of a), 1 (of b), 3, which end at 2, 3, 4.
    """
    import pyarrow.compute as pc

    codes = np.concatenate([pc.fill_null(part.indices, -1).to_numpy() for part in keys.dictionary_encode().chunks])
    num_keys, alone, rows = codes.max(initial=-1) + 1, codes < 0, np.arange(len(codes))
    if num_keys + alone.sum() == len(codes):
        return None
    first = np.empty(num_keys + 1, np.int64)
    first[codes[::-1]] = rows[::-1]  # of several, the last that is written stays
    first = np.where(alone, rows, first[codes])
    return np.argsort(first, kind="stable"), np.cumsum(np.bincount(first)[np.unique(first)])
