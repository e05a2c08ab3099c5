"""Score a trained model on labelled images without training on them.

    contrastive zero-shot runs/mine --data scenes:test
    contrastive zero-shot runs/mine --data val/ --classes imagenet

MODEL is a run, checkpoint or model folder, ours or another library's. Prints a table; writes zero_shot.json and
confusion.png. A second evaluation of the same data replaces the first.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

import contrastive
from contrastive.command_line import LoadingOptions, chosen_device, print_json
from contrastive.config import parse
from contrastive.data.class_joining import warn_of_ids
from contrastive.data.prompts import load_templates
from contrastive.data.sources import announce, open_source
from contrastive.evaluate.classification import names_to_use, zero_shot
from contrastive.evaluate.zero_shot_output import claim_zero_shot, print_result, write_zero_shot
from contrastive.interop.hub import is_hub_name, results_folder
from contrastive.option_types import Positive


@dataclass(frozen=True, kw_only=True)
class ZeroShotOptions(LoadingOptions):
    """What to score, and how."""

    model: Annotated[Positional[Path], arg(metavar="MODEL")]
    """Folder of a run, checkpoint or model, or hf-hub:ORG/NAME."""
    data: Annotated[str, arg(metavar="SPEC")]
    """Labelled images, such as scenes:test."""
    classes: Annotated[str | None, arg(metavar="NAME|FILE")] = None
    """Class names: a set (cifar10, imagenet, ...), one a line, or JSON."""
    templates: Annotated[str | None, arg(metavar="NAME|FILE")] = None
    """Prompts: a set (imagenet, photo, ...), or one a line; none: those that fit."""
    out: Annotated[Path | None, arg(metavar="DIR")] = None
    """Where to write; none: MODEL/zero_shot/DATA."""
    limit: Positive[int | None] = None
    """Score a fixed random subset of N images."""
    json: bool = False
    """Print zero_shot.json instead of a table."""


def evaluate(options: ZeroShotOptions) -> None:
    device = chosen_device(options.device)
    templates = load_templates(options.templates) if options.templates else None
    source = open_source(options.data, classes=options.classes)
    bundle = contrastive.load(options.model, device=device)
    home = results_folder(options.model) if is_hub_name(options.model) else options.model
    out = claim_zero_shot(home, options.data, options.out, options.limit)
    names_to_use(source)
    announce(source)
    warn_of_ids(source)
    result = zero_shot(
        bundle,
        source,
        device=device,
        templates=templates,
        limit=options.limit,
        **options.loading(),
    )
    if not options.json:
        print_result(result, options.model, options.data)
    record = write_zero_shot(out, options.model, options.data, result)
    if options.json:
        print_json(record)


def main(arguments: list[str]) -> None:
    evaluate(parse(ZeroShotOptions, arguments, prog="zero-shot", description=__doc__))
