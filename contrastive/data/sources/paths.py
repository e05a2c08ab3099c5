"""From a path, a URL, a glob or a brace range to the files it names; what names tell; the bytes of one image file."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from contrastive.data.record import BadSample
from contrastive.errors import UserError, did_you_mean

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
HELD_OUT = ("test", "val", "valid", "validation", "dev")
"""Names of held-out splits, the preferred one first."""
SPLIT_NAMES = {"train", "training", *HELD_OUT}
# No photograph is larger as a file; one that is would cost every worker that much memory.
MAX_IMAGE_BYTES = 256 * 2**20
# Protocols of fsspec that give whole files; a chain of them ('a::b') or a command ('pipe:') is not one.
REMOTE = ("http", "https", "s3", "gs", "gcs", "hf", "az", "abfs", "file", "memory")


def expand_paths(spec: str) -> list[str]:
    """Return the files that `spec` names: a path, a glob ('train-*.tar', sorted) or braces ('{000..331}.tar').

    Raises:
        UserError: a path that does not exist (with a near name), a glob that matches nothing, or a brace
            range with files missing.
    """
    spec = os.path.expanduser(spec)
    patterns = [spec] if os.path.exists(spec) else _expand_braces(spec)
    paths, missing = [], []
    for pattern in patterns:
        if os.path.exists(pattern):
            paths.append(pattern)
        elif not glob.has_magic(pattern):
            missing.append(pattern)
        elif matches := sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True))):
            paths += matches
        else:
            raise UserError(f"no file matches '{pattern}'{_where(pattern)}")
    if missing and len(patterns) > 1:
        raise UserError(f"{spec}: {len(missing)} of its {len(patterns)} files are missing, first '{missing[0]}'")
    if missing:
        raise UserError(f"no file or folder '{spec}'{_where(spec)}")
    return paths


def is_remote(location: str) -> bool:
    """Whether it is a URL of a kind that is downloaded."""
    scheme, separator, _ = location.partition("://")
    return bool(separator) and scheme in REMOTE and "::" not in location


def expand_urls(spec: str) -> list[str]:
    """Return the URLs that `spec` names: one, or a brace range. A glob is a UserError: a web server has no list."""
    urls = _expand_braces(spec)
    for url in urls:
        if "*" in url:
            raise UserError(f"{spec}: a glob works on local files only; write a range as '{{00000..00331}}.tar'")
    return urls


def folder_and_name(location: str) -> tuple[str, str]:
    """Split a path, made absolute, or a URL at its last slash."""
    if is_remote(location):
        folder, _, name = location.rpartition("/")
        return folder, name
    return os.path.split(os.path.abspath(location))


def short_names(paths: Sequence[str]) -> tuple[str, ...]:
    """Return the base names, or the paths below the common folder where base names repeat."""
    names = tuple(os.path.basename(path) for path in paths)
    if len(set(names)) == len(names):
        return names
    if any(is_remote(path) for path in paths):
        return tuple(path.partition("://")[2] for path in paths)
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return tuple(os.path.relpath(path, folder) for path in paths)


def table_suffix(path: str) -> str:
    """Return what kind of table a path names, '.csv' of 'PAIRS.csv.gz' too; in lower case."""
    return os.path.splitext(path.lower().removesuffix(".gz"))[1]


def is_image(path: str) -> bool:
    """Whether a file is called as images are."""
    _, dot, suffix = path.rpartition(".")
    return dot != "" and suffix.lower() in IMAGE_SUFFIXES


def read_image_file(path: str, key: str) -> bytes:
    """Return the bytes of the file. Raises BadSample: 'missing_image', 'unreadable_image', 'too_large'."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_IMAGE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise BadSample("missing_image", key) from None
    except (OSError, ValueError):  # ValueError: a name that holds a zero byte
        raise BadSample("unreadable_image", key) from None
    if len(data) > MAX_IMAGE_BYTES:
        raise BadSample("too_large", key)
    return data


def are_splits(names: Sequence[str]) -> bool:
    """Whether all names are those of splits: 'train', 'val2017'."""
    return SPLIT_NAMES.issuperset(name.lower().rstrip("0123456789") for name in names)


def splits_of(paths: Sequence[str]) -> list[str]:
    """Return what files named as 'test-00000-of-00001.parquet', 'train-0.tar' begin with; [] unless all are such."""
    begins = sorted({re.split(r"[-_.]", os.path.basename(path))[0] for path in paths})
    return begins if are_splits(begins) else []


def _expand_braces(spec: str) -> list[str]:
    from braceexpand import UnbalancedBracesError, braceexpand

    try:
        return list(braceexpand(spec, escape=False))
    except UnbalancedBracesError:
        raise UserError(f"{spec}: a brace is not closed; write a range as '{{00000..00331}}.tar'") from None


def _where(path: str) -> str:
    """Say which part of the path is wrong: the folder, or the name in it."""
    folder = Path(path).parent
    if glob.has_magic(str(folder)):
        return "; check the folder"
    if not folder.is_dir():
        return f": there is no folder '{folder}'"
    return f"; look in '{folder}'.{did_you_mean(Path(path).name, os.listdir(folder))}"
