"""CIFAR-10 and CIFAR-100 as their author gives them: pickled batches of Python (Krizhevsky 2009)."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from contrastive.data.class_sets import class_set
from contrastive.data.sources.array_images import ArrayImages
from contrastive.data.sources.array_pickle import read_array_pickle
from contrastive.data.sources.class_names import class_names_beside
from contrastive.errors import UserError, did_you_mean

SIDE = 32
_PIXELS = 3 * SIDE * SIDE  # a row: the red plane, the green one, the blue one


class _Kind(NamedTuple):
    """The files of one of the two sets, and what their fields are called."""

    name: str
    folder: str
    files: dict[str, tuple[str, ...]]
    meta: str
    labels: str
    names: str


_FIVE = tuple(f"data_batch_{number}" for number in range(1, 6))
_CIFAR10 = {"train": _FIVE, "test": ("test_batch",)}
_CIFAR100 = {"train": ("train",), "test": ("test",)}
_KINDS = (
    _Kind("cifar10", "cifar-10-batches-py", _CIFAR10, "batches.meta", "labels", "label_names"),
    _Kind("cifar100", "cifar-100-python", _CIFAR100, "meta", "fine_labels", "fine_label_names"),
)


def is_cifar_folder(folder: str) -> bool:
    """Whether the batches of CIFAR-10 or CIFAR-100 lie in `folder`, or in the folder their archive unpacks to."""
    return bool(_locate(folder))


def open_cifar(name: str, folder: str, split: str) -> ArrayImages:
    """Open one split of CIFAR-10 or CIFAR-100 (fine labels). Class names come from its meta file.

    Raises:
        UserError: an unknown split, a missing or damaged batch, one that names more than data (see
            `read_array_pickle`), or a label without a class name.
    """
    found = _locate(folder)
    if len(found) > 1:
        folders = " and ".join(within for _, within in found)
        raise UserError(f"{name}: it holds both CIFAR-10 and CIFAR-100; give one of {folders}")
    kind, within = found[0]
    if split not in kind.files:
        raise UserError(f"{name}: unknown split '{split}'; use train or test.{did_you_mean(split, kind.files)}")
    paths = [os.path.join(within, file) for file in kind.files[split]]
    missing = [os.path.basename(path) for path in paths if not os.path.isfile(path)]
    if missing:
        raise UserError(f"{name}: {len(missing)} of its {len(paths)} files are missing in {within}, first {missing[0]}")
    class_names = _class_names(kind, within)
    batches = [_read_batch(path, kind.labels, len(class_names)) for path in paths]
    rows = np.concatenate([images for images, _ in batches])
    images = np.ascontiguousarray(rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
    return ArrayImages(name, images, np.concatenate([labels for _, labels in batches]), class_names)


def _locate(folder: str) -> list[tuple[_Kind, str]]:
    """Return which set's files lie in `folder`; else which lie in the folders that the archives unpack to."""
    here = [(kind, folder) for kind in _KINDS if _is_of(kind, folder)]
    below = ((kind, os.path.join(folder, kind.folder)) for kind in _KINDS)
    return here or [(kind, within) for kind, within in below if _is_of(kind, within)]


def _is_of(kind: _Kind, folder: str) -> bool:
    # Two of them: a file called 'train' alone may be anybody's.
    names = (*kind.files["train"], *kind.files["test"], kind.meta)
    return sum(os.path.isfile(os.path.join(folder, name)) for name in names) > 1


def _class_names(kind: _Kind, folder: str) -> tuple[str, ...]:
    beside = class_names_beside(Path(folder))
    if beside:
        return beside
    path = os.path.join(folder, kind.meta)
    if not os.path.isfile(path):
        return class_set(kind.name).names
    names = read_array_pickle(path).get(kind.names)
    if not isinstance(names, list) or not names or not all(isinstance(name, bytes | str) for name in names):
        raise UserError(f"{path} has no list of class names '{kind.names}'; fetch it anew")
    return tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in names)


def _read_batch(path: str, label_field: str, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels (N, 3072) uint8 and labels (N,) int64."""
    batch = read_array_pickle(path)
    images, labels = batch.get("data"), batch.get(label_field)
    if not isinstance(images, np.ndarray) or images.ndim != 2 or images.shape[1] != _PIXELS or not len(images):
        shape = getattr(images, "shape", type(images).__name__)
        raise UserError(f"{path}: 'data' must be N x {_PIXELS} unsigned bytes, but is {shape}")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise UserError(f"{path}: '{label_field}' must be a list of whole numbers, one for each image")
    if len(labels) != len(images):
        raise UserError(f"{path} has {len(images):,} images, but {len(labels):,} labels; fetch it anew")
    if not 0 <= min(labels) <= max(labels) < num_classes:
        raise UserError(f"{path}: labels from {min(labels)} to {max(labels)}, but there are {num_classes} class names")
    return images, np.array(labels, dtype=np.int64)
