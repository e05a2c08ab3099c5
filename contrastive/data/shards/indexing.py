"""Make the index of shards, in parallel; what is done stays done when it is interrupted."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from filelock import FileLock, Timeout

from contrastive.data.shards.parallel_work import WorkProgress, in_parallel
from contrastive.data.shards.remote import download
from contrastive.data.shards.shard_cache import copy_path, open_copy
from contrastive.data.shards.shard_index import ShardIndex, ShardSummary, index_shard
from contrastive.data.shards.shard_manifest import Entry, IndexFolder, by_folder, index_folders, known_shards
from contrastive.data.shards.stored_index import load_summary, save_index
from contrastive.data.sources.class_names import CLASS_FILES
from contrastive.data.sources.paths import folder_and_name, is_remote
from contrastive.errors import UserError
from contrastive.log import say, warn


def local_shards(paths: Sequence[str]) -> list[Entry]:
    """Return the entries of local shards, indexed now where they are not yet, or have changed since."""
    return index_shards(paths, digest=False)


def remote_shards(spec: str, urls: Sequence[str]) -> list[Entry]:
    """Return the entries of remote shards. UserError where they have no index: making it fetches them all."""
    entries = known_shards(urls)
    missing = entries.count(None)
    if missing:
        raise UserError(
            f"{spec}: {missing} of its {len(urls)} shards have no index yet; "
            f"run `python scripts/index.py '{spec}'` once, which downloads every shard"
        )
    return entries


def index_shards(
    locations: Sequence[str], *, digest: bool, workers: int | None = None, force: bool = False
) -> list[Entry]:
    """Return the entries of shards (paths or URLs), indexed where they are not, or have changed since.

    Args:
        digest: have a sha256 of every shard, for which those without are read whole.
        force: index all of them anew, as remote ones that were replaced: their changes are not seen from here.
        workers: processes; None: one a core, 16 at most.

    Raises:
        UserError: names the first shard that is damaged or missing, and says how many are. The others are done.
    """
    plan = _Plan(locations, digest, force)
    if not plan.missing:
        return plan.result()
    with plan.locked():
        plan = _Plan(locations, digest, force)  # another process may just have done it
        plan.resume()
        plan.build(workers)
    return plan.result()


class _Job(NamedTuple):
    location: str
    index_path: str
    digest: bool


class _Plan:
    """Which shards have an up-to-date entry, and where those of the others are to go."""

    def __init__(self, locations: Sequence[str], digest: bool, force: bool):
        self._locations, self._digest, self._force = locations, digest, force
        self._found: dict[str, Entry] = {}
        self.missing: dict[str, IndexFolder] = {}
        for shards, names in by_folder(locations).items():
            folders = index_folders(shards)
            known = [(folder, folder.read()) for folder in folders]
            target = None
            for name in names:
                entries = (folder.entry(name, summaries[name]) for folder, summaries in known if name in summaries)
                entry = next((entry for entry in entries if self._fits(entry)), None)
                if entry is None:
                    target = target or (folders[0] if is_remote(shards) else _writable(folders))
                    self.missing[target.location(name)] = target
                else:
                    self._found[entry.location] = entry

    def result(self) -> list[Entry]:
        return [self._found[_whole(location)] for location in self._locations]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the locks of all index folders that will be written, in one order, so that nobody waits in a ring."""
        with contextlib.ExitStack() as stack:
            for path in sorted({folder.path for folder in self.missing.values()}):
                os.makedirs(path, exist_ok=True)
                lock = FileLock(os.path.join(path, "lock"))
                try:
                    lock.acquire(timeout=2)
                except Timeout:
                    say(f"waiting for another process, which indexes shards into {path}")
                    lock.acquire()
                stack.callback(lock.release)
            yield

    def resume(self) -> None:
        """Take up what an interrupted build has left."""
        for location, folder in tuple(self.missing.items()):
            name = folder_and_name(location)[1]
            summary = load_summary(folder.index_path(name))
            if summary is not None and self._fits(entry := folder.entry(name, summary)):
                self._found[location] = entry

    def build(self, workers: int | None) -> None:
        jobs = [
            _Job(location, folder.index_path(folder_and_name(location)[1]), self._digest)
            for location, folder in self.missing.items()
            if location not in self._found
        ]
        faults = []
        try:
            with WorkProgress("indexing shards", len(self.missing), len(self.missing) - len(jobs)) as progress:
                for job, summary in in_parallel(_index_one, jobs, workers):
                    progress.advance()
                    if isinstance(summary, str):
                        faults.append(summary)
                    else:
                        name = folder_and_name(job.location)[1]
                        self._found[job.location] = self.missing[job.location].entry(name, summary)
        finally:
            self._write()
        if faults:
            more = f" ({len(faults) - 1} more shards cannot be indexed either)" if len(faults) > 1 else ""
            raise UserError(min(faults) + more)

    def _write(self) -> None:
        by_path: dict[str, tuple[IndexFolder, dict[str, ShardSummary]]] = {}
        for location, folder in self.missing.items():
            if location in self._found:
                summaries = by_path.setdefault(folder.path, (folder, {}))[1]
                summaries[folder_and_name(location)[1]] = self._found[location].summary
        for folder, summaries in by_path.values():
            folder.add(summaries)
            if is_remote(folder.shards) and any(row.labels or row.label_names for row in summaries.values()):
                _fetch_class_names(folder)

    def _fits(self, entry: Entry) -> bool:
        """Whether an entry is of the shard as it is now. A remote one is compared when it is downloaded."""
        summary = entry.summary
        if self._force or (self._digest and summary.sha256 is None) or not os.path.exists(entry.index_path):
            return False
        if is_remote(entry.location):
            return True
        try:
            state = os.stat(entry.location)
        except OSError:
            return False
        return (state.st_size, state.st_mtime_ns) == (summary.size, summary.mtime_ns)


def _fetch_class_names(folder: IndexFolder) -> None:
    """Copy the class names that lie beside remote shards into their index folder, where `Shards` looks for them."""
    for name in CLASS_FILES:
        path = os.path.join(folder.path, name)
        try:
            download(f"{folder.shards}/{name}", f"{path}.part")
            os.replace(f"{path}.part", path)
            return
        except UserError:  # no such file, as a rule
            continue
    if not any(os.path.exists(os.path.join(folder.path, name)) for name in CLASS_FILES):
        warn(f"{folder.shards} has labels but no {' or '.join(CLASS_FILES)}; to use them, put one into {folder.path}")


def _whole(location: str) -> str:
    return location if is_remote(location) else os.path.abspath(location)


def _writable(folders: Sequence[IndexFolder]) -> IndexFolder:
    """Return the first index folder that may be written to."""
    for folder in folders[:-1]:
        try:
            # Root may write anywhere; a folder without any write bit is meant to stay as it is.
            if os.stat(folder.shards).st_mode & 0o222:
                os.makedirs(folder.path, exist_ok=True)
                if os.access(folder.path, os.W_OK):
                    return folder
        except OSError:
            continue
    return folders[-1]


def _index_one(job: _Job) -> ShardSummary | str:
    """Index one shard and store that. What the user can mend comes back as the message."""
    try:
        index, summary = _index_copy(job) if is_remote(job.location) else index_shard(job.location, job.digest)
        save_index(job.index_path, index, summary)
    except UserError as error:
        return str(error)
    return summary


def _index_copy(job: _Job) -> tuple[ShardIndex, ShardSummary]:
    path = copy_path(job.location)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # it may be of what the address held before
    descriptor = open_copy(job.location)  # open, so that the copy stays
    try:
        index, summary = index_shard(path, job.digest)
    except UserError as error:
        os.unlink(path)  # what is mended there is to be fetched anew
        raise UserError(str(error).replace(path, job.location)) from None
    finally:
        os.close(descriptor)
    return index, replace(summary, mtime_ns=0)
