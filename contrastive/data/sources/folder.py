"""A folder of image files, with class folders or with captions beside the images."""

import fnmatch
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from contrastive.data.class_sets import class_set_beside
from contrastive.data.record import Record, Source, check_index, fingerprint_of
from contrastive.data.shards.shard_index import PackedBytes
from contrastive.data.sources.beside import Captions
from contrastive.data.sources.columns import Columns
from contrastive.data.sources.folder_captions import (
    FORMS,
    FileBeside,
    FolderCaptions,
    FolderFiles,
    captions_table,
    find_captions,
    find_metadata,
    is_hidden,
    open_inside,
    sort_files,
)
from contrastive.data.sources.paths import IMAGE_SUFFIXES, read_image_file
from contrastive.errors import UserError

_JUNK = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
"""Folders that other programs leave; those that begin with a dot are left out too."""
_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "dev"}


class ImageFiles(Source):
    """Files of images, with labels or captions in files beside them, or neither. The fingerprint covers the paths.

    Args:
        root: the folder that `paths` are relative to.
        labels: int64, one an image.
        captions: where they are, where there are no labels.
    """

    def __init__(
        self,
        name: str,
        root: str,
        paths: Sequence[str],
        labels: np.ndarray | None = None,
        class_names: tuple[str, ...] | None = None,
        captions: FolderCaptions | None = None,
    ):
        self.name, self.class_names = name, class_names
        self._root, self._labels, self._captions = root, labels, captions
        self.columns_read = ("caption_column",) if captions else ()
        self._paths = PackedBytes.of(os.fsencode(path) for path in paths)
        self.fingerprint = fingerprint_of(os.fsencode("\0".join((*paths, *(captions.identity if captions else ())))))
        self.reading = (
            captions.reading if captions else f"{len(class_names)} class folders" if class_names else "images alone"
        )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Record:
        path, key = self._locate(index)
        image, (captions, weights) = read_image_file(path, key), self._read_captions(path, key)
        return Record(key, image, captions, self.label(index), weights)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._read_captions(*self._locate(index))[0]

    def _read_captions(self, path: str, key: str) -> Captions:
        if self._captions is None:
            return (), None
        sample = FileBeside(os.path.splitext(path)[0], key)
        return sample.captions(self._captions.names, self._captions.weights)

    def _locate(self, index: int) -> tuple[str, str]:
        relative = self._paths[check_index(self, index)]
        path = os.path.join(self._root, os.fsdecode(relative))
        return path, relative.decode("utf-8", "backslashreplace")


def open_folder(name: str, root: str, columns: Columns | None = None) -> Source:
    """Open images with captions beside them, a folder with metadata.csv, or ROOT/class_name/*.jpg (at any depth below).

    One .txt beside an image, or one .json with a caption, is enough to make it a captioned folder; images without one
    have no caption. Class names are the sorted names of the first-level folders that hold images, in the order of their
    numbers where all are whole numbers. Hidden files and folders are left out.

    Raises:
        UserError: no images; neither captions nor class folders; splits or a single folder for classes.
    """
    columns, found = columns or Columns(), sorted(_walk(root))
    images = _images_among(found)
    chosen = set(images)
    files = sort_files(root, images, [path for path in found if path not in chosen])
    if not images:
        raise UserError(f"{name}: {_nothing_found(files)}; {files.there()}; {FORMS}")
    if table := find_metadata(name, files):
        return open_inside(name, files, table, replace(columns, image=columns.image or "file_name"))
    captions = find_captions(name, files, columns.caption)
    if captions is None and (table := captions_table(name, files)):
        return open_inside(name, files, table, columns)
    source: Source = ImageFiles(name, root, images, captions=captions) if captions else _in_classes(name, files)
    if not captions and (known := class_set_beside(root)):
        from contrastive.data.class_joining import named

        source = named(source, known.name)
    source.left_aside = files.left_aside
    for suffix in captions.names if captions else ():
        source.left_aside.pop(suffix, None)
    tops = sorted({path.split(os.sep, 1)[0] for path in images}) if captions else []
    if len(tops) > 1 and _are_splits(tops):
        source.reading += f"; {', '.join(tops)} are taken together"
    return source


def images_below(root: str) -> list[str]:
    """Return the images in a folder and below it, by their paths in it."""
    return _images_among(sorted(_walk(root)))


def _images_among(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if path.rpartition(".")[2].lower() in IMAGE_SUFFIXES and not is_hidden(path)]


def _in_classes(name: str, files: FolderFiles) -> ImageFiles:
    root, images = files.root, files.images
    class_names = _class_names(name, files)
    number = {folder: label for label, folder in enumerate(class_names)}
    labels = np.array([number[path.split(os.sep, 1)[0]] for path in images], dtype=np.int64)
    source = ImageFiles(name, root, images, labels, class_names)
    source.reading += _numbering(class_names)
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if class_names != tuple(folder for folder in folders if not folder.startswith(".")):
        # Labels are not what the paths alone would make them: by the place of each folder among all.
        source.fingerprint = fingerprint_of(os.fsencode("\0".join((*images, "", *class_names))))
    for folder in set(folders) - number.keys():
        of_system = folder in _JUNK or folder[0] == "."
        files.left_aside.add("system folders" if of_system else "folders without images", folder)
    return source


def _walk(root: str) -> Iterator[str]:
    seen = set()  # folders linked in a circle would have no end
    for folder, subfolders, names in os.walk(root, followlinks=True):
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        subfolders[:] = sorted(name for name in subfolders if name not in _JUNK and not name.startswith("."))
        relative = os.path.relpath(folder, root)
        for name in names:
            yield name if relative == os.curdir else os.path.join(relative, name)


def _class_names(name: str, files: FolderFiles) -> tuple[str, ...]:
    images = files.images
    loose = [path for path in images if os.sep not in path]
    if loose:
        raise UserError(
            f"{name}: the images have neither captions (a .txt of the same name beside each) nor class folders: "
            f"{len(loose)} of {len(images)} lie in no sub-folder, as '{loose[0]}'; {files.there()}; {FORMS}"
        )
    folders = sorted({path.split(os.sep, 1)[0] for path in images})
    if _are_splits(folders):
        raise UserError(f"{name}: its folders are splits ({', '.join(folders)}); give one, as '{name}/{folders[0]}'")
    if len(folders) == 1:
        raise UserError(
            f"{name}: one class folder only ('{folders[0]}'); give images a caption each (a .txt of the same name "
            f"beside each), or one folder a class; {files.there()}; {FORMS}"
        )
    _check_levels(name, files, folders)
    if not all(map(_is_number, folders)):
        return tuple(folders)
    by_number = {int(folder): folder for folder in folders}
    if len(by_number) < len(folders):
        other = next(folder for folder in folders if by_number[int(folder)] != folder)
        raise UserError(f"{name}: class folders '{other}' and '{by_number[int(other)]}' are the same number")
    return tuple(by_number[number] for number in sorted(by_number))


def _is_number(folder: str) -> bool:
    return folder.isascii() and folder.isdecimal()


def _numbering(class_names: tuple[str, ...]) -> str:
    if not all(map(_is_number, class_names)):
        return ""
    first, last = int(class_names[0]), int(class_names[-1])
    told = "the number is the label" if first == 0 else f"label 0 is '{class_names[0]}'"
    gaps = last - first >= len(class_names)
    return f", numbered {first} to {last}{' with gaps, which labels have not' if gaps else f': {told}'}"


def _are_splits(names: Sequence[str]) -> bool:
    """Whether all names are those of splits: 'train', 'val2017'."""
    return _SPLIT_NAMES.issuperset(name.lower().rstrip("0123456789") for name in names)


def splits_of(paths: Sequence[str]) -> list[str]:
    """Return what files named as 'test-00000-of-00001.parquet', 'train-0.tar' begin with; [] unless all are such."""
    begins = sorted({re.split(r"[-_.]", os.path.basename(path))[0] for path in paths})
    return begins if _are_splits(begins) else []


def _check_levels(name: str, files: FolderFiles, folders: list[str]) -> None:
    """Raise UserError where first-level folders are no classes: shards of img2dataset; domains of the same classes."""
    told = "json" in files.beside or any(path.endswith("_stats.json") for path in files.others)
    numbered = all(re.fullmatch(r"(\d{5,})/\1\d{4}\.\w+", path) for path in files.images[:100])
    if (told or numbered) and all(re.fullmatch(r"\d{5,}", folder) for folder in folders):
        raise UserError(
            f"{name}: folders of img2dataset ('{folders[0]}', ...), but no KEY.txt nor a caption in KEY.json beside "
            f"the images; {files.there()}"
        )
    below: dict[str, set[str]] = {folder: set() for folder in folders}
    for path in files.images:
        first, second, *more = path.split(os.sep, 2)
        below[first].add(second if more else "")
    shared = {each for each in set.intersection(*below.values()) if not each.isdecimal()} - _SPLIT_NAMES
    if len(shared) > 1 and not any("" in each for each in below.values()):
        one, other = sorted(shared)[:2]
        raise UserError(
            f"{name}: the same folders ('{one}', '{other}', ...) lie in '{folders[0]}', '{folders[1]}', ...; class "
            f"folders have to be the first level: give one, as '{name}/{folders[0]}'"
        )


def _nothing_found(files: FolderFiles) -> str:
    for suffix in ("tar", "parquet", "csv", "tsv", "jsonl"):
        for path in sorted(files.others, key=lambda path: path.count(os.sep)):
            if path.endswith(f".{suffix}"):
                folder, ending = os.path.dirname(path), f"*.{suffix}"
                alike = [other for other in files.others if fnmatch.fnmatch(other, os.path.join(folder, ending))]
                those = [os.path.join(files.root, folder, split + ending) for split in splits_of(alike) or [""]]
                return f"no images in this folder, but .{suffix} files; give {' or '.join(map(repr, those))}"
    return f"no images in this folder ({', '.join(IMAGE_SUFFIXES)})"
