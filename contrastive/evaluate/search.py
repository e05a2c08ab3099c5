"""The nearest rows to a query: exact, by blocks, or approximate through an index of faiss or usearch.

And a page of pictures with what is to be said of each: what a search found, what a curation dropped. Q queries, N rows,
E channels, K nearest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from contrastive.data.decode import decode
from contrastive.data.record import BadSample, Source
from contrastive.errors import UserError
from contrastive.files import write_whole
from contrastive.log import say
from contrastive.page import PARTS, filled, html_page, thumbnail

BLOCK = 2**24  # cosines held at once: 64 MB, and twice that to rank them
MOST_QUERIES = 4096  # at once: narrower blocks of rows make slow products
LIBRARIES = ("faiss", "usearch")
# faiss: rows lie in as many cells as the square root of their number; the cells nearest to a query are looked through.
CELLS_LOOKED_THROUGH, ROWS_OF_A_CELL_TO_PLACE_IT = 64, 64
# usearch: a graph (HNSW, arXiv 1603.09320); edges of a row, rows looked at to place one, and to find some.
EDGES, LOOKED_AT_TO_BUILD, LOOKED_AT = 32, 80, 256
_LAST = 2**32 - 1
SIDE = 240  # pixels of a picture on the page


class Nearest(NamedTuple):
    """The nearest rows to each query, nearest first; among equal cosines the lower row first."""

    scores: torch.Tensor
    """(Q, K) float32 cosines; -inf where an approximate search found fewer rows."""
    rows: torch.Tensor
    """(Q, K) int64."""


def nearest(
    queries: torch.Tensor, rows: torch.Tensor, count: int, *, device: str | torch.device = "cpu", block: int = BLOCK
) -> Nearest:
    """Return the `count` rows nearest to each query, exactly; all of them where there are fewer.

    Memory beside the arguments: 24 bytes for each of `block` cosines, whatever Q and N are.

    Args:
        queries: (Q, E). rows: (N, E). Both float32, of unit length.
    """
    count = min(count, len(rows))
    at_once = max(1, min(len(queries), MOST_QUERIES, block // max(1, count)))
    found = [_nearest(part.to(device), rows, count, max(1, block // at_once)) for part in queries.split(at_once)]
    if not found or not count:
        return Nearest(torch.empty(len(queries), count), torch.empty(len(queries), count, dtype=torch.int64))
    return Nearest(*map(torch.cat, zip(*found, strict=True)))


def _nearest(queries: torch.Tensor, rows: torch.Tensor, count: int, size: int) -> Nearest:
    best = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(rows), size):
        scores = queries @ rows[start : start + size].to(queries.device).T
        keys = _keys(scores, torch.arange(start, start + scores.shape[1], device=queries.device))
        best = torch.cat([best, keys.topk(min(count, keys.shape[1])).values], dim=1)
        best = best.topk(min(count, best.shape[1])).values
    return Nearest(_floats(best >> 32).cpu(), (_LAST - (best & _LAST)).cpu())


def _keys(scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return whole numbers that rank as (cosine, then the lower row) does: topk leaves the order of ties open.

    A float32 read as an integer ranks as it does where it is positive, and the other way round where it is negative.
    """
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: of -0.0 a plain 0
    ranks = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    return (ranks << 32) | (_LAST - rows)


def _floats(ranks: torch.Tensor) -> torch.Tensor:
    """Undo what `_keys` makes of cosines."""
    bits = ranks.to(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)


def index_library() -> str:
    """Return the library at hand that searches approximately; UserError without one."""
    for name in LIBRARIES:
        if find_spec(name):
            return name
    raise UserError("--approximate needs faiss or usearch, and neither is installed: pip install 'contrastive[search]'")


def nearest_by_index(
    queries: torch.Tensor, rows: torch.Tensor, count: int, *, library: str, file: Path | None = None
) -> Nearest:
    """Return about the `count` rows nearest to each query; the cosines of those found are exact.

    Args:
        queries, rows: as `nearest` takes them.
        library: one of LIBRARIES.
        file: keeps the index, which takes long to make; read where it is there, so it has to be of these rows.
    """
    count = min(count, len(rows))
    search = {"faiss": _search_faiss, "usearch": _search_usearch}[library]
    places = torch.from_numpy(search(queries.numpy(), rows.numpy(), count, file).astype("int64"))
    missing = (places < 0) | (places >= len(rows))
    scores = torch.einsum("qe,qke->qk", queries, rows[places.masked_fill(missing, 0)])
    keys = _keys(scores.masked_fill(missing, -torch.inf), places.clamp(0, _LAST)).sort(dim=1, descending=True).values
    return Nearest(_floats(keys >> 32), _LAST - (keys & _LAST))


def _search_faiss(queries, rows, count: int, file: Path | None):
    import faiss

    index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP) if file and file.exists() else None
    if index is None or (index.ntotal, index.d) != rows.shape:
        say(f"building an index of {len(rows):,} rows")
        cells = max(1, math.isqrt(len(rows)))
        index = faiss.index_factory(rows.shape[1], f"IVF{cells},Flat", faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, ROWS_OF_A_CELL_TO_PLACE_IT
        index.train(rows)
        index.add(rows)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, lambda opened: faiss.write_index(index, faiss.PyCallbackIOWriter(opened.write)))
    index.nprobe = CELLS_LOOKED_THROUGH
    return index.search(queries, count)[1]


def _search_usearch(queries, rows, count: int, file: Path | None):
    from usearch.index import Index

    index = Index.restore(str(file)) if file and file.exists() else None
    if index is None or (len(index), index.ndim) != rows.shape:
        say(f"building an index of {len(rows):,} rows")
        index = Index(
            ndim=rows.shape[1], metric="ip", dtype="f32", connectivity=EDGES, expansion_add=LOOKED_AT_TO_BUILD
        )
        index.add(np.arange(len(rows)), rows)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, lambda opened: opened.write(index.save()))
    index.expansion_search = max(LOOKED_AT, 2 * count)
    found = index.search(queries, count)
    return found.keys.reshape(len(queries), -1)


@dataclass(frozen=True)
class Shot:
    """A picture of the page, or two side by side."""

    images: tuple[np.ndarray | None, ...]
    """uint8 (H, W, 3); None for one that cannot be read."""
    title: str
    text: str
    key: str


@dataclass(frozen=True)
class Section:
    title: str
    remark: str
    shots: Sequence[Shot]
    image: np.ndarray | None = None
    """Beside the title, uint8 (H, W, 3)."""


def write_gallery(
    path: Path,
    title: str,
    remark: str,
    sections: Sequence[Section],
    tables: Sequence[Sequence[Sequence[str]]] = (),
) -> None:
    """Write the page whole or not at all; it needs no other file.

    Args:
        tables: above the pictures; of each its rows, a name and figures.
    """
    pictured = any(shot.images for section in sections for shot in section.shots)
    parts = {"sections": sections, "tables": tables, "pictured": pictured, "thumbnail": thumbnail}
    body = filled(PARTS / "gallery.html.jinja", **parts)
    write_whole(path, html_page(title, remark, body, "gallery.css"))


def picture(source: Source, index: int) -> np.ndarray | None:
    """Return the image of a sample as uint8 (H, W, 3), small where that is cheaper; None where it cannot be read."""
    try:
        return decode(source[index].image, min_side=SIDE).permute(1, 2, 0).numpy()
    except BadSample:
        return None


def said_of(source: Source, index: int) -> str:
    """Return the first caption of a sample, else its class; empty where it has neither."""
    try:
        label = source.label(index)
        if label is not None and source.class_names and (source.prompted or not source.captions(index)):
            return source.class_names[label]
        return next((text.strip() for text in source.captions(index) if text.strip()), "")
    except (BadSample, IndexError):
        return ""
