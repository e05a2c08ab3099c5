"""WebDataset shards as a map-style source: samples read from the tar files by offset, nothing extracted."""

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from contrastive.data.record import BadSample, Record, Source, check_index
from contrastive.data.shards.shard_cache import Wanted
from contrastive.data.shards.shard_index import CAPTION_FIELDS
from contrastive.data.shards.shard_manifest import Entry, total
from contrastive.data.shards.shard_reader import Sample
from contrastive.data.sources.class_names import class_names_beside
from contrastive.data.sources.columns import weighted_names
from contrastive.data.sources.image_file import MAX_IMAGE_BYTES
from contrastive.data.sources.paths import is_remote, short_names
from contrastive.errors import UserError

Captions = tuple[tuple[str, ...], tuple[float, ...] | None]


class Shards(Source):
    """The samples of a list of indexed shards, in their order. Nothing of a shard is read before it is touched.

    Captions come from KEY.json ({"captions": [...], "weights": [...]} or {"caption": ...}), else from KEY.txt;
    labels from KEY.cls or the "label" of the JSON, an index or a class name. Class names are read from
    classes.json or classnames.txt beside the shards, or in the index folder of remote ones. A key is unique in
    its shard only; messages name both.

    Args:
        name: the specification, for messages.
        entries: of the shards' manifests; see `local_shards`, `remote_shards` and `read_index`.
        caption_field: the field of the JSON that holds the caption or the list of them, or several with weights,
            'alt=1,synthetic=3'.

    Raises:
        UserError: no sample with the caption field.
    """

    def __init__(self, name: str, entries: Sequence[Entry], caption_field: str | None = None):
        self.name = name
        self._entries = tuple(entries)
        locations = [entry.location for entry in self._entries]
        self._shard_names = short_names(locations)
        self.shard_sizes = np.array([entry.summary.samples for entry in self._entries], dtype=np.int64)
        self._ends = np.cumsum(self.shard_sizes)
        self.remote = any(map(is_remote, locations))
        first = self._entries[0]
        class_names = class_names_beside(
            Path(os.path.dirname(first.index_path if is_remote(first.location) else first.location))
        )
        self.labelled = bool(total(entries, "labels") or (class_names and total(entries, "label_names")))
        self.class_names = class_names if self.labelled else None
        self._caption_fields = self._find_fields(caption_field) if caption_field else ()
        self.captioned = bool(caption_field or total(entries, "captions"))
        named = zip(self._shard_names, self._entries, strict=True)
        identity = "\n".join(f"{short} {entry.summary.size} {entry.summary.samples}" for short, entry in named)
        self.fingerprint = hashlib.blake2b(identity.encode("utf-8", "replace"), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        sample = self._sample(index)
        image = sample.read("image", MAX_IMAGE_BYTES)
        if image is None:
            raise BadSample("missing_image", sample.key)
        fields = sample.json()
        captions, weights = self._captions(sample, fields)
        return Record(sample.key, image, captions, self._label(sample, fields), weights)

    def captions(self, index: int) -> tuple[str, ...]:
        sample = self._sample(index)
        return self._captions(sample, sample.json())[0]

    def label(self, index: int) -> int | None:
        if not self.labelled:
            check_index(self, index)
            return None
        sample = self._sample(index)
        return self._label(sample, sample.json())

    def wanted(self, shards: Sequence[int]) -> list[Wanted]:
        entries = (self._entries[number] for number in shards)
        return [(e.location, e.summary.size, e.summary.sha256) for e in entries if is_remote(e.location)]

    def _sample(self, index: int) -> Sample:
        index = check_index(self, index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        row = index - int(self._ends[number] - self.shard_sizes[number])
        return Sample(self._entries[number], row, self._shard_names[number])

    def _captions(self, sample: Sample, fields: dict) -> Captions:
        if len(self._caption_fields) > 1:
            return _of_several(self._caption_fields, fields, sample.key)
        for field in (name for name, _ in self._caption_fields or ((usual, 1.0) for usual in CAPTION_FIELDS)):
            texts = _texts(fields.get(field), sample.key)
            if texts and any(map(str.strip, texts)):
                return texts, _weights(fields.get("weights"), len(texts), sample.key) if field == "captions" else None
        text = sample.text("txt")
        # The end of the line belongs to the file, not to the caption.
        return () if text is None else (text.rstrip("\r\n"),), None

    def _label(self, sample: Sample, fields: dict) -> int | None:
        if not self.labelled:
            return None
        stored = sample.text("cls")
        value = fields.get("label") if stored is None else stored.strip()
        if value is None:
            return None
        if self.class_names and value in self.class_names:
            return self.class_names.index(value)
        if type(value) is str and value.isdecimal():
            value = int(value)
        if type(value) is not int or value < 0 or (self.class_names and value >= len(self.class_names)):
            raise BadSample("bad_label", sample.key)
        return value

    def _find_fields(self, asked: str) -> tuple[tuple[str, float], ...]:
        present = sorted({name for entry in self._entries for name in entry.summary.fields})
        weighted = ((asked, 1.0),) if asked in present else weighted_names(asked)
        for field, _ in weighted:
            if field not in present:
                there = f"the fields there are: {', '.join(present)}" if present else "the samples have no JSON"
                raise UserError(f"{self.name}: no caption field '{field}' in the JSON of the samples; {there}")
        return weighted


def _texts(value: object, key: str) -> tuple[str, ...] | None:
    """Return the captions of a JSON field, None where it holds none. BadSample 'bad_caption'."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        return None
    if not all(isinstance(text, str) for text in value):
        raise BadSample("bad_caption", key)
    return tuple(value)


def _of_several(fields: Sequence[tuple[str, float]], content: dict, key: str) -> Captions:
    """The captions of all fields; those of one share its weight evenly."""
    found = [(_texts(content.get(name), key) or (), weight) for name, weight in fields]
    weights = tuple(weight / len(texts) for texts, weight in found for _ in texts)
    return tuple(text for texts, _ in found for text in texts), weights


def _weights(value: object, count: int, key: str) -> tuple[float, ...] | None:
    """Return the weights beside `count` captions, None where there are none. BadSample 'bad_weights'."""
    if value is None:
        return None
    numbers = value if isinstance(value, list) else []
    good = len(numbers) == count and all(type(number) in (int, float) and number >= 0 for number in numbers)
    if not good or not 0 < sum(numbers) < math.inf:
        raise BadSample("bad_weights", key)
    return tuple(map(float, numbers))
