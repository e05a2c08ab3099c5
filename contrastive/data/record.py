"""What a source yields, and what a source is."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


class BadSample(Exception):
    """One sample that cannot be used. The loader counts it by `reason` and puts another in its place.

    Reasons of the sources: 'missing_image', 'unreadable_image', 'too_large', 'bad_utf8', 'bad_json',
    'bad_caption', 'bad_weights', 'bad_label', 'duplicate_member', 'not_a_file', 'unsafe_name'.
    """

    def __init__(self, reason: str, key: str = ""):
        super().__init__(reason, key)  # both as args, so that it survives the trip from a worker process
        self.reason = reason
        self.key = key

    def __str__(self) -> str:
        return f"{self.reason} ({self.key})" if self.key else self.reason


@dataclass(frozen=True)
class Record:
    """One sample as stored.

    key: unique in its source, for messages.
    image: encoded bytes wherever the source has them, else a PIL image or a uint8 array (H, W, 3).
    captions: raw, as stored; empty or blank ones are kept, the loader judges them.
    label: class index into the source's `class_names`.
    caption_weights: how often each caption is drawn, relative to the others; None: all alike.
    caption_group: what all the captions say, where several texts say the same, as prompts of one class do: for a loss
        that takes equal captions for matches, all captions of one group are equal.
    """

    key: str
    image: bytes | Image.Image | np.ndarray
    captions: tuple[str, ...] = ()
    label: int | None = None
    caption_weights: tuple[float, ...] | None = None
    caption_group: str | None = None


def check_index(source: Source, index: int) -> int:
    """Return `index` as an int; IndexError outside 0..len-1 (a negative one would pick a sample unasked)."""
    index = operator.index(index)
    if not 0 <= index < len(source):
        raise IndexError(f"{source.name}: index {index} is outside 0..{len(source) - 1}")
    return index


class Source(Protocol):
    """A map-style set of samples. Picklable and safe to fork: loader workers call it.

    name: the string that named it, for messages.
    class_names: names of the classes where the source is labelled, else None.
    fingerprint: short hex that changes when the data changes; a resumed run compares it.
    """

    name: str
    class_names: tuple[str, ...] | None
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Return sample `index`. Raises BadSample where this one sample cannot be read."""
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of sample `index` without reading its image. Raises BadSample."""
        ...

    def label(self, index: int) -> int | None:
        """Return the class index of sample `index` without reading its image. Raises BadSample."""
        ...
