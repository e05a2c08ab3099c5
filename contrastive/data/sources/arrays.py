"""Labelled images of one size that fit in memory: scans of digits, and MNIST's files.

MNIST's format (http://yann.lecun.com/exdb/mnist) is one idx file of images and one of labels, gzip or not: a magic
number, sizes (big-endian int32), then the bytes. Fashion-MNIST and KMNIST come in the same files.
"""

import gzip
import hashlib
import math
import os
import zlib
from pathlib import Path

import numpy as np

from contrastive.data.class_sets import class_names_beside, class_set
from contrastive.data.record import Record, Source, check_split
from contrastive.errors import UserError

_TEST_EVERY = 5  # of each of the digits, in the order of their file
_PREFIXES = {"train": "train", "test": "t10k"}  # a split to what its idx files begin with
_IMAGES, _LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
# All of these name their files alike. A word in the name of the folder, to the class names.
_IDX_SETS = {"fashion": "fashion_mnist", "kmnist": "kmnist", "kuzushiji": "kmnist", "mnist": "digits"}


class ArrayImages(Source):
    """Images in one array, shared with forked workers.

    Args:
        name: the specification, for messages.
        images: uint8 (N, H, W) grey or (N, H, W, 3) RGB.
        labels: int64 (N,) in 0..C-1.
        class_names: C names.
    """

    def __init__(self, name: str, images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]):
        self.name, self.class_names = name, class_names
        images = np.ascontiguousarray(images)
        images.flags.writeable = False  # a record's image is a view: nobody alters the data through it
        self._images, self._labels = images, labels
        digest = hashlib.blake2b(images, digest_size=8)
        digest.update(labels)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Record:
        label = self.label(index)
        image = self._images[index]
        if image.ndim == 2:
            image = np.repeat(image[:, :, None], 3, axis=2)
        return Record(key=self._key(index), image=image, label=label)

    def _key(self, index: int) -> str:
        return f"{self.name}:{index}"


class Digits(ArrayImages):
    """`digits`: 1,797 scans of handwritten digits, 8 x 8 pixels, in the package itself.

    E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (CC BY 4.0):
    the file of scikit-learn's `load_digits`, of which a row is 64 pixels in 0..16, then the digit.

    Args:
        split: 'train' (1,442), 'test' (every fifth scan of each digit, 355) or 'all' (1,797).
    """

    def __init__(self, split: str = "train"):
        check_split("digits", split, ("train", "test", "all"))
        rows = np.loadtxt(Path(__file__).parents[1] / "digits.csv.gz", delimiter=",")
        digits = rows[:, -1].astype(np.int64)
        self._rows = _rows_of(split, digits)
        scans = np.round(rows[self._rows, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        super().__init__(f"digits:{split}", scans, digits[self._rows], class_set("digits").names)

    def _key(self, index: int) -> str:
        return f"digits-{self._rows[index]:04d}"


def _rows_of(split: str, digits: np.ndarray) -> np.ndarray:
    """Rows of the file in a split: stratified, the same everywhere."""
    nth = np.array([np.count_nonzero(digits[:row] == digit) for row, digit in enumerate(digits)])  # of its digit
    is_test = nth % _TEST_EVERY == _TEST_EVERY - 1
    return np.flatnonzero({"train": ~is_test, "test": is_test, "all": np.ones_like(is_test)}[split])


def idx_folder(folder: str) -> str | None:
    """Return where idx files of MNIST's names lie: `folder`, or its 'raw', as torchvision has them; else None."""
    for within in (folder, os.path.join(folder, "raw")):
        if any(_find(within, prefix, _IMAGES) for prefix in _PREFIXES.values()):
            return within
    return None


def open_idx(name: str, folder: str, split: str) -> ArrayImages:
    """Open one split of a folder of idx files, as grey pictures with their labels.

    Class names are those of classes.json or classnames.txt in the folder, else those of Fashion-MNIST or KMNIST
    where the folder, or the nearest above it that speaks of one, is called so, else 'zero' to 'nine'.

    Raises:
        UserError: an unknown split, a missing, damaged or cut file, other numbers of images and labels, or a
            label without a class name.
    """
    check_split(name, split, _PREFIXES)
    within, prefix = idx_folder(folder), _PREFIXES[split]
    paths = [_find(within, prefix, kind) for kind in (_IMAGES, _LABELS)]
    if None in paths:
        missing = f"{prefix}-{(_IMAGES, _LABELS)[paths.index(None)]}"
        raise UserError(f"{name}: there is no {missing} or {missing}.gz in {within}")
    images = _read_idx(paths[0], num_sizes=3)
    labels = _read_idx(paths[1], num_sizes=1).astype(np.int64)
    if len(images) != len(labels):
        raise UserError(
            f"{paths[0]} has {len(images):,} images, but {os.path.basename(paths[1])} {len(labels):,} labels; "
            "they have to come from the same data set"
        )
    class_names = class_names_beside(within) or class_names_beside(folder) or _idx_class_names(folder)
    if labels.max() >= len(class_names):
        raise UserError(
            f"{paths[1]}: label {labels.max()}, but there are {len(class_names)} class names; "
            "put the names in a classes.json beside it"
        )
    return ArrayImages(name, images, labels, class_names)


def _find(folder: str, prefix: str, kind: str) -> str | None:
    """The file, under its own name or the common 'train-images.idx3-ubyte', unpacked ones first."""
    stems = (f"{prefix}-{kind}", f"{prefix}-{kind.replace('-', '.', 1)}")
    paths = (os.path.join(folder, stem + suffix) for suffix in ("", ".gz") for stem in stems)
    return next((path for path in paths if os.path.isfile(path)), None)


def _idx_class_names(folder: str) -> tuple[str, ...]:
    for part in reversed(Path(os.path.abspath(folder)).parts):
        for word, names in _IDX_SETS.items():
            if word in part.lower():
                return class_set(names).names
    return class_set("digits").names


def _read_idx(path: str, num_sizes: int) -> np.ndarray:
    """Return the values of an idx file of unsigned bytes, in its shape."""
    magic = 0x800 + num_sizes  # 8 stands for unsigned bytes
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            head = np.frombuffer(file.read(4 + 4 * num_sizes), dtype=">u4").tolist()
            if len(head) <= num_sizes or head[0] != magic:
                found = f"starts with {head[0]}" if head else "is empty"
                raise UserError(f"{path} {found}; an idx file of this kind starts with {magic} and {num_sizes} sizes")
            values = file.read()  # all there is: memory is not asked for on the word of a damaged header
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: a head of uneven length
        raise UserError(f"{path} is damaged or cut short ({error}); fetch it anew") from None
    shape = tuple(head[1:])
    size = math.prod(shape)
    if len(values) != size:
        told = f"{' x '.join(f'{length:,}' for length in shape)} = {size:,} bytes"
        held = "more" if len(values) > size else f"{len(values):,}"
        raise UserError(f"{path}: its header tells of {told}, but it holds {held}; fetch it anew")
    if not size:
        raise UserError(f"{path} is empty: its header tells of {' x '.join(map(str, shape))} bytes")
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)
