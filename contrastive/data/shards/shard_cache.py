"""Local copies of remote shards, bounded in size and shared by all processes of a machine."""

import contextlib
import fcntl
import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Sequence

from filelock import FileLock, Timeout

from contrastive.data.shards.remote import download
from contrastive.errors import UserError
from contrastive.files import cache_folder
from contrastive.log import warn

FRESH_SECONDS = 60.0  # a copy younger than this may have been fetched for a reader that has yet to open it
_PREFETCH_THREADS = 2
_PART = ".part"

Wanted = tuple[str, int, str | None]  # URL, size in bytes, sha256


def open_copy(url: str, size: int | None = None, sha256: str | None = None) -> int:
    """Return a descriptor of the local copy of a remote shard, downloaded first where it is not there.

    A copy that is open is not evicted (the descriptor holds a shared lock on it). Of all processes that want one
    shard, one downloads it and the others wait.

    Raises:
        UserError: it cannot be downloaded, or is not of this size or sha256; or no room for it.
    """
    path = copy_path(url)
    while True:
        descriptor = _open_shared(path, size)
        if descriptor is not None:
            return descriptor
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with FileLock(f"{path}.lock"):
            there = _open_shared(path, size)
            if there is None:
                _fetch(url, path, size, sha256)
            else:  # another process was first
                os.close(there)


def _fetch(url: str, path: str, size: int | None, sha256: str | None) -> None:
    part = path + _PART
    try:
        download(url, part, size=size, sha256=sha256, reserve=lambda needed: _make_room(part, needed))
        os.replace(part, path)
    except OSError as error:
        raise UserError(
            f"{url}: cannot be kept in the cache {cache_folder()} ({error.strerror}); "
            "name another folder with CONTRASTIVE_CACHE or a smaller size with CONTRASTIVE_CACHE_GB"
        ) from None
    finally:
        if os.path.exists(part):
            os.unlink(part)


def prefetch(shards: Sequence[Wanted]) -> None:
    """Download shards in the background, in this order; replaces what an earlier call asked for and has not begun.

    No more than half of the cache is asked for at once, by all ranks of this machine together: more would evict what
    another has fetched and not yet read. What fails is left to the reader to find out.
    """
    global _prefetcher
    if _prefetcher is None or _prefetcher.process != os.getpid():  # threads do not survive a fork
        if not shards:
            return
        _prefetcher = _Prefetcher()
    _prefetcher.ask(shards)


def cache_limit() -> int:
    """Return the bytes that the copies may take: $CONTRASTIVE_CACHE_GB, 100 by default."""
    text = os.environ.get("CONTRASTIVE_CACHE_GB", "100")
    try:
        limit = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise UserError(f"CONTRASTIVE_CACHE_GB is '{text}'; set it to a number of gigabytes above 0")
    return limit


def copy_path(url: str) -> str:
    """Return where the copy of a remote shard is, or will be."""
    digest = hashlib.blake2b(url.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()
    return os.path.join(cache_folder(), "shards", digest)


def _open_shared(path: str, size: int | None) -> int | None:
    """Open a copy and hold it; None where there is none of this size, or it was evicted in between."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    state = os.fstat(descriptor)
    if state.st_nlink and size in (None, state.st_size):
        with contextlib.suppress(PermissionError):  # another user's copy
            os.utime(descriptor)
        return descriptor
    os.close(descriptor)
    return None


def _make_room(part: str, needed: int) -> None:
    """Evict until `needed` bytes fit, least recently used first, and reserve them as the size of `part`."""
    limit, folder = cache_limit(), os.path.dirname(part)
    if needed > limit:
        raise UserError(f"a shard of {needed} bytes does not fit; raise CONTRASTIVE_CACHE_GB from {limit / 1e9:g}")
    with FileLock(os.path.join(folder, "evict.lock")):
        copies = sorted(_copies(folder, part))
        total = needed + sum(size for _, size, _ in copies)
        for used, size, path in copies:
            if total <= limit:
                break
            if time.time() - used >= FRESH_SECONDS and _evict(path):
                total -= size
        with open(part, "wb") as file:
            file.truncate(needed)
    if total > limit:
        _warn_full(limit, total)


def _copies(folder: str, part: str) -> list[tuple[float, int, str]]:
    """Return (last use, bytes, path) of the copies and of downloads under way, but for `part`."""
    found = []
    with os.scandir(folder) as files:
        for file in files:
            if file.name.endswith(".lock") or file.path == part:
                continue
            try:
                state = file.stat()
            except FileNotFoundError:
                continue
            found.append((state.st_mtime, state.st_size, file.path))
    return found


def _evict(path: str) -> bool:
    """Remove a copy that nobody reads, or what a download that was killed has left; False where it is in use."""
    try:
        if path.endswith(_PART):
            with FileLock(f"{path.removesuffix(_PART)}.lock", timeout=0):
                os.unlink(path)
            return True
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        finally:
            os.close(descriptor)
    except (Timeout, BlockingIOError):
        return False
    except FileNotFoundError:
        pass
    return True


_warned = False


def _warn_full(limit: int, total: int) -> None:
    global _warned
    if not _warned:
        _warned = True
        warn(
            f"the shards in use take {total / 1e9:.2f} GB, more than the {limit / 1e9:g} GB of CONTRASTIVE_CACHE_GB; "
            "raise it, or lower data.lanes"
        )


class _Prefetcher:
    """Background threads of one process, which end with it."""

    def __init__(self):
        self.process = os.getpid()
        self._wanted: deque[Wanted] = deque()
        self._changed = threading.Condition()
        for _ in range(_PREFETCH_THREADS):
            threading.Thread(target=self._work, daemon=True, name="prefetch").start()

    def ask(self, shards: Sequence[Wanted]) -> None:
        room = cache_limit() // 2 // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # torchrun's, accelerate's
        with self._changed:
            self._wanted.clear()
            for shard in shards:
                room -= shard[1]
                if room < 0:
                    break
                self._wanted.append(shard)
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._wanted:
                    self._changed.wait()
                shard = self._wanted.popleft()
            try:
                os.close(open_copy(*shard))
            except Exception:
                continue  # the reader meets the same fault, and says so


_prefetcher: _Prefetcher | None = None
