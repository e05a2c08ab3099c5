"""The images of a table's rows: where their paths lead, and which rows show the same one."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from contrastive.data.record import evenly_spread, part_and_row
from contrastive.data.sources.paths import IMAGE_SUFFIXES
from contrastive.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

SCAN_BYTES = 128 * 2**20
"""Of embedded images: what is read before it is believed that no two rows show the same one."""
# How paths are written that lead nowhere as they stand. '#0' is the number of a caption in Flickr's lists.
_OTHERWISE = ((r"\\", "/", "backslashes taken for '/'"), (r"#\d+$", "", "'#0', '#1', ... taken off the paths"))
_BASE64 = ("data:image/", "/9j/4", "iVBORw0KGgo")


class TablePart(NamedTuple):
    """Consecutive rows with one origin. label: names it in keys. folder: of relative image paths, '' for none."""

    label: str
    folder: str
    num_rows: int


def find_images(
    name: str, column: str, paths: pa.ChunkedArray, parts: Sequence[TablePart]
) -> tuple[pa.ChunkedArray, list[str]]:
    r"""Return the paths as they lead to images, told by 100 of them, and what was decided: '\' may become '/', '#0' go.

    Raises:
        UserError: they hold something else than paths, or none of them leads to a file.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    ends, tried = np.cumsum([part.num_rows for part in parts]), []
    for row in evenly_spread(len(paths)):
        value = (paths[row].cast(pa.binary()).as_py() or b"").decode("utf-8", "replace")
        part, place = part_and_row(ends, row)
        if value.startswith(("http://", "https://", "s3://", "gs://")):
            raise UserError(
                f"{name}: column '{column}' holds web addresses; download the images first, "
                "as img2dataset does into .tar shards"
            )
        if value.startswith(_BASE64) and len(value) > 200:
            raise UserError(f"{name}: column '{column}' holds base64 text; decode it to files, or to bytes in a table")
        if os.path.isfile(os.path.join(parts[part].folder, value)):
            return paths, []
        tried.append((parts[part].folder, value, f"{parts[part].label}:{place}"))
    for written, meant, note in _OTHERWISE:
        if any(os.path.isfile(os.path.join(folder, re.sub(written, meant, value))) for folder, value, _ in tried):
            return pc.replace_substring_regex(paths, written, meant), [note]
    folder, value, key = tried[0]
    slashes = " and with '/' for '\\'" if "\\" in value else ""
    raise UserError(
        f"{name}: no image is there, of {len(tried)} that were looked for: column '{column}' has '{value}' ({key}), "
        f"looked for as '{os.path.abspath(os.path.join(folder, value))}'{slashes}; relative paths start at "
        f"the table's folder{_elsewhere(folder, value)}"
    )


def _elsewhere(folder: str, value: str) -> str:
    """Say where such a file lies, if it is near."""
    value, above = value.replace("\\", "/"), os.path.join(folder, os.pardir)
    near = [f"{os.path.join(glob.escape(at), '*')}/" for at in (folder, above)]
    starts = [os.curdir, folder, above, *(path for pattern in near for path in sorted(glob.glob(pattern))[:50])]
    for path in (value.lstrip("/"), os.path.basename(value)):
        for end in ("", *(f".{suffix}" for suffix in IMAGE_SUFFIXES)):
            for start in starts:
                if os.path.isfile(os.path.join(start, path + end)):
                    found = os.path.abspath(os.path.join(start, path + end))
                    return f"; there is '{found}', where its paths have to lead"
    return ""


def path_keys(paths: pa.ChunkedArray, parts: Sequence[TablePart]) -> pa.ChunkedArray:
    """Return the paths in one spelling, null for none: './a.jpg', 'a.jpg' and '/DATA/a.jpg' are the same."""
    import pyarrow as pa
    import pyarrow.compute as pc

    paths = paths.cast(pa.large_binary())  # bad UTF-8 costs a sample, not the table
    paths = pc.if_else(pc.equal(paths, b""), None, paths)
    if any(pc.any(pc.match_substring(paths, odd)).as_py() for odd in ("./", "//")):
        paths = pc.replace_substring_regex(paths, r"/(\.?/)+", "/")
        paths = pc.replace_substring_regex(paths, r"^(\./)+", "")
    absolute = pc.starts_with(paths, "/")
    if len({part.folder for part in parts}) == 1 and not pc.any(absolute).as_py():
        return paths
    spelled, first = [], 0
    for part in parts:
        own, folder = paths.slice(first, part.num_rows), os.fsencode(os.path.join(os.path.abspath(part.folder), ""))
        joined = pc.binary_join_element_wise(pa.scalar(folder, own.type), own, pa.scalar(b"", own.type))
        spelled += pc.if_else(absolute.slice(first, part.num_rows), own, joined).chunks
        first += part.num_rows
    return pa.chunked_array(spelled, paths.type)


def byte_keys(groups: Iterable[pa.Array]) -> pa.ChunkedArray | None:
    """Return a key a row, the same where bytes and path of two images are; None where none seems to be there twice.

    groups: bytes, or structs of bytes and path, in the order of the rows. Of a large table all are read only where
    there is a pair in the first SCAN_BYTES.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    keys, seen, read = [], set(), 0
    for group in groups:
        fields = [held.name for held in group.type] if pa.types.is_struct(group.type) else []
        texts = pc.struct_field(group, "path").to_pylist() if "path" in fields else [None] * len(group)
        for value, text in zip(pc.struct_field(group, "bytes") if fields else group, texts, strict=True):
            buffer, path = value.as_buffer() if value.is_valid else None, os.fsencode(text or "")
            keys.append(path or None if buffer is None else hashlib.blake2b(buffer, digest_size=16).digest() + path)
            seen.add(keys[-1])
            read += len(buffer or b"")
        if read > SCAN_BYTES and len(seen) == len(keys):
            return None
    return pa.chunked_array([pa.array(keys, pa.large_binary())])


def rows_by_image(keys: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the rows of each image, image after image by its first row, and where those of each end; None: no repeats.

    keys: one a row, equal for equal images; a row whose key is null stands alone. Of a, b, a, null the rows are
    0, 2 (of a), 1 (of b), 3, which end at 2, 3, 4.
    """
    import pyarrow.compute as pc

    codes = np.concatenate([pc.fill_null(part.indices, -1).to_numpy() for part in keys.dictionary_encode().chunks])
    num_keys, alone, rows = codes.max(initial=-1) + 1, codes < 0, np.arange(len(codes))
    if num_keys + alone.sum() == len(codes):
        return None
    first = np.empty(num_keys + 1, np.int64)
    first[codes[::-1]] = rows[::-1]  # of several, the last that is written stays
    first = np.where(alone, rows, first[codes])
    return np.argsort(first, kind="stable"), np.cumsum(np.bincount(first)[np.unique(first)])
