"""A source whose samples are the rows of columns, from whichever kind of table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from contrastive.data.record import Record, check_index
from contrastive.data.sources.cells import Cells, caption_texts, image_bytes, read_cell


@dataclass(frozen=True)
class TablePart:
    """Consecutive rows with one origin. label: names it in keys. folder: relative image paths start there."""

    label: str
    folder: str
    num_rows: int


class ColumnSource:
    """Rows of an image column with captions, labels or both.

    Args:
        name: the specification, for messages.
        parts: where the rows come from, in order.
        images: cells as `image_bytes` takes them.
        captions: cells with a text or a list of texts, or None.
        labels: int64, one a row, -1 for none; or None.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[TablePart],
        images: Cells,
        captions: Cells | None,
        labels: np.ndarray | None,
        class_names: tuple[str, ...] | None,
        fingerprint: str,
    ):
        self.name, self.class_names, self.fingerprint = name, class_names, fingerprint
        self._parts = tuple(parts)
        self._ends = np.cumsum([part.num_rows for part in parts])
        self._images, self._captions, self._labels = images, captions, labels

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        part, key = self._locate(index)
        image = image_bytes(read_cell(self._images, index, key), part.folder, key)
        return Record(key, image, self.captions(index), self.label(index))

    def captions(self, index: int) -> tuple[str, ...]:
        _, key = self._locate(index)
        return () if self._captions is None else caption_texts(read_cell(self._captions, index, key), key)

    def label(self, index: int) -> int | None:
        index = check_index(self, index)
        if self._labels is None or self._labels[index] < 0:
            return None
        return int(self._labels[index])

    def _locate(self, index: int) -> tuple[TablePart, str]:
        """The part of the row, and its key: the part's label and the row in it, counted from 0."""
        index = check_index(self, index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        part = self._parts[number]
        return part, f"{part.label}:{index - int(self._ends[number]) + part.num_rows}"
