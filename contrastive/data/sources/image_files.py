"""Files of images: with labels, captions or masks, or alone."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from contrastive.data.class_sets import class_names_beside
from contrastive.data.record import BadSample, FaultCounts, Record, Source, check_index, check_split, fingerprint_of
from contrastive.data.shards.shard_index import PackedBytes
from contrastive.data.sources import open_source
from contrastive.data.sources.beside import FileBeside
from contrastive.data.sources.paths import is_image, read_image_file
from contrastive.errors import UserError

JUNK = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
"""Folders that other programs leave; those that begin with a dot are left out too."""


@dataclass(frozen=True)
class FolderCaptions:
    """Where the captions of a folder's images are.

    names, weights: as `Beside.captions` takes them. identity: what of it goes into the source's fingerprint. reading:
    the source's.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...] | None
    identity: tuple[str, ...]
    reading: str


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
        self._root, self._labels = root, labels
        self._names, self._weights = (captions.names, captions.weights) if captions else ((), None)
        self.columns_read = ("caption_column",) if captions else ()
        self._paths = PackedBytes.of(os.fsencode(path) for path in paths)
        self.fingerprint = fingerprint_of(os.fsencode("\0".join((*paths, *(captions.identity if captions else ())))))
        self.reading = (
            captions.reading if captions else f"{len(class_names)} class folders" if class_names else "images alone"
        )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Record:
        path, beside = self._locate(index)
        image = read_image_file(path, beside.key)
        captions, weights = beside.captions(self._names, self._weights)
        return Record(beside.key, image, captions, self.label(index), weights)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._locate(index)[1].captions(self._names, self._weights)[0]

    def _locate(self, index: int) -> tuple[str, FileBeside]:
        relative = self._paths[check_index(self, index)]
        path = os.path.join(self._root, os.fsdecode(relative))
        return path, FileBeside(os.path.splitext(path)[0], relative.decode("utf-8", "backslashreplace"))


def files_below(root: str) -> tuple[list[str], list[str]]:
    """Return the images in a folder and below it, and the files that are none, sorted, by their paths in it."""
    images, others = [], []
    for path in sorted(_walk(root)):
        (images if is_image(path) and not is_hidden(path) else others).append(path)
    return images, others


def _walk(root: str) -> Iterator[str]:
    seen = set()  # folders linked in a circle would have no end
    for folder, subfolders, names in os.walk(root, followlinks=True):
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        subfolders[:] = sorted(name for name in subfolders if name not in JUNK and not name.startswith("."))
        relative = os.path.relpath(folder, root)
        for name in names:
            yield name if relative == os.curdir else os.path.join(relative, name)


def is_hidden(path: str) -> bool:
    return path.startswith(".") or f"{os.sep}." in path  # no hidden folder is looked into


# Images and their masks


class MaskFolder(ImageFiles):
    """Images that each have a mask; `classnames.txt` or `classes.json` in `root` names the masks' values from 0.

    Args:
        pairs: paths of image and mask, relative to `root`.
    """

    labelled = captioned = False
    masked = True

    def __init__(self, name: str, root: str, pairs: Sequence[tuple[str, str]]):
        super().__init__(name, root, [image for image, _ in pairs])
        self._masks = [mask for _, mask in pairs]
        self.mask_names = class_names_beside(root)
        self.fingerprint = fingerprint_of("\0".join(path for pair in pairs for path in pair))
        self.reading = f"masks: '{os.path.dirname(self._masks[0])}'"

    def __getitem__(self, index: int) -> Record:
        key = self._locate(index)[1].key
        try:
            mask = read_image_file(os.path.join(self._root, self._masks[index]), key)
        except BadSample:
            raise BadSample("unreadable_mask", key) from None
        return replace(super().__getitem__(index), mask=mask)


# How VOC, ADE20k and mmsegmentation lay masks out: ROOT/images/a.jpg and ROOT/masks/a.png. A split is a folder of that
# name in both, or a list of names, ROOT/ImageSets/Segmentation/SPLIT.txt.
_IMAGES = ("images", "JPEGImages", "img_dir")
_MASKS = ("masks", "SegmentationClass", "annotations", "ann_dir")
_LISTS = Path("ImageSets", "Segmentation")


def open_masks(spec: str, root: str, split: str | None) -> MaskFolder | None:
    """Open a folder of images and masks; None where it is none: `annotations` of COCO hold no PNGs.

    Images without a mask, and the reverse, are left aside and counted.

    Raises:
        UserError: no image has a mask of its name, splits of which none is named, or none of that name.
    """
    images = next((name for name in _IMAGES if os.path.isdir(os.path.join(root, name))), None)
    masks = next((name for name in _MASKS if any(Path(root, name).rglob("*.png"))), None)
    if images is None or masks is None:
        return None
    of_image, of_mask = (
        {os.path.splitext(path)[0]: path for path in files_below(os.path.join(root, name))[0]}
        for name in (images, masks)
    )
    lists = {path.stem: path for path in sorted(Path(root, _LISTS).glob("*.txt"))}
    # Splits are folders where all masks lie in some.
    inside = {stem.split(os.sep)[0] for stem in of_mask} if all(os.sep in stem for stem in of_mask) else set()
    splits = sorted(inside | lists.keys())
    if split is None and inside:
        raise UserError(f"{spec} has the splits {', '.join(splits)}; give one, as '{spec}:{splits[0]}'")
    if split is not None:
        if not splits:
            raise UserError(
                f"{spec}: '{masks}' has no folders, nor is there {_LISTS}/{split}.txt; leave ':{split}' out"
            )
        check_split(spec, split, splits)
        wanted = lists[split].read_text("utf-8", "replace").split() if split in lists else None
        chosen = {*wanted} if wanted else {stem for stem in (*of_image, *of_mask) if stem.split(os.sep)[0] == split}
        of_image, of_mask = ({s: path for s, path in of.items() if s in chosen} for of in (of_image, of_mask))
    both = sorted(of_image.keys() & of_mask.keys())
    if not both:
        one, other = (next(iter(of.values()), "nothing") for of in (of_image, of_mask))
        raise UserError(
            f"{spec}: no image has a mask of its name: '{images}' has '{one}', '{masks}' has '{other}'; a.jpg is "
            "masked by a.png, in a folder of the same name where there are some"
        )
    pairs = [(os.path.join(images, of_image[stem]), os.path.join(masks, of_mask[stem])) for stem in both]
    source = MaskFolder(spec, root, pairs)
    source.left_aside = FaultCounts()
    for stem in sorted(of_image.keys() - of_mask.keys()):
        source.left_aside.add("images without a mask", of_image[stem])
    for stem in sorted(of_mask.keys() - of_image.keys()):
        source.left_aside.add("masks without image", of_mask[stem])
    return source


# Images alone


def open_images(places: Sequence[str]) -> Source:
    """Open one data source (see `open_source`), one folder of images in any order, or image files.

    A folder that is no data set, for its images have neither captions nor classes, gives all images below it.

    Raises:
        UserError: nothing of that name, no image in it, or several places that are not image files.
    """
    files = [os.path.expanduser(place) for place in places]
    if all(is_image(path) and not os.path.isdir(path) for path in files):
        if missing := [path for path in files if not os.path.isfile(path)]:
            raise UserError(f"no image at {missing[0]}: no such file")
        return _alone(places[0] if len(places) == 1 else f"{len(places)} images", os.curdir, files)
    if len(places) > 1:
        raise UserError(f"{' '.join(places)}: give one data source or folder, or any number of image files")
    try:
        return open_source(places[0])
    except UserError:
        found = files_below(files[0])[0] if os.path.isdir(files[0]) else []
        if not found:
            raise
        return _alone(places[0], files[0], found)


def _alone(name: str, root: str, paths: Sequence[str]) -> ImageFiles:
    source = ImageFiles(name, root, paths)
    # Photos are called alike in many folders, and are edited: names alone do not tell whose embeddings are kept.
    seen = (os.stat(os.path.join(root, path)) for path in paths)
    source.fingerprint = fingerprint_of(
        "\0".join([source.fingerprint, *(f"{s.st_size} {s.st_mtime_ns}" for s in seen)])
    )
    return source
