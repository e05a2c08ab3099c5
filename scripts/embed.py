"""Write the embeddings of images and captions to files, as Parquet or npy shards.

    python scripts/embed.py RUN DATA OUT
    accelerate launch scripts/embed.py RUN 'cc3m/{00000..00331}.tar' OUT --dtype float16 --precision bf16
    python scripts/embed.py TEACHER DATA OUT --views 10 --augment STUDENT.yaml --dtype float16

RUN is a run folder, a checkpoint folder or a model folder. An interrupted command goes on when it is given again.
OUT can stand for DATA in scripts/evaluate.py; it is refused for any other model. Captions are embedded where the
data has some and the model has a text tower.

With --views the model is a teacher: OUT has its embeddings of K random views of each image, and of all captions, for
--objectives.distill.teacher OUT, which draws the same views again.
"""

import argparse
from collections import Counter
from pathlib import Path

import contrastive
from contrastive.command_line import Parser, at_least
from contrastive.config import flatten, from_dict
from contrastive.data.augment import AugmentConfig
from contrastive.data.sources import announce, open_source
from contrastive.data.sources.columns import check_columns
from contrastive.data.stored_views import StoredViews, Views
from contrastive.distributed.launching import prepare_process
from contrastive.distributed.runtime import joined_ranks
from contrastive.errors import UserError
from contrastive.evaluate.embedding_store import SAMPLES_PER_SHARD, StoreOptions, claim_store, store_config
from contrastive.evaluate.evaluated_model import check_texts, fill_store, has_captions, model_identity
from contrastive.evaluate.view_embeddings import embed_views
from contrastive.files import read_yaml
from contrastive.log import is_main_process, run_script, say, warn

SHOWN_KEYS = 3


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser("embed.py", __doc__)
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="folder of a run, checkpoint or model, or hf-hub:ORG/NAME"
    )
    parser.add_argument("data", metavar="DATA", help="images: shards, a table, a folder, hf:NAME, scenes:test, ...")
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that is new, empty, or begun by this command")
    parser.add_argument("--only", choices=("images", "texts"), help="default: both, where there are both")
    parser.add_argument(
        "--space",
        choices=("projected", "pooled"),
        default="projected",
        help="image features after the projection, of unit length (default), or before it, as they come",
    )
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="as stored")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="as computed")
    parser.add_argument("--files", choices=("parquet", "npy"), default="parquet", help="where the embeddings lie")
    number = {"metavar": "N"}
    size = f"samples of each file (default {SAMPLES_PER_SHARD})"
    parser.add_argument("--samples-per-shard", type=at_least(1), default=SAMPLES_PER_SHARD, **number, help=size)
    parser.add_argument("--limit", type=at_least(1), **number, help="embed a fixed random subset of N samples")
    parser.add_argument("--views", type=at_least(1), metavar="K", help="embed K random views of each image instead")
    file = "a run's configuration whose data.augment the views are drawn by (default: data.augment's own defaults)"
    parser.add_argument("--augment", type=Path, metavar="FILE.yaml", help=file)
    parser.add_argument("--image-column", metavar="NAME", help="of a table, where it has an unusual name")
    parser.add_argument("--caption-column", metavar="NAME", help="of a table, where it has an unusual name")
    parser.add_loading()
    options = parser.parse_args(arguments)
    if options.views is None and options.augment:
        raise UserError("--augment says how views are drawn: say how many of each image with --views K")
    for name in ("only", "space", "files", "limit") if options.views else ():
        if getattr(options, name) != parser.get_default(name):
            raise UserError(f"--views goes with all images, their captions and projected features: leave out --{name}")
    return options


def embed(options: argparse.Namespace) -> None:
    layout = {name: getattr(options, name) for name in StoreOptions.__dataclass_fields__}
    columns = {"image_column": options.image_column, "caption_column": options.caption_column}
    source = open_source(options.data, **columns)
    check_columns([source], columns)
    with joined_ranks(options.device) as device:
        bundle = contrastive.load(options.run, device=device)
        loading = {"batch_size": options.batch_size, "num_workers": options.workers, "progress": True}
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
    embed(parse(arguments))


if __name__ == "__main__":
    run_script("embed.py", main)
