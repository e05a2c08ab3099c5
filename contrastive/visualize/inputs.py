"""Which images and texts the pictures are made of."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from contrastive.data.captions import caption_fault
from contrastive.data.preprocess import Preprocess
from contrastive.data.prompts import default_templates, fill
from contrastive.data.record import BadSample, Record, Source
from contrastive.data.sources import open_source
from contrastive.data.sources.image_file import IMAGE_SUFFIXES, read_image_file
from contrastive.errors import UserError
from contrastive.log import warn
from contrastive.visualize.weights import evenly_spread

MAX_CLASS_TEXTS = 12
"""A data set of more classes than that gives the captions of its images as texts, not its class names."""


@dataclass(frozen=True)
class Inputs:
    """Images as the model sees them, and what is known of them."""

    images: torch.Tensor
    """(B, 3, H, W) uint8: resized and cropped, before normalisation."""
    names: tuple[str, ...]
    """B file names or keys."""
    texts: tuple[str, ...]
    """Texts asked for, else those of the data; may be empty."""
    own: tuple[int | None, ...]
    """Of each image the number of the text that belongs to it, where the data says so."""
    texts_of_data: bool
    """Whether the texts are those of the data."""


@dataclass(frozen=True)
class _Image:
    name: str
    pixels: torch.Tensor
    text: str | None = None


def read_inputs(
    places: Sequence[str], preprocess: Preprocess, *, limit: int, texts: Sequence[str] | None = None
) -> Inputs:
    """Read the images that `places` name.

    Args:
        places: image files, folders of images, or data sources (see `open_source`).
        limit: of a folder or source so many images are taken, spread evenly over it.
        texts: None takes the texts of the data: the class names in a prompt where there are few classes, else the
            first caption of each image.

    Raises:
        UserError: nothing of that name, an image file that cannot be read, no image at all, or a text that is empty.
    """
    for text in texts or ():
        if caption_fault(text):
            raise UserError(f"--text '{text[:40]}': {caption_fault(text)}; give words, as --text 'a red circle'")
    images: list[_Image] = []
    offered: list[str] = []
    for place in places:
        found, class_texts = _read_place(place, preprocess, limit)
        images += found
        offered += class_texts or [image.text for image in found if image.text]
    offered = list(dict.fromkeys(offered if texts is None else texts))
    return Inputs(
        images=torch.stack([image.pixels for image in images]),
        names=tuple(image.name for image in images),
        texts=tuple(offered),
        own=tuple(offered.index(image.text) if image.text in offered else None for image in images),
        texts_of_data=texts is None,
    )


def _read_place(place: str, preprocess: Preprocess, limit: int) -> tuple[list[_Image], list[str]]:
    """Return the images of one place, and the texts of its classes where there are few."""
    path = Path(place).expanduser()
    is_image_name = path.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES
    if is_image_name and not path.is_dir():
        return [_read_file(path, preprocess)], []
    if path.is_dir():
        files = _loose_images(path)
        if files:
            return [_read_file(files[place], preprocess) for place in evenly_spread(len(files), limit)], []
    elif path.is_file() and path.suffix.lower() not in (".tar", ".csv", ".tsv", ".jsonl", ".parquet"):
        kinds = ", ".join(f".{suffix}" for suffix in IMAGE_SUFFIXES)
        raise UserError(f"{path} is not an image file ({kinds}), nor data that is read")
    return _read_source(open_source(place), preprocess, limit)


def _loose_images(folder: Path) -> list[Path]:
    """The images right inside a folder, where none has a caption beside it; else none: it is a data source."""
    names = sorted(os.listdir(folder))
    images = [name for name in names if name.rpartition(".")[2].lower() in IMAGE_SUFFIXES and name[0] != "."]
    if any(f"{os.path.splitext(name)[0]}.txt" in names for name in images):
        return []
    return [folder / name for name in images]


def _read_file(path: Path, preprocess: Preprocess) -> _Image:
    try:
        return _Image(path.name, preprocess.pixels(read_image_file(str(path), str(path))))
    except BadSample as bad:
        if bad.reason == "missing_image":
            raise UserError(f"no image at {path}: no such file") from None
        raise UserError(f"{path} cannot be read as an image ({bad.reason}); give another file") from None


def _read_source(source: Source, preprocess: Preprocess, limit: int) -> tuple[list[_Image], list[str]]:
    class_texts = []
    if source.class_names and len(source.class_names) <= MAX_CLASS_TEXTS:
        template = default_templates(source)
        class_texts = [fill(template[:1], name)[0] for name in source.class_names]
    images = []
    for index in evenly_spread(len(source), limit):
        key = str(index)
        try:
            record = source[index]
            key = record.key
            pixels = preprocess.pixels(record.image)
        except BadSample as bad:
            warn(f"{source.name}: image {bad.key or key} left out ({bad.reason})")
            continue
        images.append(_Image(record.key, pixels, _own_text(record, class_texts)))
    if not images:
        raise UserError(f"{source.name}: none of the {limit} images tried can be read; python scripts/inspect_data.py")
    return images, class_texts


def _own_text(record: Record, class_texts: list[str]) -> str | None:
    if class_texts:
        known = record.label is not None and 0 <= record.label < len(class_texts)
        return class_texts[record.label] if known else None
    return next((caption for caption in record.captions if not caption_fault(caption)), None)
