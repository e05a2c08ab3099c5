"""Write the embeddings of images and captions to files, as Parquet or npy shards.

    contrastive embed runs/mine 'cc3m/{00000..00331}.tar' embeddings/cc3m
    accelerate launch -m contrastive embed MODEL DATA OUT --dtype float16
    contrastive embed TEACHER DATA OUT --views 10 --augment STUDENT.yaml

MODEL is a run folder, a checkpoint folder or a model folder. An interrupted command goes on when it is given again.
OUT can stand for DATA in `contrastive evaluate`; it is refused for any other model. Captions are embedded where the
data has some and the model has a text tower.

With --views the model is a teacher: OUT has its embeddings of K random views of each image, and of all captions, for
--objectives.distill.teacher OUT, which draws the same views again.
"""

from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

import contrastive
from contrastive.command_line import LoadingOptions
from contrastive.config import flatten, from_dict, parse
from contrastive.data.augment import AugmentConfig
from contrastive.data.sources import announce, open_source
from contrastive.data.sources.columns import check_columns
from contrastive.data.stored_views import StoredViews, Views
from contrastive.distributed.launching import prepare_process
from contrastive.distributed.runtime import joined_ranks
from contrastive.errors import UserError
from contrastive.evaluate.embedding_store import SAMPLES_PER_SHARD, StoreOptions, claim_store, store_config
from contrastive.evaluate.embedding_writing import (
    check_texts,
    embed_views,
    fill_store,
    has_captions,
    model_identity,
    write_clip_retrieval,
)
from contrastive.files import read_yaml
from contrastive.log import is_main_process, say, warn
from contrastive.option_types import Positive

SHOWN_KEYS = 3


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(LoadingOptions):
    """What to embed, and how it is stored."""

    model: Annotated[Positional[Path], arg(metavar="MODEL")]
    """Folder of a run, checkpoint or model, or hf-hub:ORG/NAME."""
    data: Annotated[Positional[str], arg(metavar="DATA")]
    """Images: shards, a table, a folder, hf:NAME, scenes:test, ..."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """A folder that is new, empty, or begun by this command."""
    only: Literal["images", "texts"] | None = None
    """Embed one kind; none: both, where there are both."""
    space: Literal["projected", "pooled"] = "projected"
    """Image features after the projection, of unit length, or before it, as they come."""
    dtype: Literal["float32", "float16"] = "float32"
    """As stored."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """As computed."""
    files: Literal["parquet", "npy", "clip-retrieval"] = "parquet"
    """Where the embeddings lie; clip-retrieval: in its layout too, beside the Parquet ones."""
    samples_per_shard: Positive[int] = SAMPLES_PER_SHARD
    """Samples of each file."""
    limit: Positive[int | None] = None
    """Embed a fixed random subset of N samples."""
    views: Positive[int | None] = None
    """Embed N random views of each image instead."""
    augment: Annotated[Path | None, arg(metavar="FILE.yaml")] = None
    """A run's configuration whose data.augment the views are drawn by; none: data.augment's own defaults."""
    image_column: str | None = None
    """Of a table, where it has an unusual name."""
    caption_column: str | None = None
    """Of a table, where it has an unusual name."""

    def __post_init__(self):
        super().__post_init__()
        if self.views is None and self.augment:
            raise UserError("--augment says how views are drawn: say how many of each image with --views N")
        if self.files == "clip-retrieval" and self.space == "pooled":
            raise UserError("clip-retrieval searches projected features: leave out --space, or --files clip-retrieval")
        usual = {field.name: field.default for field in fields(self)}
        for name in ("only", "space", "files", "limit") if self.views else ():
            if getattr(self, name) != usual[name]:
                raise UserError(
                    f"--views goes with all images, their captions and projected features: leave out --{name}"
                )


def embed(options: EmbedOptions) -> None:
    layout = {name: getattr(options, name) for name in StoreOptions.__dataclass_fields__}
    for_clip_retrieval = options.files == "clip-retrieval"
    if for_clip_retrieval:
        layout["files"] = "parquet"
    columns = {"image_column": options.image_column, "caption_column": options.caption_column}
    source = open_source(options.data, **columns)
    check_columns([source], columns)
    with joined_ranks(options.device) as device:
        bundle = contrastive.load(options.model, device=device)
        loading = options.loading()
        if options.views:
            kinds = {name: layout[name] for name in ("dtype", "precision", "samples_per_shard")}
            views = Views(options.views, augment_options(options.augment))
            announce(source)
            store, left_out = embed_views(options.out, bundle, source, views, device=device, **loading, **kinds)
            if is_main_process():
                report_views(store, left_out)
            return
        if options.only:
            parts = (options.only,)
        elif bundle.tokenizer is not None and has_captions(source):
            parts = ("images", "texts")
        else:
            parts = ("images",)
        if "texts" in parts:
            check_texts(bundle, source)
        store = claim_store(options.out, store_config(model_identity(bundle), source, StoreOptions(**layout)))
        announce(source)
        fill_store(store, bundle, source, parts, device=device, **loading)
    if is_main_process():
        report(store, parts)
        if for_clip_retrieval:
            say(f"{write_clip_retrieval(store, parts):,} rows in the layout of clip-retrieval too")


def augment_options(file: Path | None) -> AugmentConfig:
    """What a run's configuration says of data.augment."""
    content = flatten((read_yaml(file, "the configuration") if file else None) or {})
    prefix = "data.augment."
    told = {name.removeprefix(prefix): value for name, value in content.items() if name.startswith(prefix)}
    return from_dict(AugmentConfig, told, f"{file}: data.augment")


def report_views(store: StoredViews, left_out: Counter[str]) -> None:
    for reason, count in sorted(left_out.items()):
        warn(f"{count:,} images or captions left out for {reason}")
    data, views = store.config["data"], store.views.count
    say(f"{views} views of each of {data['num_samples']:,} images, and their captions, embedded in {store.folder}")


def report(store, parts: tuple[str, ...]) -> None:
    for part in parts:
        done = store.config[part]
        for reason, keys in sorted(done["left_out"].items()):
            shown = ", ".join(keys[:SHOWN_KEYS]) + (", ..." if len(keys) > SHOWN_KEYS else "")
            warn(f"{len(keys):,} {part} left out for {reason}: {shown}")
        say(f"{done['embeddings']:,} {part} embedded in {store.folder}")
    if not any(store.config[part]["embeddings"] for part in parts):
        raise UserError(f"{store.folder}: nothing could be embedded")


def main(arguments: list[str]) -> None:
    prepare_process()
    embed(parse(EmbedOptions, arguments, prog="embed", description=__doc__))
