"""Score a trained model on labelled images without training on them.

    python scripts/zero_shot.py RUN --data scenes:test

RUN is a run folder, a checkpoint folder or a model folder. Prints a table; writes zero_shot.json and
confusion.png. A second evaluation of the same data replaces the first.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

import contrastive
from contrastive.data.prompts import load_templates
from contrastive.data.sources import open_source
from contrastive.errors import UserError, did_you_mean
from contrastive.evaluate.zero_shot import zero_shot
from contrastive.evaluate.zero_shot_output import ZeroShotOutput, print_result, read_class_names
from contrastive.log import run_script


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def error(self, message: str):
        if message.startswith("unrecognized arguments: --"):
            flag = message.split()[2].split("=")[0]
            message += "." + did_you_mean(flag, self._option_string_actions)
        raise UserError(message)


def at_least(minimum: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number from {minimum} up, not '{text}'")
        return int(text)

    return whole_number


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="zero_shot.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, checkpoint or model")
    parser.add_argument("--data", required=True, metavar="SPEC", help="labelled images, such as scenes:test")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="class names: one a line, or JSON")
    parser.add_argument("--templates", metavar="NAME_OR_FILE", help="prompts (default: fit the data)")
    number = {"metavar": "N"}
    parser.add_argument("--batch-size", type=at_least(1), default=256, **number, help="images at once")
    parser.add_argument("--workers", type=at_least(0), default=0, **number, help="processes that read images")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/zero_shot/DATA")
    parser.add_argument("--limit", type=at_least(1), **number, help="score a fixed random subset of N images")
    return parser.parse_args(arguments)


def evaluate(options: argparse.Namespace) -> None:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    class_names = read_class_names(options.classes) if options.classes else None
    templates = load_templates(options.templates) if options.templates else None
    bundle = contrastive.load(options.run, device=device)
    source = open_source(options.data)
    output = ZeroShotOutput.claim(options.run, options.data, options.out)
    result = zero_shot(
        bundle,
        source,
        device=device,
        class_names=class_names,
        templates=templates,
        batch_size=options.batch_size,
        num_workers=options.workers,
        limit=options.limit,
        progress=True,
    )
    print_result(result, options.run, options.data)
    output.write(result)


def main(arguments: list[str]) -> None:
    evaluate(parse(arguments))


if __name__ == "__main__":
    run_script("zero_shot.py", main)
