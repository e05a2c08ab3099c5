"""Folders that are whole or absent: written aside, hashed, flushed, then renamed; verified before use.

torch, safetensors and DCP all load a file with a flipped bit without a word; only a hash finds it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

MANIFEST = "manifest.json"


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make `folder` appear at once, complete, with a manifest of sha256 sums.

    `fill` writes the files into a temporary sibling. What was there under the same name is replaced. When
    `fill` or the disk fails, nothing under the final name has changed and the temporary folder is removed.
    """

    def fill_and_sum(temporary: Path) -> None:
        fill(temporary)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        sums = {str(path.relative_to(temporary)): _sha256(path) for path in files}
        (temporary / MANIFEST).write_text(json.dumps({"sha256": sums}, indent=1))

    appear_at_once(folder, fill_and_sum, replace=True)


def appear_at_once(folder: Path, fill: Callable[[Path], None], replace: bool) -> None:
    """As `write_folder`, without a manifest. replace=False leaves what is there as it is (OSError), if not empty."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        for path in [*sorted(temporary.rglob("*")), temporary]:
            _sync(path)
        if replace and folder.exists():
            shutil.rmtree(folder)
        os.rename(temporary, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
