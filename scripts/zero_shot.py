"""Score a trained model on labelled images without training on them.

    python scripts/zero_shot.py RUN --data scenes:test

RUN is a run folder, a checkpoint folder or a model folder. Prints a table; writes zero_shot.json and
confusion.png. A second evaluation of the same data replaces the first.
"""

import argparse
from pathlib import Path

import contrastive
from contrastive.command_line import Parser, at_least, chosen_device
from contrastive.data.class_joining import warn_of_ids
from contrastive.data.prompts import load_templates
from contrastive.data.sources import announce, open_source
from contrastive.evaluate.classification import names_to_use, zero_shot
from contrastive.evaluate.zero_shot_output import claim_zero_shot, print_result, write_zero_shot
from contrastive.interop.hub import is_hub_name, results_folder
from contrastive.log import run_script
from contrastive.results import folder_name


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser("zero_shot.py", __doc__)
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="folder of a run, checkpoint or model, or hf-hub:ORG/NAME"
    )
    parser.add_argument("--data", required=True, metavar="SPEC", help="labelled images, such as scenes:test")
    parser.add_argument(
        "--classes", metavar="NAME_OR_FILE", help="class names: a set (cifar10, imagenet, ...), one a line, or JSON"
    )
    parser.add_argument(
        "--templates",
        metavar="NAME_OR_FILE",
        help="prompts: a set (imagenet, photo, ...), or one a line (default: fit)",
    )
    parser.add_loading()
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/zero_shot/DATA")
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="score a fixed random subset of N images")
    return parser.parse_args(arguments)


def evaluate(options: argparse.Namespace) -> None:
    device = chosen_device(options.device)
    templates = load_templates(options.templates) if options.templates else None
    source = open_source(options.data, classes=options.classes)
    bundle = contrastive.load(options.run, device=device)
    out = options.out
    if out is None and is_hub_name(options.run):
        out = results_folder(options.run) / "zero_shot" / folder_name(options.data)
    out = claim_zero_shot(options.run, options.data, out)
    names_to_use(source)
    announce(source)
    warn_of_ids(source)
    result = zero_shot(
        bundle,
        source,
        device=device,
        templates=templates,
        batch_size=options.batch_size,
        num_workers=options.workers,
        limit=options.limit,
        progress=True,
    )
    print_result(result, options.run, options.data)
    write_zero_shot(out, options.run, options.data, result)


def main(arguments: list[str]) -> None:
    evaluate(parse(arguments))


if __name__ == "__main__":
    run_script("zero_shot.py", main)
