"""Where the samples of one WebDataset shard lie: found by one pass over its headers, kept in an .npz beside it."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from contrastive.data.record import FaultCounts
from contrastive.data.shards.tar_members import BLOCK, IMAGES, ROLES, Group, group_members, shown
from contrastive.data.sources.beside import CAPTION_FIELDS, MAX_TEXT_BYTES, caption_lines, json_fields, same_texts
from contrastive.errors import UserError, reason_of
from contrastive.files import sha256, write_whole

# Why a sample is refused; the place in the tuple is what the index stores.
REFUSALS = ("", "duplicate_member", "not_a_file", "unsafe_name")
_MOST_OTHERS = 16
# Offsets are kept in blocks of 512 bytes as int32, which is half the memory and reaches 1 TB. A member of this size
# or above is refused anyway, so that its size may be cut to it.
_LARGEST = 2**31 - 1
_MAX_FIELDS = 100
_MEND = "run contrastive index on the data with --force"
# An index of 10,000 samples takes half a megabyte; this many are at hand in each process.
_MAX_LOADED = 128
_MOST_BYTES = 200 * 2**20  # of an index: a small .npz may unpack to any size


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

    spans: int32 (n, 4 + m, 2), of each of ROLES and of `others` the first block of 512 bytes and the size in bytes;
        size -1 where the sample has none.
    refusals: uint8 (n,), an index into REFUSALS; 0 for a sample that may be used.
    keys: the names up to the suffix, which begins at the first dot of the base name as a rule, folder included.
    others: the m commonest suffixes of members that are read where `caption_column` names them.
    """

    spans: np.ndarray
    refusals: np.ndarray
    keys: PackedBytes
    others: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.refusals)

    def span(self, row: int, role: str) -> tuple[int, int]:
        """Return the offset and size in bytes of a member, size -1 where the sample has none."""
        roles = ROLES + self.others
        block, size = self.spans[row, roles.index(role)].tolist() if role in roles else (0, -1)
        return block * BLOCK, size


@dataclass(frozen=True)
class ShardSummary:
    """What is known of a shard without reading it again.

    size, mtime_ns: its state when it was indexed; mtime_ns is 0 for a remote one. sha256: None when nobody asked.
    samples: all of them. captions, labels: how many have a caption under the usual names, a label by number.
    label_names: how many have a label by name. of_json: how many have a caption in KEY.json. lines: how many have
    several lines in KEY.txt. unlike: in how many KEY.json and KEY.txt say different things. fields: of the JSON.
    texts: suffixes that may hold captions. refused: the samples that cannot be used, by reason; left_aside: members
    that are read as nothing, by suffix or reason. Both as FaultCounts, with one key of each reason.
    """

    size: int
    mtime_ns: int
    sha256: str | None
    samples: int
    captions: int
    labels: int
    label_names: int
    of_json: int
    lines: int
    unlike: int
    fields: tuple[str, ...]
    texts: tuple[str, ...]
    refused: dict[str, dict] = field(hash=False)
    left_aside: dict[str, dict] = field(hash=False)


class IndexedShard(NamedTuple):
    """One shard: where it is (path or URL), where its index is, and what is known of it."""

    location: str
    index_path: str
    summary: ShardSummary


def index_shard(path: str, digest: bool = False) -> tuple[ShardIndex, ShardSummary]:
    """Index one shard; `digest` asks for its sha256, for which all of it is read.

    Members that follow each other with one key make a sample, as in WebDataset (see `group_members`). A sample that
    repeats a member or a key of the same shard, has a link in place of a file, or '..' in its name is kept but refused
    on access, so that it is counted and never paired wrongly.

    Raises:
        UserError: a torn or altered shard, by name and offset; one without samples, or still being written.
    """
    before = _state(path)
    groups, left_aside = group_members(path)
    if not groups:
        found = "".join(f"; it holds {found['count']:,} {reason}" for reason, found in left_aside.items())
        raise UserError(f"{path} holds no sample: no KEY.jpg, KEY.png, ... with a KEY.txt or KEY.json{found}")
    if all(group.refusal == "duplicate_member" for group in groups):
        raise UserError(
            f"{path}: the members of no key, as '{shown(groups[0].key)}', follow each other, or they are there twice; "
            "write it again in the order of names, as `tar --sort=name` does"
        )
    index = _index_of(groups)
    summary = ShardSummary(
        *before, sha256(path) if digest else None, len(index), **_count(path, index), left_aside=_one_key(left_aside)
    )
    if _state(path) != before:
        raise UserError(f"{path} changed while it was read; index it when it is complete")
    return index, summary


def _index_of(groups: Sequence[Group]) -> ShardIndex:
    commonest = Counter(suffix for group in groups for suffix in group.others).most_common(_MOST_OTHERS)
    others = [suffix for suffix, _ in commonest if suffix.rpartition(b".")[2] not in IMAGES]
    members = (member for group in groups for member in (*group.roles, *map(group.others.get, others)))
    # One flat list: a small list for each member costs more than all the rest.
    spans = [n for m in members for n in ((m.offset // BLOCK, min(m.size, _LARGEST)) if m else (0, -1))]
    return ShardIndex(
        spans=np.array(spans, dtype=np.int32).reshape(len(groups), -1, 2),
        refusals=np.array([REFUSALS.index(group.refusal) for group in groups], dtype=np.uint8),
        keys=PackedBytes.of(group.key for group in groups),
        others=tuple(map(shown, others)),
    )


def _state(path: str) -> tuple[int, int]:
    try:
        state = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror})") from None
    if state.st_size > _LARGEST * BLOCK:
        raise UserError(f"{path} is larger than a shard may be (1 TB); split it")
    return state.st_size, state.st_mtime_ns


def _count(path: str, index: ShardIndex) -> dict:
    """Return the counts of a ShardSummary, for which every text and JSON of the shard is read."""
    refused, fields = FaultCounts(), {}
    captions = labels = label_names = of_json = lines = unlike = 0
    # Lists of numbers, column by column: a row of an array takes ten times as long to read.
    (_, images), texts, jsons, (_, classes) = (index.spans[:, place].T.tolist() for place in range(len(ROLES)))
    with open(path, "rb") as file:
        read = partial(os.pread, file.fileno())
        for row, refusal in enumerate(index.refusals.tolist()):
            reason = REFUSALS[refusal] or ("missing_image" if images[row] < 0 else "")
            content = {}
            if not reason and 0 <= jsons[1][row] <= MAX_TEXT_BYTES:
                try:
                    content = json_fields(read(jsons[1][row], jsons[0][row] * BLOCK))
                except ValueError:
                    reason = "bad_json"
            if reason:
                refused.add(reason, shown(index.keys[row]))
                continue
            label = stated = None
            if content:
                fields |= dict.fromkeys(content)
                label, stated = content.get("label"), next(filter(None, map(content.get, CAPTION_FIELDS)), None)
            size = texts[1][row]
            captions += size >= 0 or bool(stated)
            of_json += bool(stated)
            labels += classes[row] >= 0 or type(label) is int
            label_names += type(label) is str
            if 0 <= size <= MAX_TEXT_BYTES:
                data = read(size, texts[0][row] * BLOCK).strip()
                if b"\n" in data or b"\r" in data or (stated and data.decode("utf-8", "replace") != stated):
                    found = caption_lines(data.decode("utf-8-sig", "replace"))
                    lines += len(found) > 1
                    unlike += bool(data and stated) and not same_texts(found, stated)
    known = [role for place, role in enumerate(ROLES[1:], start=1) if (index.spans[:, place, 1] >= 0).any()]
    return {
        "captions": captions,
        "labels": labels,
        "label_names": label_names,
        "of_json": of_json,
        "lines": lines,
        "unlike": unlike,
        "fields": tuple(sorted(fields)[:_MAX_FIELDS]),
        "texts": (*known, *index.others),
        "refused": _one_key(refused),
    }


def _one_key(counts: FaultCounts) -> FaultCounts:
    """The counts with one key of each reason: there may be 40,000 shards."""
    return FaultCounts({reason: {**found, "keys": found["keys"][:1]} for reason, found in counts.items()})


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
        "others": np.array(index.others, dtype=str),
        "summary": np.frombuffer(json.dumps(asdict(summary)).encode(), dtype=np.uint8),
    }
    write_whole(Path(path), lambda file: np.savez_compressed(file, **arrays))


def _load(path: str) -> tuple[ShardIndex, ShardSummary]:
    with np.load(path, allow_pickle=False) as stored:
        if (unpacked := sum(member.file_size for member in stored.zip.infolist())) > _MOST_BYTES:
            raise ValueError(f"it unpacks to {unpacked:,} bytes")
        keys = PackedBytes(stored["key_ends"], stored["key_blob"])
        summary = summary_from(json.loads(stored["summary"].tobytes()))
        index = ShardIndex(stored["spans"], stored["refusals"], keys, tuple(stored["others"].tolist()))
    _check(index, summary.size)
    return index, summary


def _check(index: ShardIndex, shard_bytes: int) -> None:
    """Raise ValueError for an index that `_index_of` cannot have made of a shard of this size."""
    spans, ends, blob, count = index.spans, index.keys.ends, index.keys.blob, len(index)
    types = (spans.dtype, index.refusals.dtype, ends.dtype, blob.dtype)
    if types != (np.int32, np.uint8, np.int64, np.uint8) or not all(isinstance(name, str) for name in index.others):
        raise ValueError("arrays of other types")
    if spans.shape != (count, len(ROLES) + len(index.others), 2) or ends.shape != (count,) or blob.ndim != 1:
        raise ValueError("arrays of other shapes")
    steps = np.diff(ends, prepend=0, append=len(blob))
    if (index.refusals >= len(REFUSALS)).any() or (steps < 0).any():
        raise ValueError("numbers that are none of an index")
    begin, size = spans[..., 0].astype(np.int64) * BLOCK, spans[..., 1]
    inside = (begin >= 0) & (begin + size <= shard_bytes)
    if not (inside | (size < 0) | (size == _LARGEST)).all():
        raise ValueError("members beyond the end of the shard")


def load_summary(path: str) -> ShardSummary | None:
    """Return the summary that `save_index` wrote, None where there is none or the file is damaged."""
    try:
        return _load(path)[1]
    except Exception:  # as many kinds as zip, .npy and JSON have ways to be damaged
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
    except Exception as error:  # see load_summary
        raise UserError(f"{path}: the index of this shard is damaged ({reason_of(error)}); {_MEND}") from None
    replaced = None not in (found.sha256, asked.sha256) and found.sha256 != asked.sha256
    if replaced or (found.size, found.mtime_ns, len(index)) != (asked.size, asked.mtime_ns, asked.samples):
        raise UserError(f"{path}: the index of this shard is not the one that its manifest lists; {_MEND}")
    return index


def summary_from(values: dict) -> ShardSummary:
    """Build a summary from `dataclasses.asdict`'s values, as JSON keeps them; ValueError for others."""
    counts = [values[name] for name in _COUNTS]
    if not all(type(count) is int and count >= 0 for count in counts) or values["samples"] * BLOCK > values["size"]:
        raise ValueError("counts that no shard has")
    faults = [found for name in ("refused", "left_aside") for found in values[name].values()]
    texts = [values["sha256"] or "", *(key for found in faults for key in found["keys"])]
    fields, suffixes = _shared(tuple(values["fields"])), _shared(tuple(values["texts"]))
    if not all(type(text) is str for text in texts) or not all(type(found["count"]) is int for found in faults):
        raise ValueError("names that are no texts")
    return ShardSummary(**{**values, "fields": fields, "texts": suffixes})


_COUNTS = [name for name, kind in ShardSummary.__annotations__.items() if kind is int]


@lru_cache(maxsize=1024)
def _shared(names: tuple[str, ...]) -> tuple[str, ...]:
    """One tuple, looked at once, for the same names in 40,000 shards."""
    if not all(type(name) is str for name in names):
        raise ValueError("names that are no texts")
    return names
