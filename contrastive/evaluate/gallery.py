"""A page of pictures with what is to be said of each: what a search found, what a curation dropped."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from contrastive.data.decode import decode
from contrastive.data.record import BadSample, Source
from contrastive.files import write_whole
from contrastive.page import PARTS, filled, html_page, thumbnail

SIDE = 240  # pixels of a picture on the page


@dataclass(frozen=True)
class Shot:
    """A picture of the page, or two side by side."""

    images: tuple[np.ndarray | None, ...]
    """uint8 (H, W, 3); None for one that cannot be read."""
    title: str
    text: str
    key: str


@dataclass(frozen=True)
class Section:
    title: str
    remark: str
    shots: Sequence[Shot]
    image: np.ndarray | None = None
    """Beside the title, uint8 (H, W, 3)."""


def write_gallery(
    path: Path,
    title: str,
    remark: str,
    sections: Sequence[Section],
    tables: Sequence[Sequence[Sequence[str]]] = (),
) -> None:
    """Write the page whole or not at all; it needs no other file.

    Args:
        tables: above the pictures; of each its rows, a name and figures.
    """
    pictured = any(shot.images for section in sections for shot in section.shots)
    parts = {"sections": sections, "tables": tables, "pictured": pictured, "thumbnail": thumbnail}
    body = filled(PARTS / "gallery.html.jinja", **parts)
    write_whole(path, html_page(title, remark, body, "gallery.css"))


def picture(source: Source, index: int) -> np.ndarray | None:
    """Return the image of a sample as uint8 (H, W, 3), small where that is cheaper; None where it cannot be read."""
    try:
        return small_picture(source[index].image)
    except BadSample:
        return None


def small_picture(image: object) -> np.ndarray:
    """Return an image as it is stored as uint8 (H, W, 3), not much larger than the page needs it. Raises BadSample."""
    return decode(image, min_side=SIDE).permute(1, 2, 0).numpy()


def said_of(source: Source, index: int) -> str:
    """Return the first caption of a sample, else its class; empty where it has neither."""
    try:
        label = source.label(index)
        if label is not None and source.class_names and (source.prompted or not source.captions(index)):
            return source.class_names[label]
        return next((text.strip() for text in source.captions(index) if text.strip()), "")
    except (BadSample, IndexError):
        return ""
