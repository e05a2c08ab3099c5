"""WebDataset shards as a map-style source: samples read from the tar files by offset, nothing extracted."""

import math
import os
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from contrastive.data.class_sets import class_names_beside
from contrastive.data.record import BadSample, Record, Source, check_index, fingerprint_of, part_and_row
from contrastive.data.shards.remote import Wanted, open_copy
from contrastive.data.shards.shard_index import (
    CAPTION_FIELDS,
    MAX_TEXT_BYTES,
    REFUSALS,
    IndexedShard,
    json_fields,
    load_index,
)
from contrastive.data.shards.shard_manifest import total
from contrastive.data.sources.columns import weighted_names
from contrastive.data.sources.paths import MAX_IMAGE_BYTES, is_remote, short_names
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
        shards: see `index_shards`, `remote_shards` and `read_index`.
        caption_field: the field of the JSON that holds the caption or the list of them, or several with weights,
            'alt=1,synthetic=3'.

    Raises:
        UserError: no sample with the caption field.
    """

    def __init__(self, name: str, shards: Sequence[IndexedShard], caption_field: str | None = None):
        self.name = name
        self._shards = tuple(shards)
        locations = [shard.location for shard in shards]
        self._shard_names = short_names(locations)
        self.shard_sizes = np.array([shard.summary.samples for shard in shards], dtype=np.int64)
        self._ends = np.cumsum(self.shard_sizes)
        self.remote = any(map(is_remote, locations))
        beside = shards[0].index_path if is_remote(locations[0]) else locations[0]
        class_names = class_names_beside(Path(beside).parent)
        self.labelled = bool(total(shards, "labels") or (class_names and total(shards, "label_names")))
        self.class_names = class_names if self.labelled else None
        self._caption_fields = self._find_fields(caption_field) if caption_field else ()
        self.captioned = bool(caption_field or total(shards, "captions"))
        named = zip(self._shard_names, shards, strict=True)
        identity = "\n".join(f"{short} {shard.summary.size} {shard.summary.samples}" for short, shard in named)
        self.fingerprint = fingerprint_of(identity)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        sample = self._sample(index)
        image = sample.read("image", MAX_IMAGE_BYTES)
        if image is None:
            raise BadSample("missing_image", sample.key)
        captions, weights = self._captions(sample)
        return Record(sample.key, image, captions, self._label(sample), weights)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions(self._sample(index))[0]

    def label(self, index: int) -> int | None:
        return self._label(self._sample(index)) if self.labelled else super().label(index)

    def wanted(self, shards: Sequence[int]) -> list[Wanted]:
        remote = (self._shards[number] for number in shards if is_remote(self._shards[number].location))
        return [(shard.location, shard.summary.size, shard.summary.sha256) for shard in remote]

    def _sample(self, index: int) -> "ShardSample":
        number, row = part_and_row(self._ends, check_index(self, index))
        return ShardSample(self._shards[number], row, self._shard_names[number])

    def _captions(self, sample: "ShardSample") -> Captions:
        if len(self._caption_fields) > 1:
            return _of_several(self._caption_fields, sample.fields, sample.key)
        for name in (name for name, _ in self._caption_fields) if self._caption_fields else CAPTION_FIELDS:
            texts = _texts(sample.fields.get(name), sample.key)
            if texts and any(map(str.strip, texts)):
                weights = sample.fields.get("weights") if name == "captions" else None
                return texts, _weights(weights, len(texts), sample.key)
        text = sample.text("txt")
        # The end of the line belongs to the file, not to the caption.
        return () if text is None else (text.rstrip("\r\n"),), None

    def _label(self, sample: "ShardSample") -> int | None:
        if not self.labelled:
            return None
        value, stored = sample.fields.get("label"), sample.text("cls")
        if stored is not None:
            value = stored.strip()
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
        present = sorted({name for shard in self._shards for name in shard.summary.fields})
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


class ShardSample:
    """Row `row` of a shard, read by offset; `key` names it in messages. BadSample where the index refuses it."""

    def __init__(self, shard: IndexedShard, row: int, shard_name: str):
        self.shard, self.row, self.index = shard, row, load_index(shard)
        self.key = f"{shard_name}/{self.index.keys[row].decode('utf-8', 'backslashreplace')}"
        if self.index.refusals[row]:
            raise BadSample(REFUSALS[self.index.refusals[row]], self.key)

    def read(self, role: str, limit: int) -> bytes | None:
        """Return the member's bytes, None where the sample has none. BadSample 'too_large' above `limit`."""
        offset, size = self.index.span(self.row, role)
        if size < 0:
            return None
        if size > limit:
            raise BadSample("too_large", self.key)
        file = (_open_remote if is_remote(self.shard.location) else _open_local)(self.shard)
        data = os.pread(file.descriptor, size, offset)
        if len(data) != size:
            raise UserError(f"{self.shard.location} became shorter while in use, at byte {offset}; start again")
        return data

    def text(self, role: str) -> str | None:
        data = self.read(role, MAX_TEXT_BYTES)
        try:
            return None if data is None else data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise BadSample("bad_utf8", self.key) from None

    @cached_property
    def fields(self) -> dict:
        """The fields of KEY.json, an empty dict where there is none. BadSample 'bad_utf8', 'bad_json'."""
        data = self.read("json", MAX_TEXT_BYTES)
        try:
            return {} if data is None else json_fields(data)
        except ValueError as error:
            raise BadSample("bad_utf8" if isinstance(error, UnicodeDecodeError) else "bad_json", self.key) from None


class _OpenFile:
    """A file descriptor that closes with its last user, so that one may be evicted while another reads."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self):
        os.close(self.descriptor)


# Tables of the process, not of the source, which stays picklable. Forked workers may share what is open: pread takes
# the offset with each call and moves no common position.
@lru_cache(maxsize=128)
def _open_local(shard: IndexedShard) -> _OpenFile:
    location, _, summary = shard
    try:
        file = _OpenFile(os.open(location, os.O_RDONLY))
    except OSError as error:
        raise UserError(f"{location}: the shard can no longer be opened ({error.strerror})") from None
    state = os.fstat(file.descriptor)
    if (state.st_size, state.st_mtime_ns) != (summary.size, summary.mtime_ns):
        raise UserError(f"{location} was changed after it was indexed; start again, or run scripts/index.py")
    return file


# What is open cannot be evicted: few of them a process, or the cache would outgrow its limit.
@lru_cache(maxsize=8)
def _open_remote(shard: IndexedShard) -> _OpenFile:
    return _OpenFile(open_copy(shard.location, shard.summary.size, shard.summary.sha256))
