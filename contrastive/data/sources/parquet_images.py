"""Random access to an image column of Parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from contrastive.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

# Decoded row groups that one process keeps. Rows are compressed by the group, so a set that fits is read
# once, and of a larger one each visit to another group costs its decoding.
CACHE_BYTES = 512 * 2**20


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
        self._sizes = np.array(sizes, dtype=np.int64)
        self._decoded: dict[int, pa.ChunkedArray] = {}

    def __getitem__(self, row: int) -> Any:
        number = int(np.searchsorted(self._ends, row, side="right"))
        return self._group(number)[row - int(self._ends[number] - self._sizes[number])].as_py()

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
            raise UserError(f"{path}: row group {group} cannot be read ({str(error).splitlines()[0]})") from None
