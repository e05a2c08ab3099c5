"""Columns of a table, of whichever kind, as samples: which hold image, captions and label, and what their cells say."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from contrastive.data.class_sets import class_names_beside
from contrastive.data.record import BadSample, Record, Source, check_index, part_and_row
from contrastive.data.sources.paths import MAX_IMAGE_BYTES, read_image_file
from contrastive.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_COLUMNS = (
    "image", "img", "image_path", "filepath", "file_path", "path", "file_name", "filename", "jpg", "png", "webp",
)  # fmt: skip
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentence", "sentences")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "fine_label", "category")
_URL_COLUMNS = ("url", "image_url", "img_url")


@dataclass(frozen=True)
class Columns:
    """The names of the columns. None: to be found by its usual names, or there is none.

    caption: a name, or several with weights, as `weighted_names` takes them. weighted: what `find_columns` made
    of that. The fingerprints of tables hold the others as they are printed.
    """

    image: str | None = None
    caption: str | None = None
    label: str | None = None
    weighted: tuple[tuple[str, float], ...] = field(default=(), repr=False)

    def names(self) -> list[str]:
        """The names there are."""
        return [name for name in (self.image, *dict(self.weighted), self.label) if name]


def find_columns(names: Sequence[str], asked: Columns, where: str) -> Columns:
    """Return the columns of `names` to read: those asked for, else the first of the usual names there is.

    Usual names are compared without regard to case. `where` names the table in messages.

    Raises:
        UserError: a column that was asked for is not there, no image column, or a name that is there twice.
    """
    twice = [name for index, name in enumerate(names) if name in names[:index]]
    if twice:
        raise UserError(f"{where}: column '{twice[0]}' is there twice; the columns are: {', '.join(names)}")
    if asked.caption is None or asked.caption in names:  # a name may hold ',' or '='
        caption = asked.caption or _usual(names, CAPTION_COLUMNS)
        weighted = ((caption, 1.0),) if caption else ()
    else:
        weighted = weighted_names(asked.caption)
    for name in (*dict(weighted), asked.image):
        if name is not None and name not in names:
            hint = did_you_mean(name, names)
            raise UserError(f"{where}: no column '{name}'; the columns are: {', '.join(names)}.{hint}")
    found = Columns(
        image=asked.image or _usual(names, IMAGE_COLUMNS),
        caption=weighted[0][0] if len(weighted) == 1 else asked.caption,
        label=_usual(names, LABEL_COLUMNS),
        weighted=weighted,
    )
    if found.image is None:
        hint = f"name it with image_column (it may be called {', '.join(IMAGE_COLUMNS)})"
        if any(name.lower() in _URL_COLUMNS for name in names):
            hint = "it has web addresses only: download the images first, as img2dataset does into .tar shards"
        raise UserError(f"{where}: no image column among the columns {', '.join(names)}; {hint}")
    return found


def _usual(names: Sequence[str], usual: Sequence[str]) -> str | None:
    by_lower = {name.lower(): name for name in reversed(names)}
    return next((by_lower[name] for name in usual if name in by_lower), None)


def weighted_names(text: str) -> tuple[tuple[str, float], ...]:
    """Split 'alt=1,synthetic=3' into names and their weights; a name without one weighs 1.

    Raises:
        UserError: an empty or repeated name, or a weight that is not a number above 0.
    """
    weighted: dict[str, float] = {}
    for part in text.split(","):
        name, weight = (side.strip() for side in (part.rpartition("=")[::2] if "=" in part else (part, "1")))
        if not name or name in weighted:
            raise UserError(
                f"caption_column '{text}' names a column twice, or not at all; write it as 'alt=1,synthetic=3'"
            )
        try:
            weighted[name] = float(weight)
        except ValueError:
            weighted[name] = math.nan
        if not 0 < weighted[name] < math.inf:
            raise UserError(f"caption_column '{text}': the weight of '{name}' is '{weight}', not a number above 0")
    return tuple(weighted.items())


class Cells(Protocol):
    """One column: a row's Python value, or Arrow's scalar of it. Picklable, safe to fork."""

    def __getitem__(self, row: int) -> Any: ...


class TablePart(NamedTuple):
    """Consecutive rows with one origin. label: names it in keys. folder: of relative image paths, '' for none."""

    label: str
    folder: str
    num_rows: int


class ColumnSource(Source):
    """Rows of an image column with captions, labels or both.

    Args:
        name: the specification, for messages.
        parts: where the rows come from, in order.
        columns: those to read, as `find_columns` has them.
        types: of those columns.
        cells: those columns. An image is bytes, a path, relative to the part's folder, or {'bytes', 'path'}; a
            caption is a text or a list of texts, which share the column's weight evenly; nulls are left out. Labels
            are a pa.ChunkedArray, in memory.
        class_names: those that come with the labels; else they are those of classes.json or classnames.txt in the
            folder of the first part, else the distinct texts of the label column.

    Raises:
        UserError: a column of another kind than it should be, or a label without a class name.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[TablePart],
        columns: Columns,
        types: Mapping[str, pa.DataType],
        cells: Mapping[str, Cells],
        class_names: tuple[str, ...] | None,
        fingerprint: str,
    ):
        _check_types(columns, types, name)
        self.name, self.fingerprint, self._parts = name, fingerprint, tuple(parts)
        self._ends = np.cumsum([part.num_rows for part in parts])
        self._images = cells[columns.image]
        self._captions = [(cells[caption], weight) for caption, weight in columns.weighted]
        named = [f"{what}: column '{held}'" for what, held in vars(columns).items() if what != "weighted" and held]
        self.reading = ", ".join(named)
        if columns.label:
            known = class_names or (parts[0].folder and class_names_beside(parts[0].folder)) or None
            self._labels, self.class_names = _read_labels(cells[columns.label], known, name)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        part, key = self._locate(index)
        image = _image_bytes(_read(self._images, index, key), part.folder, key)
        captions, weights = self._weighted_captions(index, key)
        return Record(key, image, captions, self.label(index), weights if len(self._captions) > 1 else None)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._weighted_captions(index, self._locate(index)[1])[0]

    def _weighted_captions(self, index: int, key: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
        captions, weights = [], []
        for cells, weight in self._captions:
            value = _read(cells, index, key)
            texts = [text for text in (value if isinstance(value, list) else [value]) if text is not None]
            if not all(isinstance(text, str) for text in texts):
                raise BadSample("bad_caption", key)
            captions += texts
            weights += [weight / len(texts) for _ in texts]
        return tuple(captions), tuple(weights)

    def _locate(self, index: int) -> tuple[TablePart, str]:
        """The part of the row, and its key: the part's label and the row in it, counted from 0."""
        number, row = part_and_row(self._ends, check_index(self, index))
        part = self._parts[number]
        return part, f"{part.label}:{row}"


def is_text(column_type: pa.DataType) -> bool:
    from pyarrow import types

    return types.is_string(column_type) or types.is_large_string(column_type) or types.is_string_view(column_type)


def _check_types(columns: Columns, types: Mapping[str, pa.DataType], where: str) -> None:
    """Raise UserError where the image column holds no images, or a caption column no texts."""
    from pyarrow import types as kinds

    held = types[columns.image]
    # The image format of `datasets` is a struct of bytes and path.
    packed = kinds.is_struct(held) and "bytes" in {field.name for field in held}
    if not (packed or is_text(held) or kinds.is_binary(held) or kinds.is_large_binary(held)):
        raise UserError(
            f"{where}: column '{columns.image}' holds {held}; images must be paths, bytes or an Image feature"
        )
    for caption, _ in columns.weighted:
        held = types[caption]
        is_list = kinds.is_list(held) or kinds.is_large_list(held) or kinds.is_fixed_size_list(held)
        inner = held.value_type if is_list else held
        if not (is_text(inner) or kinds.is_null(inner)):
            raise UserError(f"{where}: column '{caption}' holds {held}; captions must be texts or lists of texts")


def _read_labels(
    column: pa.ChunkedArray, class_names: tuple[str, ...] | None, where: str
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Return (labels int64, -1 for none, and class names), or (None, None) for a column without a single label.

    A text column is a class name a row; its classes are `class_names`, or the sorted distinct texts.

    Raises:
        UserError: a label outside `class_names`, or bad UTF-8.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_binary(column.type) or is_text(column.type):
        try:
            column, class_names = _number_names(column.cast(pa.string()), class_names, where)
        except (pa.ArrowInvalid, UnicodeDecodeError):
            raise UserError(f"{where}: the labels are not UTF-8 text") from None
    if not pa.types.is_integer(column.type):
        return None, None
    labels = pc.fill_null(column.cast(pa.int64()), -1).to_numpy()
    if labels.max(initial=-1) < 0:
        return None, None
    if class_names and labels.max() >= len(class_names):
        raise UserError(f"{where}: label {labels.max()}, but there are {len(class_names)} class names")
    return np.maximum(labels, -1), class_names


def _number_names(
    column: pa.ChunkedArray, class_names: tuple[str, ...] | None, where: str
) -> tuple[pa.ChunkedArray, tuple[str, ...]]:
    """Return the number of each name among the class names, null where it is empty, and the class names."""
    import pyarrow as pa
    import pyarrow.compute as pc

    present = sorted(name for name in pc.unique(column).to_pylist() if name)
    class_names = class_names or tuple(present)
    unknown = sorted(set(present) - set(class_names))
    if unknown:
        raise UserError(
            f"{where}: label '{unknown[0]}' is not among the {len(class_names)} class names."
            f"{did_you_mean(unknown[0], class_names)}"
        )
    return pc.index_in(column, value_set=pa.array(class_names, pa.string())), class_names


def _read(cells: Cells, row: int, key: str) -> Any:
    try:
        value = cells[row]
        return value.as_py() if hasattr(value, "as_py") else value
    except UnicodeDecodeError:  # bad UTF-8, which Arrow keeps until it is read
        raise BadSample("bad_utf8", key) from None


def _image_bytes(value: Any, folder: str, key: str) -> bytes:
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        if len(value) > MAX_IMAGE_BYTES:
            raise BadSample("too_large", key)
        return value
    if not value:
        raise BadSample("missing_image", key)
    return read_image_file(os.path.join(folder, value), key)
