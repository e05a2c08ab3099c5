"""WebDataset shards as a map-style source: samples read from the tar files by offset, nothing extracted."""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from contrastive.data.record import BadSample, Record, check_index
from contrastive.data.sources.class_names import class_names_beside
from contrastive.data.sources.image_file import MAX_IMAGE_BYTES
from contrastive.data.sources.paths import short_names
from contrastive.data.sources.shard_index import REFUSALS, ROLES, ShardIndex, index_shard
from contrastive.errors import UserError

MAX_TEXT_BYTES = 2**20
CAPTION_FIELDS = ("captions", "caption")
_PROBED = 100
_MAX_OPEN = 128


class Shards:
    """The samples of a list of shards, in their order.

    Captions come from KEY.json ({"captions": [...]} or {"caption": ...}), else from KEY.txt; labels from
    KEY.cls or the "label" of the JSON, an index or a class name. Class names are read from classes.json or
    classnames.txt beside the shards. A key is unique in its shard only; messages name both.

    Args:
        name: the specification, for messages.
        paths: of the tar files.
        caption_field: the field of the JSON that holds the caption or the list of them.

    Raises:
        UserError: a damaged shard, one without samples, or no sample with the caption field.
    """

    def __init__(self, name: str, paths: Sequence[str], caption_field: str | None = None):
        self.name = name
        self._caption_fields = (caption_field,) if caption_field else CAPTION_FIELDS
        self._shards = tuple(index_shard(path) for path in paths)
        for shard in self._shards:
            if not len(shard):
                raise UserError(f"{shard.path} holds no sample: no KEY.jpg, KEY.png, ... with a KEY.txt or KEY.json")
        self._shard_names = short_names(paths)
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        if caption_field:
            self._check_caption_field(caption_field)
        class_names = class_names_beside(Path(paths[0]).parent)
        self._labelled = self._has_labels(class_names)
        self.class_names = class_names if self._labelled else None
        named = zip(self._shard_names, self._shards, strict=True)
        identity = "\n".join(f"{short} {shard.size} {len(shard)}" for short, shard in named)
        self.fingerprint = hashlib.blake2b(identity.encode("utf-8", "replace"), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        sample = self._sample(index)
        image = sample.read("image", MAX_IMAGE_BYTES)
        if image is None:
            raise BadSample("missing_image", sample.key)
        fields = sample.json()
        return Record(sample.key, image, self._captions(sample, fields), self._label(sample, fields))

    def captions(self, index: int) -> tuple[str, ...]:
        sample = self._sample(index)
        return self._captions(sample, sample.json())

    def label(self, index: int) -> int | None:
        if not self._labelled:
            check_index(self, index)
            return None
        sample = self._sample(index)
        return self._label(sample, sample.json())

    def _sample(self, index: int) -> "_Sample":
        index = check_index(self, index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[number]
        row = index - int(self._ends[number]) + len(shard)
        key = f"{self._shard_names[number]}/{shard.keys[row].decode('utf-8', 'backslashreplace')}"
        if shard.refusals[row]:
            raise BadSample(REFUSALS[shard.refusals[row]], key)
        return _Sample(shard, row, key)

    def _captions(self, sample: "_Sample", fields: dict) -> tuple[str, ...]:
        for field in self._caption_fields:
            value = fields.get(field)
            if isinstance(value, str):
                return (value,)
            if isinstance(value, list):
                if not all(isinstance(caption, str) for caption in value):
                    raise BadSample("bad_caption", sample.key)
                return tuple(value)
        text = sample.text("txt")
        # The end of the line belongs to the file, not to the caption.
        return () if text is None else (text.rstrip("\r\n"),)

    def _label(self, sample: "_Sample", fields: dict) -> int | None:
        if not self._labelled:
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

    def _probe(self) -> list[dict]:
        """Return the JSON of some samples, spread over all of them."""
        probed = []
        for index in np.linspace(0, len(self) - 1, num=min(_PROBED, len(self)), dtype=np.int64):
            try:
                probed.append(self._sample(index).json())
            except BadSample:
                continue
        return probed

    def _has_labels(self, class_names: tuple[str, ...] | None) -> bool:
        if any((shard.spans[:, ROLES.index("cls"), 1] >= 0).any() for shard in self._shards):
            return True
        labels = [fields.get("label") for fields in self._probe()]
        return any(type(label) is int or label in (class_names or ()) for label in labels)

    def _check_caption_field(self, field: str) -> None:
        present = sorted({name for fields in self._probe() for name in fields})
        if field not in present:
            there = f"the fields there are: {', '.join(present)}" if present else "the samples have no JSON"
            raise UserError(f"{self.name}: no caption field '{field}' in the JSON of the samples; {there}")


class _Sample:
    """One sample of an indexed shard."""

    def __init__(self, shard: ShardIndex, row: int, key: str):
        self.shard, self.row, self.key = shard, row, key

    def read(self, role: str, limit: int) -> bytes | None:
        """Return the member's bytes, None where the sample has none. BadSample 'too_large' above `limit`."""
        offset, size = (int(value) for value in self.shard.spans[self.row, ROLES.index(role)])
        if size < 0:
            return None
        if size > limit:
            raise BadSample("too_large", self.key)
        data = os.pread(_open_shard(self.shard.path, self.shard.size, self.shard.mtime_ns).descriptor, size, offset)
        if len(data) != size:
            raise UserError(f"{self.shard.path} became shorter while in use, at byte {offset}; start again")
        return data

    def text(self, role: str) -> str | None:
        data = self.read(role, MAX_TEXT_BYTES)
        try:
            return None if data is None else data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise BadSample("bad_utf8", self.key) from None

    def json(self) -> dict:
        """Return the fields of KEY.json, an empty dict where there is none."""
        text = self.text("json")
        try:
            fields = {} if text is None else json.loads(text)
        except (ValueError, RecursionError):
            raise BadSample("bad_json", self.key) from None
        if not isinstance(fields, dict):
            raise BadSample("bad_json", self.key)
        return fields


class _OpenFile:
    """A file descriptor that closes with its last user, so that one may be evicted while another reads."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


# One table a process, outside the source: nothing to pickle, and pread shares no position after a fork.
@lru_cache(maxsize=_MAX_OPEN)
def _open_shard(path: str, size: int, mtime_ns: int) -> _OpenFile:
    try:
        file = _OpenFile(path)
    except OSError as error:
        raise UserError(f"{path}: the shard can no longer be opened ({error.strerror})") from None
    state = os.fstat(file.descriptor)
    if (state.st_size, state.st_mtime_ns) != (size, mtime_ns):
        raise UserError(f"{path} was changed after the run had read its index; start again")
    return file
