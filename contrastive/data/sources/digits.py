"""`digits`: scikit-learn's 1,797 scans of handwritten digits, 8 x 8 pixels, in the package itself."""

import hashlib
import importlib.util
from pathlib import Path

import numpy as np

from contrastive.data.record import Record, Source, check_index
from contrastive.errors import UserError, did_you_mean

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = ("train", "test", "all")
_TEST_EVERY = 5  # of each digit, in the order of the file


class Digits(Source):
    """Labelled scans, uint8 (8, 8, 3) grey.

    Args:
        split: 'train' (1,442), 'test' (every fifth scan of each digit, 355) or 'all' (1,797).
    """

    def __init__(self, split: str = "train"):
        if split not in SPLITS:
            raise UserError(
                f"digits: unknown split '{split}'; use one of {', '.join(SPLITS)}.{did_you_mean(split, SPLITS)}"
            )
        scans, digits = _stored()
        self.name = f"digits:{split}"
        self.class_names = CLASS_NAMES
        self._rows = _rows_of(split, digits)
        self._labels = digits[self._rows]
        # 0..16 as stored to 0..255.
        self._scans = np.round(scans[self._rows] * (255 / 16)).astype(np.uint8)
        content = self._scans.tobytes() + self._labels.tobytes()
        self.fingerprint = hashlib.blake2b(content, digest_size=8).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        index = check_index(self, index)
        image = np.repeat(self._scans[index][:, :, None], 3, axis=2)
        return Record(key=f"digits-{self._rows[index]:04d}", image=image, label=self.label(index))

    def label(self, index: int) -> int:
        return int(self._labels[check_index(self, index)])


def _stored() -> tuple[np.ndarray, np.ndarray]:
    """Return all scans, float64 (1797, 8, 8) in 0..16, and their digits, int64 (1797,).

    From scikit-learn's file, as its `load_digits` has it: to import scikit-learn takes more than a second, in every
    process of a run.
    """
    package = importlib.util.find_spec("sklearn")
    rows = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(np.int64)


def _rows_of(split: str, target: np.ndarray) -> np.ndarray:
    """Rows of the file in a split: stratified, the same everywhere."""
    nth = np.zeros(len(target), dtype=np.int64)  # of its digit
    for digit in np.unique(target):
        nth[target == digit] = np.arange(np.count_nonzero(target == digit))
    is_test = nth % _TEST_EVERY == _TEST_EVERY - 1
    chosen = {"train": ~is_test, "test": is_test, "all": np.ones_like(is_test)}[split]
    return np.flatnonzero(chosen)
