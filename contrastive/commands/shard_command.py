"""Write any data source as WebDataset shards: OUTPUT/00000.tar, ..., classes.json and report.json.

    contrastive shard pairs.csv /data/pairs-shards --short-side 256
    contrastive shard 'downloaded/{00000..00331}.tar' /data/cc3m

Shards load in our training, in open_clip and in the webdataset library. An interrupted command goes on when it is
given again. Samples that cannot be used are left out, and counted by reason in report.json.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from contrastive.config import parse
from contrastive.data.shards.shard_writing import SAMPLES_PER_SHARD, PackOptions, write_shards
from contrastive.data.sources import announce, open_source
from contrastive.data.sources.columns import check_columns


@dataclass(frozen=True)
class ShardConfig:
    """What to write, and how."""

    spec: Annotated[Positional[str], arg(metavar="SPEC")]
    """The samples: shards, a table, an image folder, a folder saved by datasets, hf:NAME, ..."""
    output: Annotated[Positional[str], arg(metavar="OUTPUT_FOLDER")]
    """A folder that is new, empty, or begun by the same command."""
    samples_per_shard: int = SAMPLES_PER_SHARD
    """Samples of the source in each shard."""
    short_side: int | None = None
    """Scale images down to this short side in pixels, as JPEG; smaller ones keep their bytes; none: all do."""
    quality: int = 90
    """Quality of those JPEGs, 1 to 100."""
    workers: int | None = None
    """Processes; none: one a core."""
    image_column: str | None = None
    """Column of a table that holds the image or its path; none: found by its usual names."""
    caption_column: str | None = None
    """Column (field of KEY.json, suffix as txt) of the captions; none: found by its usual names."""


def main(args: list[str]) -> None:
    config = parse(ShardConfig, args, prog="shard", description=__doc__)
    options = PackOptions(config.short_side, config.quality)
    columns = {"image_column": config.image_column, "caption_column": config.caption_column}
    source = open_source(config.spec, **columns)
    check_columns([source], columns)
    announce(source)
    write_shards(
        source,
        Path(config.output),
        options,
        samples_per_shard=config.samples_per_shard,
        workers=config.workers,
        asked=columns,
    )
