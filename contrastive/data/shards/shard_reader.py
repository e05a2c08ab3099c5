"""Read the members of one sample of an indexed shard, by offset."""

import json
import os
from functools import lru_cache

from contrastive.data.record import BadSample
from contrastive.data.shards.shard_cache import open_copy
from contrastive.data.shards.shard_index import MAX_TEXT_BYTES, REFUSALS, ShardIndex
from contrastive.data.shards.shard_manifest import Entry
from contrastive.data.shards.stored_index import load_index
from contrastive.data.sources.paths import is_remote
from contrastive.errors import UserError

_MAX_OPEN, _MAX_OPEN_COPIES = 128, 8


def shard_index(entry: Entry) -> ShardIndex:
    """Return where the samples of a shard lie; read when the shard is first touched."""
    summary = entry.summary
    return load_index(entry.index_path, summary.size, summary.mtime_ns, summary.samples, summary.sha256)


class Sample:
    """Row `row` of a shard; `key` names it in messages. BadSample where the index refuses it."""

    def __init__(self, entry: Entry, row: int, shard_name: str):
        self.entry, self.row, self.index = entry, row, shard_index(entry)
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
        summary = self.entry.summary
        if is_remote(self.entry.location):
            file = _open_remote(self.entry.location, summary.size, summary.sha256)
        else:
            file = _open_local(self.entry.location, summary.size, summary.mtime_ns)
        data = os.pread(file.descriptor, size, offset)
        if len(data) != size:
            raise UserError(f"{self.entry.location} became shorter while in use, at byte {offset}; start again")
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

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self):
        os.close(self.descriptor)


# An open copy stays in the cache: with few of them a process, its limit holds.
@lru_cache(maxsize=_MAX_OPEN_COPIES)
def _open_remote(location: str, size: int, sha256: str | None) -> _OpenFile:
    return _OpenFile(open_copy(location, size, sha256))


# One table a process, outside the source: nothing to pickle, and pread shares no position after a fork.
@lru_cache(maxsize=_MAX_OPEN)
def _open_local(location: str, size: int, mtime_ns: int) -> _OpenFile:
    try:
        file = _OpenFile(os.open(location, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)))
    except OSError as error:
        raise UserError(f"{location}: the shard can no longer be opened ({error.strerror})") from None
    state = os.fstat(file.descriptor)
    if (state.st_size, state.st_mtime_ns) != (size, mtime_ns):
        raise UserError(f"{location} was changed after it was indexed; start again, or run scripts/index.py")
    return file
