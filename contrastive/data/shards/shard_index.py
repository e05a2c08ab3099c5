"""Where the samples of one WebDataset shard lie: found by one pass over its headers, kept in an .npz beside it."""

import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from contrastive.data.shards.tar_members import BLOCK, Member, iter_members
from contrastive.data.sources.paths import IMAGE_SUFFIXES
from contrastive.errors import UserError
from contrastive.files import sha256, write_whole

ROLES = ("image", "txt", "json", "cls")
# Why a sample is refused; the place in the tuple is what the index stores.
REFUSALS = ("", "duplicate_member", "not_a_file", "unsafe_name")
CAPTION_FIELDS = ("captions", "caption")
MAX_TEXT_BYTES = 2**20
# Of each of ROLES, the best first.
_SUFFIXES = tuple(tuple(map(str.encode, suffixes)) for suffixes in (IMAGE_SUFFIXES, *((name,) for name in ROLES[1:])))
_KNOWN = frozenset(chain(*_SUFFIXES))
_META = re.compile(rb"__[^/]*__($|/)")  # not samples, by WebDataset's convention
# Offsets are kept in blocks of 512 bytes as int32, which is half the memory and reaches 1 TB. A member of this size
# or above is refused anyway, so that its size may be cut to it.
_LARGEST = 2**31 - 1
_MAX_FIELDS = 100
_DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile)
_MEND = "run scripts/index.py on the data with --force"
# An index of 10,000 samples takes half a megabyte; this many are at hand in each process.
_MAX_LOADED = 128


class PackedBytes:
    """A sequence of byte strings in two arrays: a few bytes each, shared with forked workers.

    A list of a million str is a million objects, and every worker that only reads them copies their pages,
    because a read changes the reference count.

    ends: where each string ends, int64 (n,). blob: all of them joined, uint8.
    """

    def __init__(self, ends: np.ndarray, blob: np.ndarray):
        self.ends, self.blob = ends, blob

    @classmethod
    def of(cls, strings: Iterable[bytes]) -> "PackedBytes":
        strings = list(strings)
        ends = np.cumsum([len(string) for string in strings], dtype=np.int64)
        return cls(ends, np.frombuffer(b"".join(strings), dtype=np.uint8))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        start = self.ends[index - 1] if index else 0
        return self.blob[start : self.ends[index]].tobytes()


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard, in its order (n samples).

    spans: int32 (n, 4, 2), of each of ROLES the first block of 512 bytes and the size in bytes; size -1 where
        the sample has none.
    refusals: uint8 (n,), an index into REFUSALS; 0 for a sample that may be used.
    keys: the names up to the first dot of the base name, folder included.
    """

    spans: np.ndarray
    refusals: np.ndarray
    keys: PackedBytes

    def __len__(self) -> int:
        return len(self.refusals)

    def span(self, row: int, role: str) -> tuple[int, int]:
        """Return the offset and size in bytes of a member, size -1 where the sample has none."""
        block, size = self.spans[row, ROLES.index(role)].tolist()
        return block * BLOCK, size


@dataclass(frozen=True)
class ShardSummary:
    """What is known of a shard without reading it again.

    size, mtime_ns: its state when it was indexed; mtime_ns is 0 for a remote one. sha256: None when nobody asked.
    samples: all of them. captions, labels: how many have a caption under the usual names, a label by number.
    label_names: how many have a label by name. fields: of the JSON. refused: how many for which reason.
    """

    size: int
    mtime_ns: int
    sha256: str | None
    samples: int
    captions: int
    labels: int
    label_names: int
    fields: tuple[str, ...]
    refused: dict[str, int] = field(hash=False)


class IndexedShard(NamedTuple):
    """One shard: where it is (path or URL), where its index is, and what is known of it."""

    location: str
    index_path: str
    summary: ShardSummary


def index_shard(path: str, digest: bool = False) -> tuple[ShardIndex, ShardSummary]:
    """Index one shard; `digest` asks for its sha256, for which all of it is read.

    Members that follow each other with one key make a sample, as in WebDataset. Only members with a suffix
    we use count. A sample that repeats a member or a key of the same shard, has a link in place of a file, or
    '..' in its name is kept but refused on access, so that it is counted and never paired wrongly.

    Raises:
        UserError: a torn or altered shard, by name and offset; one without samples, or still being written.
    """
    before = _state(path)
    groups = _group(path)
    if not groups:
        raise UserError(f"{path} holds no sample: no KEY.jpg, KEY.png, ... with a KEY.txt or KEY.json")
    spans = np.full((len(groups), len(ROLES), 2), (0, -1), dtype=np.int32)
    for number, group in enumerate(groups):
        for role, suffixes in enumerate(_SUFFIXES):
            found = next(filter(None, map(group.members.get, suffixes)), None)
            if found:
                spans[number, role] = found.offset // BLOCK, min(found.size, _LARGEST)
    index = ShardIndex(
        spans=spans,
        refusals=np.array([REFUSALS.index(group.refusal) for group in groups], dtype=np.uint8),
        keys=PackedBytes.of(group.key for group in groups),
    )
    summary = ShardSummary(*before, sha256(path) if digest else None, len(index), **_count(path, index))
    if _state(path) != before:
        raise UserError(f"{path} changed while it was read; index it when it is complete")
    return index, summary


def _state(path: str) -> tuple[int, int]:
    try:
        state = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror})") from None
    if state.st_size > _LARGEST * BLOCK:
        raise UserError(f"{path} is larger than a shard may be (1 TB); split it")
    return state.st_size, state.st_mtime_ns


@dataclass
class _Group:
    """The members of one sample."""

    key: bytes
    members: dict[bytes, Member]
    refusal: str = ""


def _group(path: str) -> list[_Group]:
    groups, by_key = [], {}
    for member in iter_members(path):
        parts = split_key(member.name)
        if parts is None or parts[1] not in _KNOWN or _META.match(member.name):
            continue
        key, suffix = parts
        if not groups or groups[-1].key != key:
            groups.append(_Group(key, {}))
            # The same key again further on: nobody can tell which members belong together.
            if key in by_key:
                by_key[key].refusal = groups[-1].refusal = "duplicate_member"
            by_key[key] = groups[-1]
        group = groups[-1]
        if suffix in group.members:
            group.refusal = "duplicate_member"
        elif not member.is_file:
            group.refusal = "not_a_file"
        elif b".." in key.split(b"/"):
            group.refusal = "unsafe_name"
        group.members[suffix] = member
    return groups


def split_key(name: bytes) -> tuple[bytes, bytes] | None:
    """Split a member's name at the first dot of its base name; None for a name without key or suffix."""
    folder, slash, base = name.rpartition(b"/")
    stem, dot, suffix = base.partition(b".")
    return (folder + slash + stem, suffix.lower()) if stem and dot else None


def _count(path: str, index: ShardIndex) -> dict:
    """Return the counts of a ShardSummary, for which every JSON of the shard is read."""
    refused, fields = Counter(), {}
    captions = labels = label_names = 0
    with open(path, "rb") as file:
        for row in range(len(index)):
            if index.refusals[row]:
                refused[REFUSALS[index.refusals[row]]] += 1
                continue
            if index.span(row, "image")[1] < 0:
                refused["missing_image"] += 1
                continue
            offset, size = index.span(row, "json")
            try:
                readable = 0 <= size <= MAX_TEXT_BYTES
                content = json_fields(os.pread(file.fileno(), size, offset)) if readable else {}
            except ValueError:
                refused["bad_json"] += 1
                continue
            fields |= dict.fromkeys(content)
            label = content.get("label")
            captions += index.span(row, "txt")[1] >= 0 or any(content.get(field) for field in CAPTION_FIELDS)
            labels += index.span(row, "cls")[1] >= 0 or type(label) is int
            label_names += type(label) is str
    return {
        "captions": captions,
        "labels": labels,
        "label_names": label_names,
        "fields": tuple(sorted(fields)[:_MAX_FIELDS]),
        "refused": dict(refused),
    }


def json_fields(data: bytes) -> dict:
    """Return the fields of a KEY.json. ValueError: no JSON object; UnicodeDecodeError, which is one: no UTF-8."""
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("not an object")
    return content


# The index as a file


def save_index(path: str, index: ShardIndex, summary: ShardSummary) -> None:
    """Write an index and its summary to one .npz, whole or not at all.

    The manifest repeats the summary: the one in here tells a resumed build what is done, and a reader whether the
    two belong together.
    """
    arrays = {
        "spans": index.spans,
        "refusals": index.refusals,
        "key_ends": index.keys.ends,
        "key_blob": index.keys.blob,
        "summary": np.frombuffer(json.dumps(asdict(summary)).encode(), dtype=np.uint8),
    }
    write_whole(Path(path), lambda file: np.savez_compressed(file, **arrays))


def _load(path: str) -> tuple[ShardIndex, ShardSummary]:
    with np.load(path) as stored:
        keys = PackedBytes(stored["key_ends"], stored["key_blob"])
        summary = summary_from(json.loads(stored["summary"].tobytes()))
        return ShardIndex(stored["spans"], stored["refusals"], keys), summary


def load_summary(path: str) -> ShardSummary | None:
    """Return the summary that `save_index` wrote, None where there is none or the file is damaged."""
    try:
        return _load(path)[1]
    except _DAMAGE:
        return None


# A table of the process, not of the source: a source that is sent to a worker stays small.
@lru_cache(maxsize=_MAX_LOADED)
def load_index(shard: IndexedShard) -> ShardIndex:
    """Return the index that `save_index` wrote for a shard in this state.

    Raises:
        UserError: it is missing or damaged, or belongs to another state of the shard.
    """
    path, asked = shard.index_path, shard.summary
    try:
        index, found = _load(path)
    except FileNotFoundError:
        raise UserError(f"{path}: the index of this shard is missing; {_MEND}") from None
    except _DAMAGE as error:
        raise UserError(f"{path}: the index of this shard is damaged ({error}); {_MEND}") from None
    replaced = None not in (found.sha256, asked.sha256) and found.sha256 != asked.sha256
    if replaced or (found.size, found.mtime_ns, len(index)) != (asked.size, asked.mtime_ns, asked.samples):
        raise UserError(f"{path}: the index of this shard is not the one that its manifest lists; {_MEND}")
    return index


def summary_from(values: dict) -> ShardSummary:
    """Build a summary from `dataclasses.asdict`'s values, as JSON keeps them."""
    return ShardSummary(**{**values, "fields": _shared(tuple(values["fields"]))})


# One tuple for the same fields of 40,000 shards.
_shared = lru_cache(maxsize=1024)(tuple)
