"""Find the images that are nearest to a text, or to another image.

    contrastive search runs/mine photos/ "a dog in snow"
    contrastive search runs/mine 'shards/*.tar' "a red boat" holiday.jpg --top 50
    contrastive search runs/mine embeddings/cc3m "a cat" --approximate --json

IMAGES is a folder or a file of images, data as in training, or a folder that `contrastive embed` wrote with this model.
A query that ends as image files do (.jpg, .png, ...) is an image, any other is a text. Prints a table, and writes a
page with the pictures; with --json prints an object a line, and writes the page where --out names one. Embeddings are
made once and kept in MODEL/embeddings; a second search, for whatever, is over them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, arg

import contrastive
from contrastive.command_line import LoadingOptions, chosen_device, print_json
from contrastive.config import parse
from contrastive.data.record import Source
from contrastive.data.sources import announce, open_source
from contrastive.data.sources.image_files import open_images
from contrastive.data.sources.paths import is_image
from contrastive.errors import UserError
from contrastive.evaluate.embedding_store import EmbeddingStore, find_store
from contrastive.evaluate.embeddings import EmbeddingSet, check_text_tower, embed_images, embed_texts
from contrastive.evaluate.evaluated_model import EvaluatedModel
from contrastive.evaluate.search import (
    Section,
    Shot,
    index_library,
    nearest,
    nearest_by_index,
    picture,
    said_of,
    write_gallery,
)
from contrastive.interop.loading import results_folder
from contrastive.log import say, warn
from contrastive.option_types import Positive

PAGE = "search.html"


@dataclass(frozen=True, kw_only=True)
class SearchOptions(LoadingOptions):
    """What to look for, and where."""

    model: Annotated[Positional[Path], arg(metavar="MODEL")]
    """Folder of a run, checkpoint or model, or hf-hub:ORG/NAME."""
    images: Annotated[Positional[str], arg(metavar="IMAGES")]
    """Images, data, or a folder of embeddings."""
    queries: Annotated[Positional[tuple[str, ...]], arg(metavar="QUERY")]
    """Texts and image files."""
    top: Positive[int] = 20
    """Show the N nearest images to each query."""
    approximate: bool = False
    """Search an index of faiss or usearch, made once and kept, not all images."""
    json: bool = False
    """Print an object a line."""
    out: Annotated[Path | None, arg(metavar="FILE.html")] = None
    """The page; none: MODEL/search.html, with --json no page."""
    limit: Positive[int | None] = None
    """Search a fixed random subset of N images."""
    cache: Annotated[Path | None, arg(metavar="DIR")] = None
    """Keep embeddings there; none: MODEL/embeddings."""

    def __post_init__(self):
        super().__post_init__()
        if not self.queries:
            raise UserError('say what to look for: a text, as "a dog in snow", or an image file')


@dataclass(frozen=True)
class Query:
    said: str
    features: torch.Tensor
    """(E,), of unit length."""
    image: np.ndarray | None
    """uint8 (H, W, 3)."""


@dataclass(frozen=True)
class Hit:
    """A row of what is printed."""

    query: str
    rank: int
    score: float
    key: str
    text: str
    """A caption, else the class; empty where neither is known."""
    index: int
    """Place in the data."""


def search(options: SearchOptions) -> None:
    library = index_library() if options.approximate else None
    device = chosen_device(options.device)
    store = find_store(Path(options.images).expanduser())
    source = open_images([options.images]) if store is None else _data_of(store)
    shown = open_images(pictures) if (pictures := [query for query in options.queries if is_image(query)]) else None
    bundle = contrastive.load(options.model, device=device)
    if len(pictures) < len(options.queries):
        check_text_tower(bundle, "a text as the query")
    cache = options.cache or results_folder(options.model) / "embeddings"
    sources = {} if source is None else {options.images: source}
    loading = {"sources": sources, "limit": options.limit, **options.loading()}
    model = EvaluatedModel(str(options.model), bundle, cache, device=device, **loading)
    if store is None:
        announce(source)
        store = model.embed(options.images)
    found = model.embeddings(options.images)
    queries = read_queries(options.queries, shown, bundle, device)
    features = torch.stack([query.features for query in queries])
    if library is None:
        say(f"{len(found.index):,} images of {found.name}: exact search")
        scores, rows = nearest(features, found.features, options.top, device=device)
    else:
        say(f"{len(found.index):,} images of {found.name}: approximate search through {library}")
        file = cache / f"{store.key[:16]}-{len(found.index)}.{library}"
        scores, rows = nearest_by_index(features, found.features, options.top, library=library, file=file)
    pairs = [zip(*own, strict=True) for own in zip(scores.tolist(), rows.tolist(), strict=True)]
    hits = [
        [_hit(query.said, rank, score, row, found, source) for rank, (score, row) in enumerate(own, 1) if score > -1.5]
        for query, own in zip(queries, pairs, strict=True)
    ]
    report(options, queries, hits, found, source)


def _data_of(store: EmbeddingStore) -> Source | None:
    """The data that a store is of, where they are still at hand as they were: for the pictures, and what is in them."""
    said = store.config["data"]
    try:
        source = open_source(said["name"])
    except UserError:
        source = None
    if source is None or source.stored.fingerprint != said["fingerprint"]:
        warn(f"{said['name']} is not at hand as it was embedded: neither pictures nor captions can be shown")
        return None
    return source


def read_queries(asked: tuple[str, ...], shown: Source | None, bundle, device) -> list[Query]:
    """Embed the queries in their order. shown: those that are images.

    Raises:
        UserError: an image that cannot be read.
    """
    texts = [query for query in asked if not is_image(query)]
    features = iter(embed_texts(bundle.model, bundle.tokenizer, texts, device=device) if texts else ())
    images = iter(())
    if shown is not None:
        embedded = embed_images(bundle.model, shown, bundle.preprocess, device=device)
        for reason, key in embedded.bad:
            raise UserError(f"{key}: the image cannot be read ({reason})")
        images = iter([(own, picture(shown, place)) for place, own in enumerate(embedded.features)])
    return [Query(said, *next(images)) if is_image(said) else Query(said, next(features), None) for said in asked]


def _hit(query: str, rank: int, score: float, row: int, found: EmbeddingSet, source: Source | None) -> Hit:
    index, label = int(found.index[row]), int(found.labels[row])
    text = found.class_names[label] if found.class_names and label >= 0 else ""
    text = text if source is None else said_of(source, index)
    return Hit(query, rank, round(score, 4), found.keys[row], text, index)


def report(options: SearchOptions, queries: list[Query], hits: list[list[Hit]], found, source: Source | None) -> None:
    """Print what was found, and write the page."""
    for query, own in zip(queries, hits, strict=True):
        if options.json:
            for hit in own:
                print_json(vars(hit))
        else:
            _print(query, own)
    page = options.out or (None if options.json else results_folder(options.model) / PAGE)
    if page is None:
        return
    sections = [_section(query, own, source) for query, own in zip(queries, hits, strict=True)]
    page.parent.mkdir(parents=True, exist_ok=True)
    write_gallery(page, f"Search: {found.name}", f"{len(found.index):,} images · {options.model}", sections)
    say(f"wrote {page}")


def _print(query: Query, hits: list[Hit]) -> None:
    table = Table(title=Text(query.said, "table.title"), box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("rank", "score", "image", "caption or class"):
        table.add_column(name, justify="right" if name in ("rank", "score") else "left", overflow="fold")
    for hit in hits:
        table.add_row(str(hit.rank), f"{hit.score:.3f}", Text(hit.key), Text(hit.text))
    Console().print(table)


def _section(query: Query, hits: list[Hit], source: Source | None) -> Section:
    shots = [
        Shot((picture(source, hit.index),) if source else (), f"{hit.rank}.  {hit.score:.3f}", hit.text, hit.key)
        for hit in hits
    ]
    return Section(query.said, "", shots, query.image)


def main(arguments: list[str]) -> None:
    search(parse(SearchOptions, arguments, prog="search", description=__doc__))
