"""What a cell of a table says: an image, captions, a label."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from contrastive.data.record import BadSample
from contrastive.data.sources.image_file import MAX_IMAGE_BYTES, read_image_file
from contrastive.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa


class Cells(Protocol):
    """One column: the Python value of a row. Picklable, safe to fork."""

    def __getitem__(self, row: int) -> Any: ...


class ArrowCells:
    """A column that is in memory."""

    def __init__(self, column: pa.ChunkedArray):
        self._column = column

    def __getitem__(self, row: int) -> Any:
        return self._column[row].as_py()


def read_cell(cells: Cells, row: int, key: str) -> Any:
    """Return the value of a cell. Bad UTF-8, which Arrow keeps until it is read, is a BadSample."""
    try:
        return cells[row]
    except UnicodeDecodeError:
        raise BadSample("bad_utf8", key) from None


def image_bytes(value: Any, folder: str, key: str) -> bytes:
    """Return the encoded image of a cell: bytes, a path (relative to `folder`), or {'bytes', 'path'}.

    Raises:
        BadSample: 'missing_image' (an empty cell, no such file), 'unreadable_image', 'too_large'.
    """
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        if len(value) > MAX_IMAGE_BYTES:
            raise BadSample("too_large", key)
        return value
    if not value:
        raise BadSample("missing_image", key)
    return read_image_file(os.path.join(folder, value), key)


def caption_texts(value: Any, key: str) -> tuple[str, ...]:
    """Return the captions of a cell: a text or a list of them; nulls are left out. BadSample 'bad_caption'."""
    values = value if isinstance(value, list) else [value]
    captions = tuple(text for text in values if text is not None)
    if not all(isinstance(text, str) for text in captions):
        raise BadSample("bad_caption", key)
    return captions


def is_image_type(column_type: pa.DataType) -> bool:
    """True for bytes, a path, or the image format of `datasets` (a struct of bytes and path)."""
    from pyarrow import types

    if types.is_struct(column_type):
        return "bytes" in {field.name for field in column_type}
    return is_text_type(column_type) or types.is_binary(column_type) or types.is_large_binary(column_type)


def is_text_type(column_type: pa.DataType) -> bool:
    from pyarrow import types

    return types.is_string(column_type) or types.is_large_string(column_type) or types.is_string_view(column_type)


def is_caption_type(column_type: pa.DataType) -> bool:
    """True for a text or a list of texts; a column of nulls only counts as text."""
    from pyarrow import types

    if types.is_list(column_type) or types.is_large_list(column_type) or types.is_fixed_size_list(column_type):
        column_type = column_type.value_type
    return is_text_type(column_type) or types.is_null(column_type)


def read_labels(
    column: pa.ChunkedArray, class_names: tuple[str, ...] | None, where: str
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Return (labels int64, -1 for none, and class names), or (None, None) for a column that is no label.

    A text column is a class name a row; its classes are `class_names`, or the sorted distinct texts. Class
    names without a single label are dropped.

    Raises:
        UserError: a label outside `class_names`, or bad UTF-8.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_null(column.type):
        return None, None
    if pa.types.is_binary(column.type) or is_text_type(column.type):
        try:
            return _number_names(column.cast(pa.string()), class_names, where)
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
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    import pyarrow as pa
    import pyarrow.compute as pc

    present = sorted(name for name in pc.unique(column).to_pylist() if name)
    unknown = sorted(set(present) - set(class_names or present))
    if unknown:
        raise UserError(
            f"{where}: label '{unknown[0]}' is not among the {len(class_names)} class names."
            f"{did_you_mean(unknown[0], class_names)}"
        )
    if not present:
        return None, None
    class_names = class_names or tuple(present)
    numbers = pc.index_in(column, value_set=pa.array(class_names, pa.string()))
    return pc.fill_null(numbers, -1).to_numpy().astype(np.int64), class_names
