"""Files and folders that are whole or absent: written aside, flushed, renamed; claimed before work begins.

torch, safetensors and DCP all load a file with a flipped bit without a word; only a hash finds it.
"""

import ctypes
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from contrastive.errors import UserError

T = TypeVar("T")
MANIFEST = "manifest.json"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
MOST_NUMBER = 2**24
MOST_VALUES = 100_000  # of a YAML file: nine lines of aliases stand for a billion


def cache_folder() -> str:
    """Return the folder for what can be made again: $CONTRASTIVE_CACHE, else ~/.cache/contrastive."""
    return os.path.abspath(os.path.expanduser(os.environ.get("CONTRASTIVE_CACHE") or "~/.cache/contrastive"))


def package_file(package: str, missing: str, *parts: str) -> Path:
    """Return the path of a file in a package, without importing it; UserError `missing` where it is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise UserError(missing)
    return Path(found.submodule_search_locations[0], *parts)


def sha256(path: str | Path) -> str:
    """Return the sha256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all; `content` may be a function that writes to the open binary file.

    Text is UTF-8; what cannot be encoded (lone surrogates of a file's name) is written as \\udcff.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    # The process's own name: several may write one cache at a time, and all write the same.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content) if isinstance(content, bytes) else content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all, so that people can read it too."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file that came with a folder.

    Raises:
        UserError: no such file, not JSON (torn or not text), or something else than an object.
    """
    again = "copy the file again from where the model came from"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}: copy the whole folder again") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply for JSON: {again}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): {again}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object: {again}")
    return content


def check_sizes(content: Any, where: object, most: Mapping[str, float], name: str = "") -> None:
    """Raise UserError where a number within JSON of a model is beyond MOST_NUMBER, or what `most` says of its name.

    Libraries make what such a file asks for before anything is compared.
    """
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            check_sizes(value, where, most, str(key))
    elif isinstance(content, int) and content > most.get(name, MOST_NUMBER):
        raise UserError(f"{where}: {name} is {content}, which no model has; copy it again from where it came from")


def read_yaml(path: Path, what: str) -> Any:
    """Return what a YAML file of the user's holds; `what` it is, for messages: 'the configuration'.

    Raises:
        UserError: it cannot be read, is no text, or not YAML, with the line; or it is a bomb of aliases.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise UserError(f"{path} is nested too deeply for YAML") from None
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    except (ValueError, TypeError, AttributeError) as error:  # a month of 13, a list as a key, a merge of no mapping
        raise UserError(f"{path}: not valid YAML: {error}") from None
    todo, count = [content], 0
    while todo:
        count, value = count + 1, todo.pop()
        if count > MOST_VALUES:
            raise UserError(f"{path}: its aliases make more than {MOST_VALUES:,} values; write them out")
        todo += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return content


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make `folder` appear at once, complete, with a manifest of sha256 sums.

    `fill` writes the files into a temporary sibling. What was there under the same name is replaced and at no moment
    absent; where the file system cannot exchange two names, it is .old-NAME for a moment. When `fill` or the disk
    fails, nothing under the final name has changed and the temporary folder is removed. It is always called .tmp-NAME,
    so that what a kill leaves behind is found.
    """
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    mend_folder(folder)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        write_manifest(temporary)
        _settle(temporary)
        if not (folder.exists() and _exchange(temporary, folder)):
            if folder.exists():
                os.rename(folder, _old(folder))
            os.rename(temporary, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        mend_folder(folder)


def write_manifest(folder: Path) -> None:
    """Write what `problem` compares a folder with: the sha256 sums of all files that are in it now."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    write_json(folder / MANIFEST, {"sha256": {str(path.relative_to(folder)): sha256(path) for path in files}})


def mend_folders(parent: Path) -> None:
    """Put right what a kill left of `write_folder` in `parent`: halves go, what was moved aside comes back."""
    for half in parent.glob(".tmp-*"):
        shutil.rmtree(half, ignore_errors=True)
    for manifest in parent.glob(f".old-*/{MANIFEST}"):
        mend_folder(parent / manifest.parent.name.removeprefix(".old-"))


def mend_folder(folder: Path) -> None:
    """Bring back what `write_folder` moved aside for `folder` and did not replace; remove what it replaced."""
    old = _old(folder)
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    shutil.rmtree(old, ignore_errors=True)


def write_new_folder(folder: Path, fill: Callable[[Path], T]) -> T:
    """As `write_folder`, without a manifest, in a place of the user's; return what `fill` returns.

    What is there stays as it is (OSError), if it is not empty; no sibling is touched, whatever it is called.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".tmp-{folder.name}-", dir=folder.parent))
    try:
        temporary = aside / folder.name  # with the permissions of a new folder, which mkdtemp's has not
        temporary.mkdir()
        filled = fill(temporary)
        _settle(temporary)
        os.rename(temporary, folder)
        _sync(folder.parent)
        return filled
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def problem(folder: Path) -> str | None:
    """Return what is wrong with a folder that `write_folder` made, or None when every file is as written."""
    try:
        sums = json.loads((folder / MANIFEST).read_text())["sha256"]
        named = [Path(name).parts for name, _ in sums.items()]
    except FileNotFoundError:
        return "no manifest"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "the manifest is damaged"
    if any(".." in parts or parts[:1] == ("/",) for parts in named):
        return "the manifest names files outside of the folder"
    for name, expected in sums.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if sha256(path) != expected:
                return f"{name} is damaged"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def claim_folder(
    folder: Path, record: str, of: str, mend: str, only: Sequence[str] | None = None
) -> dict[str, Any] | None:
    """Check, before any work is done, that a command may write to `folder`; return what `record` in it says.

    A folder is free where it is not there yet or empty (files that a kill left half-written aside, locks, and folders
    of nothing else do not count), and may be taken again where an earlier call of the same command left its record, a
    JSON object. What the record has to say is for the caller to compare.

    Args:
        record: the name of that file. of: what writes such folders, for messages: 'an inspection'.
        mend: what to do about it: 'give another --out'.
        only: names of the files that may not be there without the record; every file where None.

    Raises:
        UserError: it is a file, cannot be written, or holds something else.
    """
    check_writable(folder, mend)
    path = folder / record
    if path.exists():
        try:
            return read_json(path)
        except UserError:
            raise UserError(f"{path} is not of {of}; {mend}") from None
    if only is not None:
        for taken in (folder / name for name in only if (folder / name).exists()):
            raise UserError(f"{taken} is there without {record}; {mend}")
    elif folder.is_dir() and any(not _is_left_over(entry) for entry in folder.iterdir()):
        raise UserError(f"{folder} holds files that are not of {of}; {mend}")
    return None


def check_writable(folder: Path, mend: str) -> None:
    """Raise UserError where `folder` cannot be written to, or made; `mend` says what to do about it."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if nearest == folder and not folder.is_dir():
        raise UserError(f"cannot write to {folder}: {folder.name} is a file; {mend}")
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise UserError(f"cannot write to {folder}; {mend}")


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock file `path` for as long as the context lasts. UserError `busy` where another process has it."""
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(busy) from None
    try:
        yield
    finally:
        lock.release()


def _is_left_over(path: Path) -> bool:
    if path.is_dir():  # made for a record that a kill came before
        return all(map(_is_left_over, path.iterdir()))
    return path.name.endswith(".partial") or path.name in ("lock", ".lock")


def _old(folder: Path) -> Path:
    return folder.with_name(f".old-{folder.name}")


def _settle(folder: Path) -> None:
    """Flush all that is in a new folder, for those to read that the umask lets: safetensors writes for the owner."""
    readers = folder.stat().st_mode & 0o666
    for path in [*sorted(folder.rglob("*")), folder]:
        if path.is_file():
            path.chmod(readers)
        _sync(path)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at once; False where that cannot be done: Linux can, on most file systems."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    paths = os.fsencode(one), os.fsencode(other)
    return swap is not None and swap(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
