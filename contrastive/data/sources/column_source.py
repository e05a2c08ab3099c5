"""A source whose samples are the rows of columns, from whichever kind of table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from contrastive.data.record import Record, Source, check_index
from contrastive.data.sources.cells import Cells, caption_texts, image_bytes, read_cell


@dataclass(frozen=True)
class TablePart:
    """Consecutive rows with one origin. label: names it in keys. folder: relative image paths start there."""

    label: str
    folder: str
    num_rows: int


class ColumnSource(Source):
    """Rows of an image column with captions, labels or both.

    Args:
        name: the specification, for messages.
        parts: where the rows come from, in order.
        images: cells as `image_bytes` takes them.
        captions: columns whose cells are a text or a list of texts, each with its weight; the texts of one cell
            share it evenly.
        labels: int64, one a row, -1 for none; or None.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[TablePart],
        images: Cells,
        captions: Sequence[tuple[Cells, float]],
        labels: np.ndarray | None,
        class_names: tuple[str, ...] | None,
        fingerprint: str,
    ):
        self.name, self.class_names, self.fingerprint = name, class_names, fingerprint
        self._parts = tuple(parts)
        self._ends = np.cumsum([part.num_rows for part in parts])
        self._images, self._captions, self._labels = images, tuple(captions), labels

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        part, key = self._locate(index)
        image = image_bytes(read_cell(self._images, index, key), part.folder, key)
        captions, weights = self._weighted_captions(index)
        return Record(key, image, captions, self.label(index), weights if len(self._captions) > 1 else None)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._weighted_captions(index)[0]

    def label(self, index: int) -> int | None:
        index = check_index(self, index)
        if self._labels is None or self._labels[index] < 0:
            return None
        return int(self._labels[index])

    def _weighted_captions(self, index: int) -> tuple[tuple[str, ...], tuple[float, ...]]:
        _, key = self._locate(index)
        weighted = []
        for cells, weight in self._captions:
            texts = caption_texts(read_cell(cells, index, key), key)
            weighted += [(text, weight / len(texts)) for text in texts]
        return tuple(text for text, _ in weighted), tuple(weight for _, weight in weighted)

    def _locate(self, index: int) -> tuple[TablePart, str]:
        """The part of the row, and its key: the part's label and the row in it, counted from 0."""
        index = check_index(self, index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        part = self._parts[number]
        return part, f"{part.label}:{index - int(self._ends[number]) + part.num_rows}"
