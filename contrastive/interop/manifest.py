"""Folders that are whole or absent: written aside, hashed, flushed, then renamed; verified before use.

torch, safetensors and DCP all load a file with a flipped bit without a word; only a hash finds it.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

MANIFEST = "manifest.json"


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make `folder` appear at once, complete, with a manifest of sha256 sums.

    `fill` writes the files into a temporary sibling. What was there under the same name is replaced. When
    `fill` or the disk fails, nothing under the final name has changed and the temporary folder is removed. It is
    always called .tmp-NAME, so that what a kill leaves behind is found.
    """

    def fill_and_sum(temporary: Path) -> None:
        fill(temporary)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        sums = {str(path.relative_to(temporary)): _sha256(path) for path in files}
        (temporary / MANIFEST).write_text(json.dumps({"sha256": sums}, indent=1))

    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        fill_and_sum(temporary)
        _sync_all(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        _rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_new_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """As `write_folder`, without a manifest, in a place of the user's.

    What is there stays as it is (OSError), if it is not empty; no sibling is touched, whatever it is called.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".tmp-{folder.name}-", dir=folder.parent))
    try:
        temporary = aside / folder.name  # with the permissions of a new folder, which mkdtemp's has not
        temporary.mkdir()
        fill(temporary)
        _sync_all(temporary)
        _rename(temporary, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def problem(folder: Path) -> str | None:
    """Return what is wrong with a folder that `write_folder` made, or None when every file is as written."""
    try:
        sums = json.loads((folder / MANIFEST).read_text())["sha256"]
    except FileNotFoundError:
        return "no manifest"
    except (OSError, ValueError, KeyError, TypeError):
        return "the manifest is damaged"
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        try:
            if _sha256(path) != expected:
                return f"{name} is damaged"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_all(folder: Path) -> None:
    for path in [*sorted(folder.rglob("*")), folder]:
        _sync(path)


def _rename(folder: Path, to: Path) -> None:
    os.rename(folder, to)
    _sync(to.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
