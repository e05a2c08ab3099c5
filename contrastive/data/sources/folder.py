"""A folder of image files, with class folders or with captions beside the images."""

import os
from collections.abc import Iterator, Sequence

import numpy as np

from contrastive.data.record import BadSample, Record, Source, check_index, fingerprint_of
from contrastive.data.shards.shard_index import PackedBytes
from contrastive.data.sources.paths import IMAGE_SUFFIXES, read_image_file
from contrastive.errors import UserError

MAX_TEXT_BYTES = 2**20
_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "dev"}


class ImageFiles(Source):
    """Files of images, with labels or with captions in .txt files beside them. The fingerprint covers the paths.

    Args:
        root: the folder that `paths` are relative to.
        labels: int64, one an image. None: captions are looked for.
        texts: the paths of the captions.
    """

    def __init__(
        self,
        name: str,
        root: str,
        paths: Sequence[str],
        labels: np.ndarray | None = None,
        class_names: tuple[str, ...] | None = None,
        texts: Sequence[str] = (),
    ):
        self.name, self.class_names = name, class_names
        self._root, self._labels = root, labels
        self._paths = PackedBytes.of(os.fsencode(path) for path in paths)
        self.fingerprint = fingerprint_of(os.fsencode("\0".join((*paths, *texts))))
        self.reading = "captions: a .txt beside each image" if labels is None else f"{len(class_names)} class folders"

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Record:
        path, key = self._locate(index)
        return Record(key, read_image_file(path, key), self.captions(index), self.label(index))

    def captions(self, index: int) -> tuple[str, ...]:
        path, key = self._locate(index)
        if self._labels is not None:
            return ()
        try:
            with open(_text_path(path), "rb") as file:
                data = file.read(MAX_TEXT_BYTES + 1)
        except OSError:
            return ()
        if len(data) > MAX_TEXT_BYTES:
            raise BadSample("too_large", key)
        try:
            return (data.decode("utf-8-sig").rstrip("\r\n"),)
        except UnicodeDecodeError:
            raise BadSample("bad_utf8", key) from None

    def _locate(self, index: int) -> tuple[str, str]:
        relative = self._paths[check_index(self, index)]
        path = os.path.join(self._root, os.fsdecode(relative))
        return path, relative.decode("utf-8", "backslashreplace")


def open_folder(name: str, root: str) -> ImageFiles:
    """Open either ROOT/class_name/*.jpg (at any depth below the class folder), or images each with a .txt beside.

    One .txt beside an image is enough to make it a captioned folder; images without one have no caption.
    Class names are the sorted names of the first-level folders. Hidden files and folders are left out.

    Raises:
        UserError: no images; neither captions nor class folders; splits or a single folder for classes.
    """
    files = sorted(_walk(root))
    images = [path for path in files if path.rpartition(".")[2].lower() in IMAGE_SUFFIXES]
    texts = [path for path in files if path.rpartition(".")[2].lower() == "txt"]
    if not images:
        raise UserError(f"{name}: {_nothing_found(root)}")
    if not set(texts).isdisjoint(map(_text_path, images)):
        return ImageFiles(name, root, images, texts=texts)
    class_names = _class_names(name, root, images)
    number = {folder: label for label, folder in enumerate(class_names)}
    labels = np.array([number[path.split(os.sep, 1)[0]] for path in images], dtype=np.int64)
    return ImageFiles(name, root, images, labels, class_names)


def _walk(root: str) -> Iterator[str]:
    seen = set()  # folders linked in a circle would have no end
    for folder, subfolders, names in os.walk(root, followlinks=True):
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        relative = os.path.relpath(folder, root)
        for name in names:
            if not name.startswith("."):
                yield name if relative == os.curdir else os.path.join(relative, name)


def _text_path(image_path: str) -> str:
    return os.path.splitext(image_path)[0] + ".txt"


def _class_names(name: str, root: str, images: list[str]) -> tuple[str, ...]:
    loose = [path for path in images if os.sep not in path]
    if loose:
        raise UserError(
            f"{name}: the images have neither captions (a .txt of the same name beside each) nor class folders: "
            f"{len(loose)} of {len(images)} lie in no sub-folder, as '{loose[0]}'"
        )
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if _SPLIT_NAMES.issuperset(folder.lower() for folder in folders):
        raise UserError(f"{name}: its folders are splits ({', '.join(folders)}); give one, as '{name}/{folders[0]}'")
    if len(folders) == 1:
        raise UserError(
            f"{name}: one class folder only ('{folders[0]}'); give images a caption each (a .txt of the same name "
            "beside each), or one folder a class"
        )
    return tuple(folders)


def _nothing_found(root: str) -> str:
    for suffix in ("tar", "parquet", "csv", "tsv", "jsonl"):
        if any(entry.name.endswith(f".{suffix}") for entry in os.scandir(root)):
            return f"no images in this folder, but .{suffix} files; give '{os.path.join(root, f'*.{suffix}')}'"
    return f"no images in this folder ({', '.join(IMAGE_SUFFIXES)})"
