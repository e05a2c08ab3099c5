"""Where the samples of one WebDataset shard lie: offsets and sizes, from one pass over its headers."""

import os
import re
from dataclasses import dataclass

import numpy as np

from contrastive.data.sources.image_file import IMAGE_SUFFIXES
from contrastive.data.sources.packed_bytes import PackedBytes
from contrastive.data.sources.tar_members import Member, iter_members

ROLES = ("image", "txt", "json", "cls")
# Why a sample is refused; the place in the tuple is what the index stores.
REFUSALS = ("", "duplicate_member", "not_a_file", "unsafe_name")
_SUFFIXES = frozenset(suffix.encode() for suffix in (*IMAGE_SUFFIXES, *ROLES[1:]))
_META = re.compile(rb"__[^/]*__($|/)")  # not samples, by WebDataset's convention


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard, in its order (n samples).

    path: of the tar. size, mtime_ns: its state when it was indexed.
    spans: int64 (n, 4, 2), offset and size in bytes of each of ROLES; size -1 where the sample has none.
    refusals: uint8 (n,), an index into REFUSALS; 0 for a sample that may be used.
    keys: the names up to the first dot of the base name, folder included.
    """

    path: str
    size: int
    mtime_ns: int
    spans: np.ndarray
    refusals: np.ndarray
    keys: PackedBytes

    def __len__(self) -> int:
        return len(self.refusals)


def index_shard(path: str) -> ShardIndex:
    """Index one shard. A torn or altered one is a UserError that names it and the offset.

    Members that follow each other with one key make a sample, as in WebDataset. Only members with a suffix
    we use count. A sample that repeats a member or a key of the same shard, has a link in place of a file, or
    '..' in its name is kept but refused on access, so that it is counted and never paired wrongly.
    """
    groups = _group(path)
    spans = np.full((len(groups), len(ROLES), 2), (0, -1), dtype=np.int64)
    for number, group in enumerate(groups):
        for role, suffixes in enumerate((IMAGE_SUFFIXES, *((name,) for name in ROLES[1:]))):
            found = next((group.members[s.encode()] for s in suffixes if s.encode() in group.members), None)
            if found:
                spans[number, role] = found.offset, found.size
    state = os.stat(path)
    return ShardIndex(
        path=path,
        size=state.st_size,
        mtime_ns=state.st_mtime_ns,
        spans=spans,
        refusals=np.array([REFUSALS.index(group.refusal) for group in groups], dtype=np.uint8),
        keys=PackedBytes(group.key for group in groups),
    )


def split_key(name: bytes) -> tuple[bytes, bytes] | None:
    """Split a member's name at the first dot of its base name; None for a name without key or suffix."""
    folder, slash, base = name.rpartition(b"/")
    stem, dot, suffix = base.partition(b".")
    return (folder + slash + stem, suffix.lower()) if stem and dot else None


@dataclass
class _Group:
    key: bytes
    members: dict[bytes, Member]
    refusal: str = ""


def _group(path: str) -> list[_Group]:
    groups, by_key = [], {}
    for member in iter_members(path):
        parts = split_key(member.name)
        if parts is None or parts[1] not in _SUFFIXES or _META.match(member.name):
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
