"""MNIST's file format: one idx file of images and one of labels, gzip or not.

Magic number, sizes (big-endian int32), then the bytes: http://yann.lecun.com/exdb/mnist. Fashion-MNIST and KMNIST
come in the same files.
"""

import gzip
import math
import os
import zlib
from pathlib import Path

import numpy as np

from contrastive.data.class_sets import class_set
from contrastive.data.sources.array_images import ArrayImages
from contrastive.data.sources.class_names import class_names_beside
from contrastive.errors import UserError, did_you_mean

SPLITS = {"train": "train", "test": "t10k"}
_IMAGES, _LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
_IMAGE_MAGIC, _LABEL_MAGIC = 2051, 2049
_DEFLATE_RATIO = 1032  # no gzip file holds more than this many times its size
# All of these name their files alike. A word in the name of the folder, to the class names.
_KINDS = {"fashion": "fashion_mnist", "kmnist": "kmnist", "kuzushiji": "kmnist", "mnist": "digits"}


def is_idx_folder(folder: str) -> bool:
    """Whether idx files of MNIST's names lie in `folder` or in its 'raw', as torchvision has them."""
    return _files_folder(folder) is not None


def open_idx(name: str, folder: str, split: str) -> ArrayImages:
    """Open one split of a folder of idx files, as grey pictures with their labels.

    Class names are those of classes.json or classnames.txt in the folder, else those of Fashion-MNIST or KMNIST
    where the folder, or the nearest above it that speaks of one, is called so, else 'zero' to 'nine'.

    Raises:
        UserError: an unknown split, a missing, damaged or cut file, other numbers of images and labels, or a
            label without a class name.
    """
    if split not in SPLITS:
        raise UserError(f"{name}: unknown split '{split}'; use train or test.{did_you_mean(split, SPLITS)}")
    within = _files_folder(folder)
    image_file, label_file = (_file_of(name, within, SPLITS[split], kind) for kind in (_IMAGES, _LABELS))
    images = _read_idx(image_file, _IMAGE_MAGIC, num_sizes=3)
    labels = _read_idx(label_file, _LABEL_MAGIC, num_sizes=1).astype(np.int64)
    if len(images) != len(labels):
        raise UserError(
            f"{image_file} has {len(images):,} images, but {os.path.basename(label_file)} {len(labels):,} labels; "
            "they have to come from the same data set"
        )
    class_names = _class_names(folder, within)
    if labels.max() >= len(class_names):
        raise UserError(
            f"{label_file}: label {labels.max()}, but there are {len(class_names)} class names; "
            "put the names in a classes.json beside it"
        )
    return ArrayImages(name, images, labels, class_names)


def _files_folder(folder: str) -> str | None:
    for within in (folder, os.path.join(folder, "raw")):
        if any(_find(within, prefix, _IMAGES) for prefix in SPLITS.values()):
            return within
    return None


def _find(folder: str, prefix: str, kind: str) -> str | None:
    """The file, under its own name or the common 'train-images.idx3-ubyte', unpacked ones first."""
    stems = (f"{prefix}-{kind}", f"{prefix}-{kind.replace('-', '.', 1)}")
    paths = (os.path.join(folder, stem + suffix) for suffix in ("", ".gz") for stem in stems)
    return next((path for path in paths if os.path.isfile(path)), None)


def _file_of(name: str, folder: str, prefix: str, kind: str) -> str:
    path = _find(folder, prefix, kind)
    if path is None:
        raise UserError(f"{name}: there is no {prefix}-{kind} or {prefix}-{kind}.gz in {folder}")
    return path


def _class_names(folder: str, within: str) -> tuple[str, ...]:
    beside = class_names_beside(Path(within)) or class_names_beside(Path(folder))
    if beside:
        return beside
    for part in reversed(Path(os.path.abspath(folder)).parts):
        for word, names in _KINDS.items():
            if word in part.lower():
                return class_set(names).names
    return class_set("digits").names


def _read_idx(path: str, magic: int, num_sizes: int) -> np.ndarray:
    """Return the values of an idx file of unsigned bytes, in its shape."""
    packed = path.endswith(".gz")
    try:
        with gzip.open(path) if packed else open(path, "rb") as file:
            head = np.frombuffer(file.read(4 + 4 * num_sizes), dtype=">u4").tolist()
            if len(head) <= num_sizes or head[0] != magic:
                found = f"starts with {head[0]}" if head else "is empty"
                raise UserError(f"{path} {found}; an idx file of this kind starts with {magic} and {num_sizes} sizes")
            shape = tuple(head[1:])
            size = math.prod(shape)
            # Memory is not asked for on the word of a damaged header.
            most = os.path.getsize(path) * (_DEFLATE_RATIO if packed else 1)
            values = file.read(min(size, most) + 1)
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: a head of uneven length
        raise UserError(f"{path} is damaged or cut short ({error}); fetch it anew") from None
    if len(values) != size:
        told = f"{' x '.join(f'{length:,}' for length in shape)} = {size:,} bytes"
        held = "more" if len(values) > size else f"{len(values):,}"
        raise UserError(f"{path}: its header tells of {told}, but it holds {held}; fetch it anew")
    if not size:
        raise UserError(f"{path} is empty: its header tells of {' x '.join(map(str, shape))} bytes")
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)
