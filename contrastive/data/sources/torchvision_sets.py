"""Well-known labelled sets by name alone, as 'food101:test': torchvision.datasets fetches and lays out their files."""

import os
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from contrastive.data.class_sets import ClassSet, class_names_beside, class_set, class_sets
from contrastive.data.prompts import load_templates
from contrastive.data.record import Source, check_split
from contrastive.errors import UserError
from contrastive.files import cache_folder
from contrastive.log import say

Content = tuple[Any, Sequence[int]]  # images, in one array or as the paths of their files, and labels


class TorchvisionSet(NamedTuple):
    """A class of torchvision.datasets, and what differs from one of them to another.

    loader: its name.
    splits: to the arguments that choose them; the first one is opened where none is named.
    content: reads images and labels off a dataset, without opening a file of an image.
    own_names: attribute with the names of the classes, to be found among the shipped ones (see `class_set`).
        None: the labels are the numbers of the shipped names.
    fetched: whether torchvision knows where to fetch it.
    """

    loader: str
    splits: dict[str, dict[str, Any]]
    content: Callable[[Any], Content]
    own_names: str | None = "classes"
    fetched: bool = True


def _splits(*names: str) -> dict[str, dict[str, Any]]:
    return {name: {"split": name} for name in names}


def _pairs(attribute: str) -> Callable[[Any], Content]:
    return lambda dataset: tuple(zip(*getattr(dataset, attribute), strict=True))


def _letters(dataset: Any) -> Content:
    return dataset.data.transpose(1, 2), dataset.targets - 1  # stored lying on their side, and 'a' is number 1


def _caltech(dataset: Any) -> Content:
    root, names = Path(dataset.root, "101_ObjectCategories"), dataset.categories
    places = zip(dataset.y, dataset.index, strict=True)
    return [root / names[label] / f"image_{number:04d}.jpg" for label, number in places], dataset.y


def _lymph_nodes(dataset: Any) -> Content:
    """All of a split in memory: 0.9 GB of 'val' or 'test', 7.2 GB of 'train'."""
    (images, _, _), (targets, _, _) = (dataset._FILES[dataset._split][kind] for kind in ("images", "targets"))
    with dataset.h5py.File(dataset._base_folder / images) as file:
        pixels = file["x"][:]
    with dataset.h5py.File(dataset._base_folder / targets) as file:
        return pixels, file["y"][:].reshape(-1)


_TRAIN_TEST = {"train": {"train": True}, "test": {"train": False}}
_LETTERS = {name: {"split": "letters", **arguments} for name, arguments in _TRAIN_TEST.items()}
# Where torchvision's classes keep images and labels. Some names are private to them: no public one gives the labels
# without decoding every image. A test reads each set from files in its own layout.
_TARGETS, _LABELS = attrgetter("data", "targets"), attrgetter("data", "labels")
_FILES, _SAMPLES, _FOLDERS = attrgetter("_image_files", "_labels"), _pairs("_samples"), _pairs("samples")

SETS = {
    "mnist": TorchvisionSet("MNIST", _TRAIN_TEST, _TARGETS, None),
    "fashion_mnist": TorchvisionSet("FashionMNIST", _TRAIN_TEST, _TARGETS),
    "kmnist": TorchvisionSet("KMNIST", _TRAIN_TEST, _TARGETS),
    "letters": TorchvisionSet("EMNIST", _LETTERS, _letters, None),
    "cifar10": TorchvisionSet("CIFAR10", _TRAIN_TEST, _TARGETS),
    "cifar100": TorchvisionSet("CIFAR100", _TRAIN_TEST, _TARGETS),
    "caltech101": TorchvisionSet("Caltech101", {"all": {}}, _caltech, "categories"),
    "country211": TorchvisionSet("Country211", _splits("train", "valid", "test"), _FOLDERS, None),
    "dtd": TorchvisionSet("DTD", _splits("train", "val", "test"), _FILES),
    "eurosat": TorchvisionSet("EuroSAT", {"all": {}}, _FOLDERS),
    "fer2013": TorchvisionSet("FER2013", _splits("train", "test"), _SAMPLES, None, fetched=False),
    "fgvc_aircraft": TorchvisionSet("FGVCAircraft", _splits("train", "val", "trainval", "test"), _FILES),
    "flowers102": TorchvisionSet("Flowers102", _splits("train", "val", "test"), _FILES),
    "food101": TorchvisionSet("Food101", _splits("train", "test"), _FILES),
    "gtsrb": TorchvisionSet("GTSRB", _splits("train", "test"), _SAMPLES, None),
    "imagenette": TorchvisionSet("Imagenette", _splits("train", "val"), _SAMPLES, "wnids"),
    "pcam": TorchvisionSet("PCAM", _splits("train", "val", "test"), _lymph_nodes, None),
    "pets": TorchvisionSet("OxfordIIITPet", _splits("trainval", "test"), attrgetter("_images", "_labels")),
    "rendered_sst2": TorchvisionSet("RenderedSST2", _splits("train", "val", "test"), _SAMPLES),
    "stanford_cars": TorchvisionSet("StanfordCars", _splits("train", "test"), _SAMPLES),
    "stl10": TorchvisionSet("STL10", _splits("train", "test"), _LABELS),
    "sun397": TorchvisionSet("SUN397", {"all": {}}, _FILES),
    "svhn": TorchvisionSet("SVHN", _splits("train", "test"), _LABELS, None),
}
"""The sets by the names under which they are opened."""

# Those whose files, wherever they lie, are read as 'FOLDER:SPLIT' too.
_ALSO_AS_FOLDERS = ("mnist", "fashion_mnist", "kmnist", "cifar10", "cifar100")
# The folder that the archive unpacks to, and two files that tell it.
_CIFAR = {
    "cifar10": ("cifar-10-batches-py", ("data_batch_1", "test_batch")),
    "cifar100": ("cifar-100-python", ("train", "test")),
}


def open_named(dataset: str, split: str) -> Source:
    """Open a split of one of `SETS`, the first one when it is empty, from $CONTRASTIVE_CACHE/datasets/DATASET.

    Where that folder is not there, torchvision fetches all splits of the set; of all processes one does, the others
    wait. Class names are the shipped ones where there are any, else the set's own.

    Raises:
        UserError: an unknown split; it is not there and cannot be fetched; or its files are damaged.
    """
    from filelock import FileLock

    from contrastive.data.sources.arrays import idx_folder, open_idx

    entry, root = SETS[dataset], os.path.join(cache_folder(), "datasets", dataset)
    first = next(iter(entry.splits))
    if not split and os.path.isdir(dataset) and dataset not in _ALSO_AS_FOLDERS:
        raise UserError(f"'{dataset}' is a set's name and a folder here; give '{dataset}:{first}' or './{dataset}'")
    split = split or first
    name = f"{dataset}:{split}"
    check_split(name, split, entry.splits)
    try:
        if not os.path.isdir(root):
            os.makedirs(os.path.dirname(root), exist_ok=True)
            with FileLock(f"{root}.lock"):
                if not os.path.isdir(root):  # another process may have been first
                    _fetch(dataset, root)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{name}: cannot be kept in {root} ({reason}); set CONTRASTIVE_CACHE") from None
    for folder in (os.path.join(root, entry.loader), root):
        if idx_folder(folder):
            return open_idx(name, folder, split)
    return open_cifar(name, root, split) if cifar_folders(root) else _read(name, root, dataset, split)


def cifar_folders(folder: str) -> dict[str, str]:
    """Return where the batches of CIFAR-10 and CIFAR-100 lie: in `folder`, or in the one their archive unpacks to."""
    return {
        dataset: place
        for dataset, (below, files) in _CIFAR.items()
        for place in (folder, os.path.join(folder, below))
        if all(os.path.isfile(os.path.join(place, file)) for file in files)
    }


def open_cifar(name: str, folder: str, split: str) -> Source:
    """Open one split of CIFAR-10 or CIFAR-100 (fine labels), under its own class names or those beside its files.

    The batches are pickles, which are programs: torchvision reads only files with the checksums of its author's.

    Raises:
        UserError: an unknown split, or a missing or altered file.
    """
    found = cifar_folders(folder)
    if len(found) > 1:
        raise UserError(f"{name}: it holds both CIFAR-10 and CIFAR-100; give one of {' and '.join(found.values())}")
    [(dataset, within)] = found.items()
    check_split(name, split, SETS[dataset].splits)
    # torchvision looks for a folder of the archive's name; the files may lie in one of any name.
    return _read(name, within, dataset, split, {"base_folder": ""})


def _read(name: str, root: str, dataset: str, split: str, altered: dict[str, Any] | None = None) -> Source:
    """Have torchvision read a split from `root`. altered: attributes of its class to be overridden."""
    from torchvision import datasets

    from contrastive.data.sources.arrays import ArrayImages
    from contrastive.data.sources.image_files import ImageFiles

    entry = SETS[dataset]
    loader = type(entry.loader, (getattr(datasets, entry.loader),), altered or {})
    try:
        held = loader(root, **entry.splits[split])
        images, labels = entry.content(held)
    except Exception as error:  # whatever missing, altered or damaged files lead it to
        raise UserError(
            f"{name} cannot be read ({_line(error)}); {root} has to hold its files, unaltered, as torchvision.datasets."
            f"{entry.loader} lays them out"
        ) from None
    labels = np.asarray(labels)
    if labels.dtype == object:  # None among them
        raise UserError(f"{name}: its files in {root} have no labels")
    known = class_set(dataset) if dataset in class_sets() else None
    labels, class_names = labels.astype(np.int64), class_names_beside(root) or _class_names(entry, known, held)
    if isinstance(images[0], str | Path):
        paths = np.array([os.path.relpath(path, root) for path in images])
        order = np.argsort(paths)  # some come as the disk has them
        source = ImageFiles(name, root, paths[order].tolist(), labels[order], class_names)
    else:
        source = ArrayImages(name, _pixels(images), labels, class_names)
    if known and known.places(class_names):  # the digits of SVHN are no handwritten ones
        source.templates = load_templates(dataset)
    return source


def _class_names(entry: TorchvisionSet, known: ClassSet | None, held: Any) -> tuple[str, ...]:
    """The shipped names in the order of the labels, by what the set calls its classes; else its own."""
    own_names = getattr(held, entry.own_names or "", None)
    if own_names is None:  # the labels are the numbers of the shipped names
        return known.names
    places = known and known.places(own_names)
    # A classifier of CIFAR has the names of its files, whichever way they were opened.
    return tuple(own_names if places is None or known.name in _CIFAR else (known.names[place] for place in places))


def _pixels(images: Any) -> np.ndarray:
    """Return images, an array, a tensor or a sequence of them, as ArrayImages takes them."""
    pixels = np.asarray(images) if hasattr(images, "shape") else np.stack([np.asarray(image) for image in images])
    return pixels.transpose(0, 2, 3, 1) if pixels.shape[1:2] == (3,) and pixels.ndim == 4 else pixels


def _fetch(dataset: str, root: str) -> None:
    """Download beside `root` and rename, so that a download cut short is never taken for the set."""
    from torchvision import datasets

    entry, part = SETS[dataset], f"{root}.part"
    try:
        if not entry.fetched:
            raise ValueError("torchvision has no address for it")
        say(f"fetching {dataset} into {root}")
        for arguments in entry.splits.values():
            getattr(datasets, entry.loader)(part, download=True, **arguments)
    except Exception as error:  # the network's, the archive's and torchvision's own
        what = f"put its files into {root} as torchvision.datasets.{entry.loader} lays them out"
        if dataset in _ALSO_AS_FOLDERS:
            own = f"./{dataset}" if os.path.isdir(dataset) else f"/data/{dataset}"
            what = f"give the folder of its files, as '{own}:train', or put them into {root}"
        raise UserError(f"{dataset} cannot be fetched ({_line(error)}); {what}") from None
    os.rename(part, root)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
