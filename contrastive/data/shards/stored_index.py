"""The index of one shard as a file."""

import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from typing import BinaryIO

import numpy as np

from contrastive.data.shards.packed_bytes import PackedBytes
from contrastive.data.shards.shard_index import ShardIndex, ShardSummary
from contrastive.errors import UserError

_DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile)
_MEND = "run scripts/index.py on the data with --force"
# An index of 10,000 samples takes half a megabyte; this many are at hand in each process.
_MAX_LOADED = 128


def save_index(path: str, index: ShardIndex, summary: ShardSummary) -> None:
    """Write an index and its summary to one .npz, whole or not at all."""
    ends, blob = index.keys.arrays
    arrays = {
        "spans": index.spans,
        "refusals": index.refusals,
        "key_ends": ends,
        "key_blob": blob,
        "summary": np.frombuffer(json.dumps(asdict(summary)).encode(), dtype=np.uint8),
    }
    write_whole(path, lambda file: np.savez_compressed(file, **arrays))


def load_summary(path: str) -> ShardSummary | None:
    """Return the summary that `save_index` wrote, None where there is none or the file is damaged."""
    try:
        with np.load(path) as stored:
            return summary_from(json.loads(stored["summary"].tobytes()))
    except _DAMAGE:
        return None


# One table a process, outside the source: nothing to pickle.
@lru_cache(maxsize=_MAX_LOADED)
def load_index(path: str, size: int, mtime_ns: int, samples: int, sha256: str | None) -> ShardIndex:
    """Return the index that `save_index` wrote for a shard in this state.

    Raises:
        UserError: it is missing or damaged, or belongs to another state of the shard.
    """
    try:
        with np.load(path) as stored:
            found = summary_from(json.loads(stored["summary"].tobytes()))
            keys = PackedBytes.from_arrays(stored["key_ends"], stored["key_blob"])
            index = ShardIndex(stored["spans"], stored["refusals"], keys)
    except FileNotFoundError:
        raise UserError(f"{path}: the index of this shard is missing; {_MEND}") from None
    except _DAMAGE as error:
        raise UserError(f"{path}: the index of this shard is damaged ({error}); {_MEND}") from None
    replaced = None not in (found.sha256, sha256) and found.sha256 != sha256
    if replaced or (found.size, found.mtime_ns, len(index)) != (size, mtime_ns, samples):
        raise UserError(f"{path}: the index of this shard is not the one that its manifest lists; {_MEND}")
    return index


def summary_from(values: dict) -> ShardSummary:
    """Build a summary from `dataclasses.asdict`'s values, as JSON keeps them."""
    return ShardSummary(**{**values, "fields": _shared(tuple(values["fields"]))})


@lru_cache(maxsize=1024)
def _shared(fields: tuple[str, ...]) -> tuple[str, ...]:
    """One tuple for the same fields of 40,000 shards."""
    return fields


def write_whole(path: str, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name, then rename it: nobody ever sees half of it."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
