"""Compare indexed shards with what they were when they were indexed."""

import hashlib
import os
import shlex
from collections.abc import Sequence

from contrastive.data.shards.parallel_work import WorkProgress, in_parallel
from contrastive.data.shards.shard_cache import copy_path, open_copy
from contrastive.data.shards.shard_manifest import Entry
from contrastive.data.sources.paths import is_remote
from contrastive.errors import UserError


def verify_shards(entries: Sequence[Entry], workers: int | None = None) -> None:
    """Read every shard whole and compare its size and sha256 with the index, in parallel.

    Of a remote shard the local copy is compared, downloaded where there is none.

    Raises:
        UserError: names the first shard that is missing, altered or was never hashed, and says how many are.
    """
    faults = []
    with WorkProgress("verifying shards", len(entries)) as progress:
        for _, fault in in_parallel(_fault, entries, workers):
            progress.advance()
            if fault:
                faults.append(fault)
    if faults:
        more = f" ({len(faults) - 1} more shards fail too)" if len(faults) > 1 else ""
        raise UserError(min(faults) + more)


def _fault(entry: Entry) -> str | None:
    """Say what is wrong with a shard, None for nothing."""
    location, summary = entry.location, entry.summary
    if summary.sha256 is None:
        return f"{location} was indexed without a sha256; run scripts/index.py without --verify first"
    try:
        descriptor = open_copy(location, summary.size, summary.sha256) if is_remote(location) else os.open(location, 0)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{location} cannot be opened ({error.strerror})"
    with open(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        same = size == summary.size and hashlib.file_digest(file, "sha256").hexdigest() == summary.sha256
        if not same and is_remote(location):
            os.unlink(copy_path(location))
    if same:
        return None
    if is_remote(location):
        return f"{location}: its local copy was altered and is deleted; run it again to fetch it anew"
    if size != summary.size:
        return f"{location} has {size} bytes, but {summary.size} when it was indexed; index it again or restore it"
    return (
        f"{location} was altered in place: its size is the same, its sha256 is not. Restore it, or index it as it is: "
        f"`python scripts/index.py {shlex.quote(location)} --force`"
    )
