"""Files from afar: downloaded whole, checked, and kept in a bounded cache that all processes of a machine share."""

import contextlib
import fcntl
import hashlib
import os
import queue
import shlex
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import lru_cache
from typing import Any

from filelock import FileLock, Timeout

from contrastive.errors import UserError, reason_of
from contrastive.files import cache_folder
from contrastive.log import warn

TIMEOUT = 30.0  # seconds: to connect, and for each read to bring something
ATTEMPTS = 6
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds between attempts: doubled from the first up to the longest
FRESH_SECONDS = 60.0  # a copy younger than this may have been fetched for a reader that has yet to open it
_CHUNK = 4 * 2**20
_TRANSIENT = (408, 425, 429)  # besides all of 5xx
_ADVICE = {401: "it asks for credentials", 403: "access is denied", 404: "there is no such file"}
_PREFETCH_THREADS = 2
_PART = ".part"

Wanted = tuple[str, int, str | None]  # URL, size in bytes, sha256


class _Transient(Exception):
    """What may go better next time."""


class _Altered(_Transient):
    """All of a file came, and it is another one: it was replaced, unless something on the way changed it."""


def download(
    url: str,
    path: str,
    *,
    size: int | None = None,
    sha256: str | None = None,
    reserve: Callable[[int], None] = lambda size: None,
) -> None:
    """Write the file at `url` to `path`, which is complete and flushed when this returns.

    http and https are read by the standard library: fsspec runs an event loop in a thread for them, which a process
    that is forked later inherits in a broken state. All else is read by fsspec. A server that is busy, a cut
    connection and one that brings nothing for TIMEOUT seconds are tried again, ATTEMPTS times in all, with growing
    waits. A whole file with another sha256 is fetched once more.

    Args:
        size, sha256: what it has to be, where that is known.
        reserve: called with the size, when it is known, before anything is written.

    Raises:
        UserError: names the URL: no such file, no access, another size than `size` (at once), another sha256
            (twice); or the last fault of the last attempt.
    """
    altered = 0
    for attempt in range(ATTEMPTS):
        try:
            return _attempt(url, path, size, sha256, reserve)
        except _Transient as fault:
            last = fault
        altered += isinstance(last, _Altered)
        if altered == 2:
            raise UserError(f"{url}: {last}; {_index_again(url)}")
        if attempt < ATTEMPTS - 1:
            time.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2**attempt))
    raise UserError(f"{url}: not downloaded after {ATTEMPTS} attempts, at last because {last}; start again later")


def _attempt(url: str, path: str, size: int | None, sha256: str | None, reserve: Callable[[int], None]) -> None:
    digest, received = hashlib.sha256(), 0
    with contextlib.closing(_read(url)) as content:
        length = next(content)
        if None not in (size, length) and size != length:
            raise UserError(f"{url} has {length} bytes, but {size} when indexed; {_index_again(url)}")
        expected = size if length is None else length
        if expected is not None:
            reserve(expected)
        # Not truncated: the room reserved stays taken while the file fills.
        with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:
            for chunk in content:
                received += len(chunk)
                digest.update(chunk)
                file.write(chunk)
            file.truncate()
            os.fsync(file.fileno())
    if expected is not None and received != expected:
        raise _Transient(f"it was cut off after {received} of {expected} bytes")
    if sha256 is not None and digest.hexdigest() != sha256:
        raise _Altered(f"its sha256 begins with {digest.hexdigest()[:12]}, but {sha256[:12]} when indexed")


def _index_again(url: str) -> str:
    return f"if it was replaced, run `contrastive index {shlex.quote(url)} --force`"


def _read(url: str) -> Iterator[Any]:
    """Yield the length of a file in bytes, None where it is not known, then its content chunk by chunk.

    What fails for good is a UserError, what may go better next time a _Transient: so any OSError that is seen outside
    comes from the local disk.
    """
    try:
        yield from (_http if url.startswith(("http://", "https://")) else _store)(url)
    except urllib.error.HTTPError as error:
        fault = f"the server answers {error.code} {error.reason}"
        error.close()
        if error.code >= 500 or error.code in _TRANSIENT:
            raise _Transient(fault) from None
        raise UserError(f"{url}: {fault}; {_ADVICE.get(error.code, 'check the address')}") from None
    except FileNotFoundError:
        raise UserError(f"{url}: there is no such file; check the address") from None
    except PermissionError as error:
        raise UserError(f"{url}: access is denied ({reason_of(error)})") from None
    except ImportError as error:
        raise UserError(f"{url}: {reason_of(error)}: pip install 'contrastive[remote]'") from None
    except ValueError as error:
        raise UserError(f"{url}: cannot be opened: {reason_of(error)}") from None
    except Exception as error:  # every store has its own classes
        if "Credentials" in type(error).__name__:
            raise UserError(f"{url}: {reason_of(error)}") from None
        reason = getattr(error, "reason", error)  # urllib wraps what goes wrong before the first byte
        if isinstance(reason, TimeoutError):
            raise _Transient(f"nothing came for {TIMEOUT:g} s") from None
        raise _Transient(f"the connection failed ({reason_of(reason)})") from None


def _http(url: str) -> Iterator[Any]:
    request = urllib.request.Request(url, headers={"User-Agent": "contrastive", "Accept-Encoding": "identity"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        length = response.headers.get("Content-Length")
        yield int(length) if length else None
        yield from iter(lambda: response.read(_CHUNK), b"")


def _store(url: str) -> Iterator[Any]:
    """Read from an object store; every call is bounded in time, whatever its library's own settings."""
    from fsspec.core import url_to_fs

    fs, path = _in_time(url_to_fs, url)
    yield _in_time(fs.info, path).get("size")
    # Without read-ahead, which would fetch more than is asked for.
    with _in_time(fs.open, path, "rb", cache_type="none") as file:
        yield from iter(lambda: _in_time(file.read, _CHUNK), b"")


def _in_time(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function that may never return; TimeoutError when it has not within TIMEOUT."""
    answer: Future = Future()

    def call():
        try:
            answer.set_result(function(*arguments, **options))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return answer.result(TIMEOUT)


# The cache


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


def copy_path(url: str) -> str:
    """Return where the copy of a remote shard is, or will be."""
    digest = hashlib.blake2b(url.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()
    return os.path.join(cache_folder(), "shards", digest)


def _open_shared(path: str, size: int | None) -> int | None:
    """Open a copy and hold it; None where there is none of this size, or it was evicted in between."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
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


_warned = False


def _make_room(part: str, needed: int) -> None:
    """Evict until `needed` bytes fit, least recently used first, and reserve them as the size of `part`."""
    global _warned
    limit, folder = cache_limit(), os.path.dirname(part)
    if needed > limit:
        raise UserError(f"a shard of {needed} bytes does not fit; raise CONTRASTIVE_CACHE_GB from {limit / 1e9:g}")
    with FileLock(os.path.join(folder, "evict.lock")):
        copies = _copies(folder, part)
        total = needed + sum(size for _, size, _ in copies)
        for used, size, path in copies:
            if total <= limit:
                break
            if time.time() - used >= FRESH_SECONDS and _evict(path):
                total -= size
        with open(part, "wb") as file:
            file.truncate(needed)
    if total > limit and not _warned:
        _warned = True
        warn(
            f"the shards in use take {total / 1e9:.2f} GB, more than the {limit / 1e9:g} GB of CONTRASTIVE_CACHE_GB; "
            "raise it, or lower data.lanes"
        )


def _copies(folder: str, part: str) -> list[tuple[float, int, str]]:
    """Return (last use, bytes, path) of the copies and of downloads under way but for `part`, longest unused first."""
    found = []
    with os.scandir(folder) as files:
        for file in files:
            if not file.name.endswith(".lock") and file.path != part:
                with contextlib.suppress(FileNotFoundError):
                    found.append((file.stat().st_mtime, file.stat().st_size, file.path))
    return sorted(found)


def _evict(path: str) -> bool:
    """Remove a copy that nobody reads, or what a download that was killed has left; False where it is in use."""
    try:
        # Whoever fetches a shard holds its lock; whoever reads a copy holds one on the copy.
        with FileLock(f"{path.removesuffix(_PART)}.lock", timeout=0), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
    except (Timeout, BlockingIOError):
        return False
    except FileNotFoundError:
        pass
    return True


def prefetch(shards: Sequence[Wanted]) -> None:
    """Download shards in the background, in this order; replaces what an earlier call asked for and has not begun.

    No more than half of the cache is asked for at once, by all ranks of this machine together: more would evict what
    another has fetched and not yet read. What fails is left to the reader to find out.
    """
    if not shards and not _ahead.cache_info().currsize:
        return  # nothing is far away: no threads are needed
    ahead = _ahead(os.getpid())
    with contextlib.suppress(queue.Empty):
        while True:
            ahead.get_nowait()
    room = cache_limit() // 2 // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # torchrun's, accelerate's
    for shard in shards:
        room -= shard[1]
        if room < 0:
            break
        ahead.put(shard)


@lru_cache(maxsize=1)
def _ahead(process: int) -> queue.SimpleQueue:
    """Return the queue of shards that background threads of this process fetch; a fork has none of its parent's."""
    ahead = queue.SimpleQueue()
    for _ in range(_PREFETCH_THREADS):
        threading.Thread(target=_fetch_ahead, args=(ahead,), daemon=True, name="prefetch").start()
    return ahead


def _fetch_ahead(ahead: queue.SimpleQueue) -> None:
    while True:
        shard = ahead.get()
        with contextlib.suppress(Exception):  # the reader meets the same fault, and says so
            os.close(open_copy(*shard))
