"""Download one file whole, and check that it came whole."""

import hashlib
import http.client
import os
import queue
import shlex
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from contrastive.errors import UserError

TIMEOUT = 30.0  # seconds: to connect, and for each read to bring something
ATTEMPTS = 6
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds between attempts: doubled from the first up to the longest
_CHUNK = 4 * 2**20
_TRANSIENT = (408, 425, 429)  # besides all of 5xx
_ADVICE = {401: "it asks for credentials", 403: "access is denied", 404: "there is no such file"}


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

    http and https are read by the standard library, without the event loop that other libraries' processes must
    not inherit; all else by fsspec. A server that is busy, a cut connection and one that brings nothing for
    TIMEOUT seconds are tried again, ATTEMPTS times in all, with growing waits. A whole file with another sha256 is
    fetched once more.

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
    open_remote = _open_http if url.startswith(("http://", "https://")) else _open_store
    with open_remote(url) as (length, read):
        if None not in (size, length) and size != length:
            raise UserError(f"{url} has {length} bytes, but {size} when indexed; {_index_again(url)}")
        expected = size if length is None else length
        if expected is not None:
            reserve(expected)
        # Not truncated: the room reserved stays taken while the file fills.
        with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:
            while chunk := read():
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
    return f"if it was replaced, run `python scripts/index.py {shlex.quote(url)} --force`"


Opened = tuple[int | None, Callable[[], bytes]]  # length in bytes where known, and what reads the next chunk


@contextmanager
def _open_http(url: str) -> Iterator[Opened]:
    with _request(url) as response:
        length = response.headers.get("Content-Length")
        yield (int(length) if length else None), lambda: _from_server(lambda: response.read(_CHUNK))


def _request(url: str) -> http.client.HTTPResponse:
    request = urllib.request.Request(url, headers={"User-Agent": "contrastive", "Accept-Encoding": "identity"})
    try:
        return _from_server(lambda: urllib.request.urlopen(request, timeout=TIMEOUT))
    except urllib.error.HTTPError as error:
        fault = f"the server answers {error.code} {error.reason}"
        error.close()
        if error.code >= 500 or error.code in _TRANSIENT:
            raise _Transient(fault) from None
        raise UserError(f"{url}: {fault}; {_ADVICE.get(error.code, 'check the address')}") from None


def _from_server(call: Callable[[], Any]) -> Any:
    """Tell a fault of the connection from one of the local disk, both of which are OSErrors."""
    try:
        return call()
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)  # urllib wraps what goes wrong before the first byte
        if isinstance(reason, TimeoutError):
            raise _Transient(f"nothing came for {TIMEOUT:g} s") from None
        raise _Transient(f"the connection failed ({reason or type(error).__name__})") from None


@contextmanager
def _open_store(url: str) -> Iterator[Opened]:
    """Open a file of an object store; every call is bounded in time, whatever its library's own settings."""
    fs, path = _of_store(url, _filesystem, url)
    length = _of_store(url, fs.info, path).get("size")
    # Without read-ahead, which would fetch more than is asked for.
    file = _of_store(url, lambda: fs.open(path, "rb", cache_type="none"))
    try:
        yield length, lambda: _of_store(url, file.read, _CHUNK)
    finally:
        file.close()


def _filesystem(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    return url_to_fs(url)


def _of_store(url: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return _within(TIMEOUT, function, *arguments)
    except FileNotFoundError:
        raise UserError(f"{url}: there is no such file; check the address") from None
    except PermissionError as error:
        raise UserError(f"{url}: access is denied ({_line(error)})") from None
    except ImportError as error:
        raise UserError(f"{url}: a package for this protocol is missing: {_line(error)}") from None
    except ValueError as error:
        raise UserError(f"{url}: cannot be opened: {_line(error)}") from None
    except queue.Empty:
        raise _Transient(f"nothing came for {TIMEOUT:g} s") from None
    except Exception as error:  # every store has its own classes
        if "Credentials" in type(error).__name__:
            raise UserError(f"{url}: {_line(error)}") from None
        raise _Transient(_line(error)) from None


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _within(seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function that may never return; queue.Empty when it has not within the time."""
    answer: queue.Queue = queue.Queue(1)

    def call():
        try:
            answer.put((function(*arguments), None))
        except BaseException as error:
            answer.put((None, error))

    threading.Thread(target=call, daemon=True).start()
    value, error = answer.get(timeout=seconds)
    if error is not None:
        raise error
    return value
