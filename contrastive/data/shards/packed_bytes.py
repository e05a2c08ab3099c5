"""Many short byte strings in two arrays."""

from collections.abc import Iterable

import numpy as np


class PackedBytes:
    """A sequence of byte strings in a few bytes each, shared with forked workers.

    A list of a million str is a million objects, and every worker that only reads them copies their pages,
    because a read changes the reference count.
    """

    def __init__(self, strings: Iterable[bytes]):
        strings = list(strings)
        self._ends = np.cumsum([len(string) for string in strings], dtype=np.int64)
        self._blob = np.frombuffer(b"".join(strings), dtype=np.uint8)

    @classmethod
    def from_arrays(cls, ends: np.ndarray, blob: np.ndarray) -> "PackedBytes":
        """Take what `arrays` gave."""
        packed = cls(())
        packed._ends, packed._blob = ends, blob
        return packed

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each string ends, int64 (n,), and all of them joined, uint8."""
        return self._ends, self._blob

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        start = self._ends[index - 1] if index else 0
        return self._blob[start : self._ends[index]].tobytes()
