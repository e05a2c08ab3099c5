"""Pictures of what a model sees: attention, patches against texts, position embeddings, filters, embeddings.

    python scripts/visualize.py runs/mine photo.jpg another.jpg --text "a red circle" --text "a blue star"
    python scripts/visualize.py runs/mine scenes:test --limit 8

MODEL is a run folder, a checkpoint folder or a model folder. IMAGE is an image file, a folder of images, or data
as in training (scenes:test, shards, a table), whose captions or class names are then the texts. Writes PNG files
and index.html, which holds them all.
"""

import argparse
import re
from pathlib import Path

from rich.progress import track

import contrastive
from contrastive.command_line import Parser, at_least, chosen_device
from contrastive.log import console, run_script, say
from contrastive.visualize.drawing import shortened
from contrastive.visualize.pictured_model import MAX_SHOWN, PicturedModel, read_inputs
from contrastive.visualize.pictures import PICTURES, Picture, make_picture
from contrastive.visualize.pictures_page import claim, write_page

TITLE_CHARACTERS = 30  # of the model's name, in the pictures' titles


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser("visualize.py", __doc__)
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="folder of a run, checkpoint or model, or hf-hub:ORG/NAME"
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders of images, or data")
    text = "compare patches and images with it; may be given several times (default: the texts of the data)"
    parser.add_argument("--text", action="append", metavar="TEXT", help=text)
    out = "a folder that is new, empty, or of an earlier call (default: pictures/ and a name after MODEL)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=out)
    layer = "block whose attention is shown, from 0, or from the end as -1 (default: what the embedding is read from)"
    parser.add_argument("--layer", type=int, metavar="N", help=layer)
    query = "patch whose attention is shown, from 0 (default: the middle)"
    parser.add_argument("--query", type=at_least(0), nargs=2, metavar=("ROW", "COLUMN"), help=query)
    limit = "images of each folder or data set, spread evenly over it (default 12)"
    parser.add_argument("--limit", type=at_least(1), default=12, metavar="N", help=limit)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    return parser.parse_args(arguments)


def visualize(options: argparse.Namespace) -> None:
    out = options.out or Path("pictures", re.sub(r"\W+", "-", str(options.model)).strip("-") or "model")
    claim(out)
    bundle = contrastive.load(options.model, device=chosen_device(options.device))
    bundle.check_image_tower("there is nothing to see")
    tokenizer = bundle.tokenizer
    if options.text:
        bundle.check_text_tower("leave out --text")
        tokenizer(options.text)  # one that the folder lacks says so now, not after the first pictures
    pictured = PicturedModel(
        name=shortened([str(options.model)], TITLE_CHARACTERS)[0],
        model=bundle.model,
        preprocess=bundle.preprocess,
        tokenizer=tokenizer,
        inputs=read_inputs(options.images, bundle.preprocess, limit=options.limit, texts=options.text),
        layer=options.layer,
        query=options.query and tuple(options.query),
    )
    hidden = not console.is_terminal
    names = track(PICTURES, "drawing", console=console, disable=hidden, transient=True)
    made = [make_picture(name, pictured) for name in names]
    pictures = [one for one in made if isinstance(one, Picture)]
    left_out = [one for one in made if not isinstance(one, Picture)]
    for one in left_out:
        say(f"left out: {one.title.lower()}: {one.reason}")
    number = len(pictured.inputs.images)
    remark = f"{number} image{'s' * (number > 1)} from {', '.join(options.images)}, as the model sees them."
    if number > MAX_SHOWN:
        remark += f" Patch by patch, the first {MAX_SHOWN}."
    page = write_page(out, str(options.model), remark, pictures, left_out)
    say(f"{len(pictures)} pictures; look at {page}")


def main(arguments: list[str]) -> None:
    visualize(parse(arguments))


if __name__ == "__main__":
    run_script("visualize.py", main)
