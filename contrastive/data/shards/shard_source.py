"""WebDataset shards as a map-style source: samples read from the tar files by offset, nothing extracted."""

import contextlib
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from contrastive.data.class_sets import CLASS_FILES, IMAGENET, class_set, class_set_beside, is_wordnet_id
from contrastive.data.prompts import templates_beside
from contrastive.data.record import (
    BadSample,
    FaultCounts,
    Record,
    Source,
    check_index,
    evenly_spread,
    fingerprint_of,
    part_and_row,
)
from contrastive.data.shards.remote import Wanted, open_copy
from contrastive.data.shards.shard_index import REFUSALS, IndexedShard, load_index, total
from contrastive.data.sources.beside import CAPTION_FIELDS, Beside, caption_names, count_aside, spoken
from contrastive.data.sources.columns import CAPTION_COLUMNS
from contrastive.data.sources.paths import MAX_IMAGE_BYTES, is_remote, short_names
from contrastive.errors import UserError

USUAL = (".json", ".txt")
_LINES = ", one a line"


class Shards(Source):
    """The samples of a list of indexed shards, in their order. Nothing of a shard is read before it is touched.

    Captions come from KEY.json ({"captions": [...], "weights": [...]} or {"caption": ...}), else from KEY.txt, one a
    line; where no sample has any of these, nor a label, from a field that is called as a table's column would be, as
    "text". Labels come from KEY.cls or the "label" of the JSON, an index or a class name. Class names are read from
    classes.json or classnames.txt beside the shards or one folder up, or in the index folder of remote ones, and so are
    templates; without them, WordNet ids are those of ImageNet. A key is unique in its shard only; messages name both.

    Args:
        name: the specification, for messages.
        shards: see `index_shards`, `remote_shards` and `read_index`.
        caption_column: where the captions are instead, a field of KEY.json or the suffix of a text ('txt'), or several
            of them with weights, 'alt=1,txt=3'. A sample without it has no caption.

    Raises:
        UserError: no sample with the field or the text.
    """

    columns_read = ("caption_column",)

    def __init__(self, name: str, shards: Sequence[IndexedShard], caption_column: str | None = None):
        self.name = name
        self._shards = tuple(shards)
        locations = [shard.location for shard in shards]
        self._shard_names = short_names(locations)
        rows = [shard.summary for shard in shards]
        self.shard_sizes = np.array([row.samples for row in rows], dtype=np.int64)
        self._ends = np.cumsum(self.shard_sizes)
        self.remote = any(map(is_remote, locations))
        beside = shards[0].index_path if is_remote(locations[0]) else locations[0]
        classes = self._find_classes(Path(beside).parent)
        fields, suffixes = (sorted({held for row in rows for held in getattr(row, of)}) for of in ("fields", "texts"))
        if not caption_column and not self.labelled and not total(shards, "captions"):
            # Refused otherwise: what a table's column of captions may be called, a field may be called too.
            caption_column = next((column for column in CAPTION_COLUMNS if column in fields), None)
        asked = caption_names(caption_column, fields, suffixes, name) if caption_column else None
        self._names, self._weights = asked or (USUAL, None)
        self.captioned = bool(asked or total(shards, "captions"))
        names = self._names if asked else self._usual_names(fields)
        self.reading = "; ".join(filter(None, (self._reading(names, fields, usual=asked is None), classes)))
        self.left_aside = FaultCounts()
        for short, row in zip(self._shard_names, rows, strict=True):
            for reason, found in (row.refused | row.left_aside).items():
                if reason not in names:
                    keys = [f"{short}/{key}" for key in found["keys"]]
                    count_aside(self.left_aside, reason, *keys, count=found["count"])
        named = zip(self._shard_names, rows, strict=True)
        identity = "\n".join(f"{short} {row.size} {row.samples}" for short, row in named)
        # A run begun when such a text was one caption is not to go on with several.
        self.fingerprint = fingerprint_of(identity + (_LINES if _LINES in self.reading else ""))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        sample = self._sample(index)
        image = sample.read("image", MAX_IMAGE_BYTES)
        if image is None:
            raise BadSample("missing_image", sample.key)
        captions, weights = sample.captions(self._names, self._weights)
        return Record(sample.key, image, captions, self._label(sample), weights)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._sample(index).captions(self._names, self._weights)[0]

    def label(self, index: int) -> int | None:
        return self._label(self._sample(index)) if self.labelled else super().label(index)

    def wanted(self, shards: Sequence[int]) -> list[Wanted]:
        remote = (self._shards[number] for number in shards if is_remote(self._shards[number].location))
        return [(shard.location, shard.summary.size, shard.summary.sha256) for shard in remote]

    def _usual_names(self, fields: Sequence[str]) -> list[str]:
        """The names under which captions are found where none is asked for: fields of KEY.json before KEY.txt."""
        of_json = total(self._shards, "of_json")
        names = [field for field in CAPTION_FIELDS if of_json and field in fields]
        return names + [".txt"] * (total(self._shards, "captions") > of_json)

    def _reading(self, names: Sequence[str], fields: Sequence[str], usual: bool) -> str:
        """What is read as captions, in words: "captions: KEY.json 'caption', else KEY.txt, one a line"."""
        if not names:
            return f"KEY.json holds {', '.join(fields[:20])}" if fields else ""
        said = (", else " if usual else ", ").join(map(spoken, names))
        lines = _LINES if ".txt" in names and total(self._shards, "lines") else ""
        unlike = total(self._shards, "unlike") if usual else 0
        differ = f" (KEY.txt says other in {unlike:,} samples; caption_column txt takes it)" if unlike else ""
        return f"captions: {said}{lines}{differ}"

    def _sample(self, index: int) -> "ShardSample":
        number, row = part_and_row(self._ends, check_index(self, index))
        return ShardSample(self._shards[number], row, self._shard_names[number])

    def _label(self, sample: "ShardSample") -> int | None:
        if not self.labelled:
            return None
        value = _stored_label(sample)
        if type(value) is str:
            value = self._label_of.get(value, int(value) if _is_whole(value) else value)
        if value is None:
            return None
        if type(value) is not int or (self.class_names and value >= len(self.class_names)):
            raise BadSample("bad_label", sample.key)
        return value if value >= 0 else None  # below 0 is none, as in tables

    def _find_classes(self, folder: Path) -> str:
        """Find class names, templates beside them, and the label of each name; returns in words what was found."""
        numbers, self._label_of = total(self._shards, "labels"), {}
        self.labelled = bool(numbers)
        if not numbers and not total(self._shards, "label_names"):
            return ""
        stored = self._some_labels()
        are_numbers = [int(label) for label in stored if _is_whole(label)]
        if known := class_set_beside(*((folder,) if self.remote else (folder, folder.parent))):
            if len(are_numbers) == len(stored) > 0 < min(are_numbers) and max(are_numbers) == len(known.names):
                raise UserError(
                    f"{self.name} has labels from {min(are_numbers)} to {max(are_numbers)}, and {known.name} has "
                    f"{len(known.names)} names, which are for labels from 0 up; write labels that are one less"
                )
            self.class_names, found = known.names, f"class names: {known.name}"
            self.own_names = None if known.is_list else known.own_names
            self.templates = templates_beside(Path(known.name).parent)
        elif stored and is_wordnet_id(stored[0]):
            known = class_set(IMAGENET)
            self.class_names, found = known.own_names, "labels: WordNet ids, among ImageNet's 1,000"
        elif are_numbers or not stored:
            return ""
        else:
            told = f"labels that are no whole numbers, as {stored[0]!r}"
            if not total(self._shards, "captions"):
                files = " or ".join(CLASS_FILES)
                raise UserError(f"{self.name} has {told}; put {files} with the names beside the shards")
            self.labelled = False
            return f"not read: {told}"
        self.labelled = True
        self._label_of = {name: label for names in (known.names, known.own_names) for label, name in enumerate(names)}
        return found

    def _some_labels(self) -> list[str]:
        """The labels of 100 samples as they are stored; none of shards that would have to be fetched."""
        stored = []
        for index in () if self.remote else evenly_spread(len(self)):
            with contextlib.suppress(BadSample):
                stored.append(_stored_label(self._sample(index)))
        return [str(label) for label in stored if label is not None]


def _stored_label(sample: "ShardSample") -> object:
    stored = sample.text("cls")
    return sample.fields.get("label") if stored is None else stored.strip()


def _is_whole(label: str) -> bool:
    return len(label) < 20 and label.removeprefix("-").isdecimal()  # int() takes no more than 4,300 digits


class ShardSample(Beside):
    """Row `row` of a shard, read by offset; `key` names it in messages. BadSample where the index refuses it."""

    def __init__(self, shard: IndexedShard, row: int, shard_name: str):
        self.shard, self.row, self.index = shard, row, load_index(shard)
        self.key = f"{shard_name}/{self.index.keys[row].decode('utf-8', 'backslashreplace')}"
        if self.index.refusals[row]:
            raise BadSample(REFUSALS[self.index.refusals[row]], self.key)

    def read(self, suffix: str, limit: int) -> bytes | None:
        """As `Beside` has it; 'image' is the suffix of whichever image the sample has."""
        offset, size = self.index.span(self.row, suffix)
        if size < 0:
            return None
        if size > limit:
            raise BadSample("too_large", self.key)
        file = (_open_remote if is_remote(self.shard.location) else _open_local)(self.shard)
        data = os.pread(file.descriptor, size, offset)
        if len(data) != size:
            raise UserError(f"{self.shard.location} became shorter while in use, at byte {offset}; start again")
        return data


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
        raise UserError(f"{location} was changed after it was indexed; start again, or run contrastive index")
    return file


# What is open cannot be evicted: few of them a process, or the cache would outgrow its limit.
@lru_cache(maxsize=8)
def _open_remote(shard: IndexedShard) -> _OpenFile:
    return _OpenFile(open_copy(shard.location, shard.summary.size, shard.summary.sha256))
