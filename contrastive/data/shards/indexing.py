"""Make the index of shards, in parallel, or compare them with it; what is done stays done when it is interrupted."""

import contextlib
import hashlib
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

from filelock import FileLock, Timeout

from contrastive.data.class_sets import CLASS_FILES
from contrastive.data.prompts import TEMPLATES_FILE
from contrastive.data.shards.parallel import in_parallel
from contrastive.data.shards.remote import copy_path, download, open_copy
from contrastive.data.shards.shard_index import (
    IndexedShard,
    ShardIndex,
    ShardSummary,
    index_shard,
    load_summary,
    save_index,
)
from contrastive.data.shards.shard_manifest import IndexFolder, find_shards, index_folders
from contrastive.data.sources.paths import folder_and_name, is_remote
from contrastive.errors import UserError
from contrastive.log import say, warn

_MAX_WORKERS = 16  # more of them wait for the disk or the network


def remote_shards(spec: str, urls: Sequence[str]) -> list[IndexedShard]:
    """Return remote shards. UserError where they have no index: making it fetches them all."""
    shards = find_shards(urls)
    missing = shards.count(None)
    if missing:
        raise UserError(
            f"{spec}: {missing} of its {len(urls)} shards have no index yet; "
            f"run `contrastive index '{spec}'` once, which downloads every shard "
            "(one of an earlier version has to be made anew)"
        )
    return shards


def index_shards(
    locations: Sequence[str], *, digest: bool, workers: int | None = None, force: bool = False
) -> list[IndexedShard]:
    """Return shards (paths or URLs), indexed where they are not, or have changed since.

    Args:
        digest: have a sha256 of every shard, for which those without are read whole.
        force: index all of them anew, as remote ones that were replaced: their changes are not seen from here.
        workers: processes; None: one a core, 16 at most.

    Raises:
        UserError: names the first shard that is damaged or missing, and says how many are. The others are done.
    """
    fits = partial(_is_current, digest=digest, force=force)
    shards = find_shards(locations, fits)
    if None not in shards:
        return shards
    with _locked(_missing(locations, shards).values()):
        shards = find_shards(locations, fits)  # another process may just have done it
        built = _build(_missing(locations, shards), fits, digest, workers)
    return [shard or built[location] for location, shard in zip(locations, shards, strict=True)]


def _is_current(shard: IndexedShard, digest: bool, force: bool) -> bool:
    """Whether an entry is of the shard as it is now. A remote one is compared when it is downloaded."""
    summary = shard.summary
    if force or (digest and summary.sha256 is None) or not os.path.exists(shard.index_path):
        return False
    if is_remote(shard.location):
        return True
    try:
        state = os.stat(shard.location)
    except OSError:
        return False
    return (state.st_size, state.st_mtime_ns) == (summary.size, summary.mtime_ns)


def _missing(locations: Sequence[str], shards: Sequence[IndexedShard | None]) -> dict[str, IndexFolder]:
    """Return, for each location without a shard, the folder that its index is to go to."""
    missing = [location for location, shard in zip(locations, shards, strict=True) if shard is None]
    homes = [folder_and_name(location)[0] for location in missing]
    folders = {home: _writable(index_folders(home)) for home in dict.fromkeys(homes)}
    return {location: folders[home] for location, home in zip(missing, homes, strict=True)}


def _writable(folders: Sequence[IndexFolder]) -> IndexFolder:
    """Return the first index folder that may be written to."""
    for folder in folders[:-1]:
        # Root may write anywhere; a folder without any write bit is meant to stay as it is.
        with contextlib.suppress(OSError):
            if os.stat(folder.shards).st_mode & 0o222:
                os.makedirs(folder.path, exist_ok=True)
                if os.access(folder.path, os.W_OK):
                    return folder
    return folders[-1]


@contextlib.contextmanager
def _locked(folders: Iterable[IndexFolder]) -> Iterator[None]:
    """Hold the locks of all index folders that will be written."""
    with contextlib.ExitStack() as stack:
        # Sorted: two processes that took the same locks in another order would wait for each other for ever.
        for path in sorted({folder.path for folder in folders}):
            os.makedirs(path, exist_ok=True)
            lock = FileLock(os.path.join(path, "lock"))
            try:
                lock.acquire(timeout=2)
            except OSError as error:
                raise UserError(f"{path}: cannot be locked ({error.strerror}); delete it and index again") from None
            except Timeout:
                say(f"waiting for another process, which indexes shards into {path}")
                lock.acquire()
            stack.callback(lock.release)
        yield


def _build(
    missing: dict[str, IndexFolder], fits: Callable[[IndexedShard], bool], digest: bool, workers: int | None
) -> dict[str, IndexedShard]:
    """Index the shards and return them by the location that was asked for.

    Whatever ends this early, the shards that are done are added to their manifests.
    """
    built, faults = {}, []
    index, jobs = partial(_index_one, fits=fits, digest=digest), list(missing.items())
    try:
        for (location, _), shard in in_parallel("indexing shards", index, jobs, workers, most=_MAX_WORKERS):
            if isinstance(shard, str):
                faults.append(shard)
            else:
                built[location] = shard
    finally:
        _write(missing, built)
    _raise_first(faults, "cannot be indexed either")
    return built


def _index_one(job: tuple[str, IndexFolder], fits: Callable[[IndexedShard], bool], digest: bool) -> IndexedShard | str:
    """Index one shard and store that. What the user can mend comes back as the message."""
    asked, folder = job
    _, name = folder_and_name(asked)
    location, path = folder.location(name), folder.index_path(name)
    # An interrupted build leaves indexes that are in no manifest yet.
    summary = load_summary(path)
    if summary is None or not fits(folder.shard(name, summary)):
        try:
            index, summary = (_index_copy if is_remote(location) else index_shard)(location, digest)
            save_index(path, index, summary)
        except UserError as error:
            return str(error)
        except OSError as error:
            return f"{path}: the index of this shard cannot be written ({error.strerror or error})"
    return folder.shard(name, summary)


def _index_copy(url: str, digest: bool) -> tuple[ShardIndex, ShardSummary]:
    path = copy_path(url)
    # A copy from before may be of another file: the address has been given a new one when it is indexed again.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    descriptor = open_copy(url)  # held open, so that no other process evicts the copy
    try:
        index, summary = index_shard(path, digest)
    except UserError as error:
        os.unlink(path)  # when the damage is mended at its source, the shard has to be fetched anew
        raise UserError(str(error).replace(path, url)) from None
    finally:
        os.close(descriptor)
    return index, replace(summary, mtime_ns=0)


def _write(missing: dict[str, IndexFolder], built: dict[str, IndexedShard]) -> None:
    """Add what was built to the manifests."""
    for folder in dict.fromkeys(missing[location] for location in built):
        own = {folder_and_name(at)[1]: shard.summary for at, shard in built.items() if missing[at] == folder}
        folder.add(own)
        if is_remote(folder.shards) and any(row.labels or row.label_names for row in own.values()):
            _fetch_class_names(folder)


def _fetch_class_names(folder: IndexFolder) -> None:
    """Copy class names and templates from beside remote shards, or one folder up, to where `Shards` looks for them."""

    above = folder.shards.rpartition("/")[0] if folder.shards.count("/") > 2 else folder.shards  # not above the host
    for name, place in product((*CLASS_FILES, TEMPLATES_FILE), (above, folder.shards)):  # the nearest counts
        path = os.path.join(folder.path, name)
        with contextlib.suppress(UserError):  # no such file, as a rule
            download(f"{place}/{name}", f"{path}.part")
            os.replace(f"{path}.part", path)
    if not any(os.path.exists(os.path.join(folder.path, name)) for name in CLASS_FILES):
        warn(f"{folder.shards} has labels but no {' or '.join(CLASS_FILES)}; to use them, put one into {folder.path}")


def verify_shards(shards: Sequence[IndexedShard], workers: int | None = None) -> None:
    """Read every shard whole and compare its size and sha256 with the index, in parallel.

    Of a remote shard the local copy is compared, downloaded where there is none.

    Raises:
        UserError: names the first shard that is missing, altered or was never hashed, and says how many are.
    """
    verified = in_parallel("verifying shards", _fault, shards, workers, most=_MAX_WORKERS)
    _raise_first([fault for _, fault in verified if fault], "fail too")


def _fault(shard: IndexedShard) -> str | None:
    """Say what is wrong with a shard, None for nothing."""
    location, _, summary = shard
    if summary.sha256 is None:
        return f"{location} was indexed without a sha256; run contrastive index without --verify first"
    try:
        descriptor = open_copy(location, summary.size, summary.sha256) if is_remote(location) else os.open(location, 0)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{location} cannot be opened ({error.strerror})"
    with open(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size == summary.size and hashlib.file_digest(file, "sha256").hexdigest() == summary.sha256:
            return None
        if is_remote(location):
            os.unlink(copy_path(location))
            return f"{location}: its local copy was altered and is deleted; run it again to fetch it anew"
    if size != summary.size:
        return f"{location} has {size} bytes, but {summary.size} when it was indexed; index it again or restore it"
    return (
        f"{location} was altered in place: its size is the same, its sha256 is not. Restore it, or index it as it is: "
        f"`contrastive index {shlex.quote(location)} --force`"
    )


def _raise_first(faults: list[str], what: str) -> None:
    if faults:
        raise UserError(min(faults) + (f" ({len(faults) - 1} more shards {what})" if len(faults) > 1 else ""))
