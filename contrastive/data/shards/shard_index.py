"""The index of shards, as files: where the samples of each lie, and a manifest of what is known of all of them.

An index folder holds `manifest.json`, a summary of every shard, and for each shard an .npz of the places of its
samples, which is read when the shard is first touched.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from contrastive.data.record import fingerprint_of
from contrastive.data.shards.tar_members import BLOCK, ROLES
from contrastive.data.sources.paths import folder_and_name, is_remote
from contrastive.errors import UserError, reason_of
from contrastive.files import cache_folder, write_whole

# Why a sample is refused; the place in the tuple is what the index stores.
REFUSALS = ("", "duplicate_member", "not_a_file", "unsafe_name")
# Offsets are kept in blocks of 512 bytes as int32, which is half the memory and reaches 1 TB. A member of this size
# or above is refused anyway, so that its size may be cut to it.
LARGEST = 2**31 - 1
INDEX_FOLDER, MANIFEST = ".contrastive-index", "manifest.json"
_FORMAT, _VERSION = "contrastive shard index", 2
# What a manifest beside its shards says of their place: the folder may be moved as a whole.
_BESIDE = ".."
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


# The index of a shard as a file


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
    if not (inside | (size < 0) | (size == LARGEST)).all():
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


# The manifest of a folder of shards: what training has to know of them before it reads one


@dataclass(frozen=True)
class IndexFolder:
    """The index of the shards of one folder.

    path: of the index folder. shards: the folder or URL that the shards lie in.
    """

    path: str
    shards: str

    def read(self) -> dict[str, IndexedShard]:
        """Return each shard by name; none where there is no manifest, or one of another version."""
        _, summaries = _read_manifest(self.path) or (None, {})
        return {name: self.shard(name, summary) for name, summary in summaries.items()}

    def add(self, summaries: Mapping[str, ShardSummary]) -> None:
        """Write the manifest with these shards besides those that it lists. The caller holds the lock."""
        merged = {name: shard.summary for name, shard in self.read().items()} | dict(summaries)
        base = _BESIDE if os.path.basename(self.path) == INDEX_FOLDER else self.shards
        rows = (json.dumps({"name": name, **asdict(merged[name])}) for name in sorted(merged))
        head = json.dumps({"format": _FORMAT, "version": _VERSION, "shards_in": base})
        # One shard a line, for people who look.
        write_whole(Path(self.path, MANIFEST), head[:-1] + ', "shards": [\n' + ",\n".join(rows) + "\n]}\n")

    def shard(self, name: str, summary: ShardSummary) -> IndexedShard:
        return IndexedShard(self.location(name), self.index_path(name), summary)

    def location(self, name: str) -> str:
        return f"{self.shards}/{name}" if is_remote(self.shards) else os.path.join(self.shards, name)

    def index_path(self, name: str) -> str:
        """Return where the places of the samples of a shard are kept."""
        safe = re.sub(r"[^\w.-]", "_", name)
        # 'a?b' and 'a_b' must not share a file: names that had to be changed carry a hash of the original.
        if safe != name:
            safe = f"{safe[:100]}-{fingerprint_of(os.fsencode(name))}"
        return os.path.join(self.path, f"{safe}.npz")


def index_folders(shards: str) -> tuple[IndexFolder, ...]:
    """Return where the index of a folder of shards may be, the preferred place first.

    Beside local shards; else, and for remote ones, in the cache.
    """
    in_cache = IndexFolder(os.path.join(cache_folder(), "index", fingerprint_of(os.fsencode(shards))), shards)
    return (in_cache,) if is_remote(shards) else (IndexFolder(os.path.join(shards, INDEX_FOLDER), shards), in_cache)


def find_shards(
    locations: Sequence[str], fits: Callable[[IndexedShard], bool] = lambda shard: True
) -> list[IndexedShard | None]:
    """Return what the manifests say of shards (paths or URLs): the first entry of each that `fits`, or None."""
    listed = cache(lambda folder: [index.read() for index in index_folders(folder)])
    found = []
    for folder, name in map(folder_and_name, locations):
        entries = (shards[name] for shards in listed(folder) if name in shards)
        found.append(next(filter(fits, entries), None))
    return found


def is_index(path: str) -> bool:
    """Whether a path names an index folder or its manifest, wherever it lies; other folders may have a manifest too."""
    path = os.path.expanduser(path)
    if INDEX_FOLDER in (os.path.basename(path.rstrip("/")), os.path.basename(os.path.dirname(path))):
        return True
    try:
        with open(path if os.path.basename(path) == MANIFEST else os.path.join(path, MANIFEST), "rb") as file:
            return _FORMAT.encode() in file.read(200)
    except OSError:
        return False


def read_index(path: str) -> list[IndexedShard]:
    """Return all shards that an index folder (or its manifest.json) lists, in its order; none is looked at.

    Raises:
        UserError: it is not an index, damaged, of another version, or lists nothing.
    """
    path = os.path.abspath(os.path.expanduser(path))
    folder = os.path.dirname(path) if os.path.basename(path) == MANIFEST else path
    manifest = _read_manifest(folder)
    if manifest is None:
        raise UserError(f"{path} is no index of shards of this version; make one with contrastive index")
    base, summaries = manifest
    if not summaries:
        raise UserError(f"{path} lists no shard; run contrastive index on the data")
    index = IndexFolder(folder, base if is_remote(base) else os.path.normpath(os.path.join(folder, base)))
    return [index.shard(name, summary) for name, summary in summaries.items()]


def _read_manifest(folder: str) -> tuple[str, dict[str, ShardSummary]] | None:
    """Return where the shards lie and the summary of each by name; None without a manifest, or of another version."""
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, "rb") as file:
            manifest = json.load(file)
        if manifest["format"] != _FORMAT:
            raise ValueError("it is some other file")
        if manifest.get("version") != _VERSION:
            return None
        summaries = {row.pop("name"): summary_from(row) for row in manifest["shards"]}
        base = manifest["shards_in"]
        # What came with data may name shards beside it or on the net, and no other file of this machine.
        own = Path(folder).resolve().is_relative_to(Path(cache_folder()).resolve())
        if not own and base != _BESIDE and (not is_remote(base) or base.startswith(("file:", "memory:"))):
            raise ValueError(f"it names shards in {base}, but lies elsewhere")
        for name in summaries:
            if os.fsencode(name) in (b"", b".", b"..") or "/" in name or "\0" in name:
                raise ValueError(f"a shard named {name!r}")
        return base, summaries
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as an index of shards ({error}); delete it and index again") from None


def total(shards: Sequence[IndexedShard], count: str) -> int:
    """Return the sum of a count of the summaries over shards."""
    return sum(getattr(shard.summary, count) for shard in shards)
