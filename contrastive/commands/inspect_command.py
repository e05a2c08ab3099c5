"""Look at a data source before training on it: figures, and samples exactly as the model will see them.

    contrastive inspect 'shards/{0000..0099}.tar'
    contrastive inspect pairs.csv --samples 10000 --augment.crop_scale 0.5 1

Writes index.html, contact_sheet.png and figures.json. With the seed, the tokenizer and the options of a run on
local data of up to 4 million samples, the samples shown are among its first ones.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, arg

from contrastive.command_line import print_json
from contrastive.config import parse
from contrastive.data.augment import AugmentConfig
from contrastive.data.class_joining import check_classes
from contrastive.data.inspection import QUANTITIES, chosen_indices, doubts, facts, measure, summary
from contrastive.data.settings import CaptionOptions
from contrastive.data.sources import announce, open_source
from contrastive.data.sources.columns import check_columns
from contrastive.errors import UserError
from contrastive.log import console, say, warn
from contrastive.visualize.inspection_page import PAGE, claim, see, spark, write_inspection

SHOWN = (
    "samples shown out json image_size image_column caption_column classes templates caption_templates clean tokenizer "
    "vocab_size context_length augment.crop_scale seed"
)


@dataclass(frozen=True, kw_only=True)
class InspectConfig(CaptionOptions):
    """What to look at, and the options of training that change what the model sees."""

    RENAMED = {"output": "out"}

    spec: Annotated[Positional[str], arg(metavar="SPEC")]
    """The samples: shards, a table, an image folder, a folder saved by datasets, hf:NAME, ..."""
    samples: int | None = 1000
    """How many to read, a random subset; none: all."""
    shown: int = 36
    """How many to show."""
    out: str | None = None
    """Folder to write to; none: inspect/ and a name after SPEC."""
    json: bool = False
    """Print figures.json instead of a table."""
    image_size: int = 224
    """Side of the square that the model sees, in pixels."""
    image_column: str | None = None
    """Column of a table that holds the image or its path; none: found by its usual names."""
    classes: str | None = None
    """Names of the classes of labelled data: a set (imagenet, cifar100, ...) or a file, joined by name or number."""
    context_length: int | None = None
    """Ids of a text; none: 77 for clip, what a saved tokenizer says, else 64."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    seed: int = 0
    """Of the order and the augmentation, as train.seed; and of the subset that is measured."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("samples", "shown", "image_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}, expected 1 or more")
        if self.tokenizer != "bpe" and self.vocab_size != CaptionOptions.vocab_size:
            raise UserError(f"--vocab_size has no effect with --tokenizer {self.tokenizer}; leave it out")


def main(args: list[str]) -> None:
    config = parse(InspectConfig, args, prog="inspect", description=__doc__, shown=SHOWN)
    columns = {"image_column": config.image_column, "caption_column": config.caption_column}
    source = open_source(config.spec, classes=config.classes, prompts=config.templates, **columns)
    check_columns([source], columns)
    announce(source)
    templates = None if config.templates == "auto" else config.templates
    check_classes([source], {"classes": config.classes, "templates": templates})
    folder = Path(config.out or Path("inspect", re.sub(r"\W+", "-", config.spec).strip("-") or "data"))
    claim(folder, source.name)
    indices = chosen_indices(source, config.samples, config.seed)
    tokenizer = config.make_tokenizer(source, config.context_length)
    found = measure(source, indices, tokenizer)
    figures = summary(source, found, tokenizer)
    seen = []
    try:
        seen, figures["images_per_second"] = see(
            source,
            tokenizer,
            config.image_size,
            config.augment,
            config.seed,
            config.caption_templates,
            shown=config.shown,
            samples=len(indices),
        )
    except UserError as error:
        warn(f"{error}: there are no samples to show")
    write_inspection(folder, figures, seen, tokenizer)
    print_json(figures) if config.json else _print(figures)
    for line in doubts(source, found, tokenizer, config.image_size):
        warn(line)
    say(f"look at {folder / PAGE}")


def _print(figures: dict) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts(figures):
        table.add_row(name, Text(value))
    for name, title in QUANTITIES.items():
        if found := figures[name]:
            bounds = f"{found['min']:,} to {found['max']:,}, median {found['median']:,g}"
            table.add_row(title, f"{bounds}  {spark(found)}")
    console.print(table)
