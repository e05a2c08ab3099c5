"""A folder of images and of their masks, as VOC, ADE20k and mmsegmentation lay them out.

ROOT/images/a.jpg and ROOT/masks/a.png; images are also in JPEGImages or img_dir, masks in SegmentationClass,
annotations or ann_dir. A split is a folder of that name in both, or a list of names,
ROOT/ImageSets/Segmentation/SPLIT.txt.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from contrastive.data.class_sets import class_names_beside
from contrastive.data.record import BadSample, FaultCounts, Record, Source, check_index, check_split, fingerprint_of
from contrastive.data.sources.folder_captions import is_hidden
from contrastive.data.sources.paths import IMAGE_SUFFIXES, read_image_file
from contrastive.errors import UserError

IMAGES = ("images", "JPEGImages", "img_dir")
MASKS = ("masks", "SegmentationClass", "annotations", "ann_dir")
LISTS = Path("ImageSets", "Segmentation")


class MaskFolder(Source):
    """Images that each have a mask; `classnames.txt` or `classes.json` in `root` names the masks' values from 0.

    Args:
        root: the folder that `pairs` are relative to.
        pairs: paths of image and mask.
    """

    labelled = captioned = False
    masked = True

    def __init__(self, name: str, root: str, pairs: Sequence[tuple[str, str]]):
        self.name, self._root, self._pairs = name, root, tuple(pairs)
        self.mask_names = class_names_beside(root)
        self.fingerprint = fingerprint_of("\0".join(path for pair in self._pairs for path in pair))
        self.reading = f"masks: '{os.path.dirname(self._pairs[0][1])}'"

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Record:
        image, mask = (os.path.join(self._root, path) for path in self._pairs[check_index(self, index)])
        key = os.path.relpath(image, self._root)
        try:
            mask = read_image_file(mask, key)
        except BadSample:
            raise BadSample("unreadable_mask", key) from None
        return Record(key, read_image_file(image, key), mask=mask)


def find_masks(root: str) -> tuple[str, str] | None:
    """Return the names of the two folders, where there are two and one holds PNGs; `annotations` of COCO hold none."""
    images = next((name for name in IMAGES if os.path.isdir(os.path.join(root, name))), None)
    masks = next((name for name in MASKS if any(Path(root, name).rglob("*.png"))), None)
    return (images, masks) if images and masks else None


def open_masks(spec: str, root: str, images: str, masks: str, split: str | None) -> MaskFolder:
    """Open what `find_masks` found. Images without a mask, and the reverse, are left aside and counted.

    Raises:
        UserError: no image has a mask of its name, splits of which none is named, or none of that name.
    """
    folders = {name: _by_stem(Path(root, name)) for name in (images, masks)}
    of_image, of_mask = folders[images], folders[masks]
    lists = {path.stem: path for path in sorted(Path(root, LISTS).glob("*.txt"))}
    # Splits are folders where all masks lie in some.
    inside = {stem.split(os.sep)[0] for stem in of_mask} if all(os.sep in stem for stem in of_mask) else set()
    splits = sorted(inside | lists.keys())
    if split is None and inside:
        raise UserError(f"{spec} has the splits {', '.join(splits)}; give one, as '{spec}:{splits[0]}'")
    if split is not None:
        if not splits:
            raise UserError(f"{spec}: '{masks}' has no folders, nor is there {LISTS}/{split}.txt; leave ':{split}' out")
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
    for reason, of, others in (
        ("images without a mask", of_image, of_mask),
        ("masks without image", of_mask, of_image),
    ):
        for stem in sorted(of.keys() - others.keys()):
            source.left_aside.add(reason, of[stem])
    return source


def _by_stem(folder: Path) -> dict[str, str]:
    """Paths below the folder, by themselves without the ending."""
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    return {os.path.splitext(path)[0]: path for path in found if _is_image(path)}


def _is_image(path: str) -> bool:
    return path.rpartition(".")[2].lower() in IMAGE_SUFFIXES and not is_hidden(path)
