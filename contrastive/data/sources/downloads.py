"""Well-known small data sets by name alone: `mnist`, `fashion_mnist`, `cifar10`, `cifar100`."""

import os
from collections.abc import Callable
from typing import NamedTuple

from filelock import FileLock

from contrastive.data.sources.array_images import ArrayImages
from contrastive.data.sources.cifar_batches import is_cifar_folder, open_cifar
from contrastive.data.sources.idx import is_idx_folder, open_idx
from contrastive.errors import UserError, did_you_mean
from contrastive.files import cache_folder
from contrastive.log import say

SPLITS = ("train", "test")


class _Download(NamedTuple):
    """A class of torchvision.datasets, and how what it fetches is found and opened."""

    torchvision: str
    subfolder: str
    is_there: Callable[[str], bool]
    open: Callable[[str, str, str], ArrayImages]


DOWNLOADS = {
    "mnist": _Download("MNIST", "MNIST", is_idx_folder, open_idx),
    "fashion_mnist": _Download("FashionMNIST", "FashionMNIST", is_idx_folder, open_idx),
    "cifar10": _Download("CIFAR10", "cifar-10-batches-py", is_cifar_folder, open_cifar),
    "cifar100": _Download("CIFAR100", "cifar-100-python", is_cifar_folder, open_cifar),
}


def open_download(dataset: str, split: str) -> ArrayImages:
    """Open a split of one of `DOWNLOADS`, 'train' when it is empty, from $CONTRASTIVE_CACHE/datasets/DATASET.

    Where that folder is not there, torchvision fetches the set; of all processes one does, the others wait.

    Raises:
        UserError: an unknown split, or it is not there and cannot be fetched.
    """
    split = split or "train"
    name = f"{dataset}:{split}"
    if split not in SPLITS:
        raise UserError(f"{name}: unknown split '{split}'; use train or test.{did_you_mean(split, SPLITS)}")
    download, root = DOWNLOADS[dataset], os.path.join(cache_folder(), "datasets", dataset)
    folder = _find(download, root)
    if folder is None:
        try:
            os.makedirs(os.path.dirname(root), exist_ok=True)
            with FileLock(f"{root}.lock"):
                folder = _find(download, root) or _fetch(download, dataset, root)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{name}: cannot be kept in {root} ({reason}); set CONTRASTIVE_CACHE") from None
    return download.open(name, folder, split)


def _find(download: _Download, root: str) -> str | None:
    """The set's files in `root`, laid out as torchvision does or put there as they are."""
    folders = (os.path.join(root, download.subfolder), root)
    return next((folder for folder in folders if download.is_there(folder)), None)


def _fetch(download: _Download, dataset: str, root: str) -> str:
    """Download beside `root` and rename, so that a download cut short is never taken for the set."""
    from torchvision import datasets

    part = f"{root}.part"
    say(f"fetching {dataset} into {root}")
    try:
        getattr(datasets, download.torchvision)(part, download=True)
    except Exception as error:  # the network's, the archive's and torchvision's own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        own = f"./{dataset}" if os.path.isdir(dataset) else f"/data/{dataset}"
        raise UserError(
            f"{dataset} cannot be fetched ({reason}); give the folder of its files, as '{own}:train', "
            f"or put them into {root}"
        ) from None
    if _find(download, part) is None:
        raise UserError(f"{dataset}: torchvision fetched something else than its files into {part}")
    os.rename(part, root)
    return _find(download, root)
