"""What a source yields, and what a source is."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from contrastive.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from PIL import Image

    from contrastive.data.shards.remote import Wanted


SAMPLES_ASKED = 100  # of a source, for captions or labels
KEYS_KEPT = 20  # of the bad samples of each reason: enough to find what is wrong with the data


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


class FaultCounts(dict[str, dict[str, Any]]):
    """Bad samples by reason: {"count": how many, "keys": of the first KEYS_KEPT}, plain enough for JSON."""

    def add(self, reason: str, *keys: str, count: int = 1) -> None:
        """Count one more, or as many as `count` says, of which these keys are known."""
        found = self.setdefault(reason, {"count": 0, "keys": []})
        found["count"] += count
        found["keys"] += keys[: KEYS_KEPT - len(found["keys"])]

    def include(self, later: dict[str, dict[str, Any]]) -> None:
        """Take in what was found after all that is counted so far."""
        for reason, found in later.items():
            self.add(reason, *found["keys"], count=found["count"])

    def commonest_first(self) -> dict[str, dict[str, Any]]:
        return dict(sorted(self.items(), key=lambda item: -item[1]["count"]))


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
    mask: the class of each pixel, as stored: see `decode.decode_mask`. None: this sample has none.
    """

    key: str
    image: bytes | Image.Image | np.ndarray
    captions: tuple[str, ...] = ()
    label: int | None = None
    caption_weights: tuple[float, ...] | None = None
    caption_group: str | None = None
    mask: bytes | np.ndarray | None = None


def check_index(source: Source, index: int) -> int:
    """Return `index` as an int; IndexError outside 0..len-1 (a negative one would pick a sample unasked)."""
    index = operator.index(index)
    if not 0 <= index < len(source):
        raise IndexError(f"{source.name}: index {index} is outside 0..{len(source) - 1}")
    return index


def check_split(name: str, split: str, known: Collection[str]) -> None:
    """Raise UserError for a split that is none of those known."""
    if split not in known:
        *others, last = known
        which = f"{', '.join(others)} or {last}" if others else last
        raise UserError(f"{name}: unknown split '{split}'; use {which}.{did_you_mean(split, known)}")


def evenly_spread(size: int) -> list[int]:
    """Return at most SAMPLES_ASKED places in 0..size-1, the first and the last among them."""
    count = min(SAMPLES_ASKED, size)
    return [number * (size - 1) // max(1, count - 1) for number in range(count)]


def some_have(source: Source, of: Callable[[int], object]) -> bool:
    """Return whether `of` says something true of one of at most 100 samples, spread evenly over the source."""
    for index in evenly_spread(len(source)):
        try:
            if of(index):
                return True
        except BadSample:
            continue
    return False


def fingerprint_of(identity: str | bytes) -> str:
    """Return the fingerprint, 16 hex digits, of a source told from others by the text; lone surrogates become '?'."""
    content = identity if isinstance(identity, bytes) else identity.encode("utf-8", "replace")
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def part_and_row(ends: np.ndarray, index: int) -> tuple[int, int]:
    """Return the number of the part that holds `index`, and the row in it, of parts that lie end to end.

    ends: int (n,), where each of them ends. Empty parts are passed over.
    """
    number = int(np.searchsorted(ends, index, side="right"))
    return number, index - (int(ends[number - 1]) if number else 0)


class Source:
    """A map-style set of samples. Picklable and safe to fork: loader workers call it.

    A source of one's own derives from this class and sets `name` and `fingerprint`, defines `__len__` and
    `__getitem__`, and `captions` or `label` or both. Everything else has a default that is right for data that lie
    here as single samples. Nothing in the code asks whether a source has a member: it has them all.

    name: the string that named it, for messages.
    fingerprint: short hex that changes when the data changes; a resumed run compares it.
    class_names: names of the classes where the source is labelled, else None.
    own_names: what the data call those classes, where they were given other names; else None.
    captioned, labelled: whether any sample has captions, or a label, of its own; None: not known without a look.
    templates: the prompts that suit its classes, each with '{}' for the name; None: whatever suits their names.
    prompted: whether the captions are those templates filled with class names, and so say no more than the labels.
    heldout_labels: the classes that training never sees, where they are told apart.
    masked: whether its records have masks. mask_names: what the values of the masks mean, from 0, where that is known.
    shard_sizes: samples of each shard, int (n,), in the order of the samples, for data that are read fastest shard by
        shard; None: any order is as fast. A shard may have none.
    remote: whether shards have to be fetched before they can be read.
    weights: of its `parts`, whole numbers above 0.
    reading: what was taken for what, for the line that a run begins with: 'class folders: 3 classes', "captions: column
        'title'". Empty where there was nothing to decide.
    columns_read: which of the options image_column and caption_column say what is read of it.
    left_aside: what lies there and is none of its samples, by reason, as far as that is known without reading them all.
    """

    name: str
    fingerprint: str
    class_names: tuple[str, ...] | None = None
    own_names: tuple[str, ...] | None = None
    captioned: bool | None = None
    labelled: bool | None = None
    templates: tuple[str, ...] | None = None
    prompted: bool = False
    heldout_labels: frozenset[int] = frozenset()
    masked: bool = False
    mask_names: tuple[str, ...] | None = None
    shard_sizes: np.ndarray | None = None
    remote: bool = False
    weights: tuple[int, ...] = (1,)
    reading: str = ""
    left_aside: FaultCounts = FaultCounts()
    columns_read: tuple[str, ...] = ()
    _labels: np.ndarray | None = None  # int64 (n,), -1 for none, where they are in memory: `label` then reads them

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Record:
        """Return sample `index`. Raises BadSample where this one sample cannot be read."""
        raise NotImplementedError

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of sample `index` without reading its image. Raises BadSample."""
        check_index(self, index)
        return ()

    def label(self, index: int) -> int | None:
        """Return the class index of sample `index` without reading its image. Raises BadSample."""
        index = check_index(self, index)
        return None if self._labels is None or self._labels[index] < 0 else int(self._labels[index])

    @property
    def parts(self) -> tuple[Source, ...]:
        """The sources that this one mixes by `weights`, laid end to end: itself alone unless it is a Mixture."""
        return (self,)

    @property
    def stored(self) -> Source:
        """The same samples with the captions that are stored: itself unless it is `prompted`."""
        return self

    def wanted(self, shards: Sequence[Any]) -> list[Wanted]:
        """Return the files of these shards that have to be fetched, as the cache of shards knows them.

        shards: as the source's order numbers them (see `SampleOrder.shards_ahead`), the first needed first.
        """
        return []

    def prefetch(self, shards: Sequence[Any]) -> None:
        """Have what is `wanted` of these shards fetched in the background; those needed first come first.

        A later call replaces what has not begun. Local shards are left to the operating system.
        """
        from contrastive.data.shards.remote import prefetch

        prefetch(self.wanted(shards))


class Wrapped(Source):
    """A source seen through another: every member is that of `source`, and a subclass alters what it is there for.

    Only `parts` and `stored` are its own: they are whole sources, which a wrapper has to wrap in its turn.
    """

    def __init__(self, source: Source):
        if len(source.parts) > 1:
            raise ValueError(f"{source.name}: wrap each part of a mixture by itself, or the weights are lost")
        self.source = source
        for member in Source.__annotations__:  # its data; its methods follow
            setattr(self, member, getattr(source, member))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        return self.source[index]

    def captions(self, index: int) -> tuple[str, ...]:
        return self.source.captions(index)

    def label(self, index: int) -> int | None:
        return self.source.label(index)

    def wanted(self, shards: Sequence[Any]) -> list[Wanted]:
        return self.source.wanted(shards)

    def prefetch(self, shards: Sequence[Any]) -> None:
        self.source.prefetch(shards)
