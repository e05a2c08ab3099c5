"""Pictures of what a model sees: attention, patches against texts, position embeddings, filters, embeddings.

    contrastive visualize runs/mine photo.jpg --text "a red circle" "a blue star"
    contrastive visualize runs/mine scenes:test --limit 8

MODEL is a run folder, a checkpoint folder or a model folder. IMAGE is an image file, a folder of images, or data
as in training (scenes:test, shards, a table), whose captions or class names are then the texts. Writes PNG files
and index.html, which holds them all.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

import contrastive
from contrastive.command_line import CheckedOptions, chosen_device
from contrastive.config import parse
from contrastive.errors import UserError
from contrastive.log import bar, say
from contrastive.option_types import NotNegative, Positive
from contrastive.visualize.drawing import shortened
from contrastive.visualize.pictured_model import MAX_SHOWN, PicturedModel, read_inputs
from contrastive.visualize.pictures import PICTURES, Picture, claim, make_picture, write_page

TITLE_CHARACTERS = 30  # of the model's name, in the pictures' titles


@dataclass(frozen=True, kw_only=True)
class VisualizeOptions(CheckedOptions):
    """What to draw of which model."""

    model: Annotated[Positional[Path], arg(metavar="MODEL")]
    """Folder of a run, checkpoint or model, or hf-hub:ORG/NAME."""
    images: Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGE ...")]
    """Image files, folders of images, or data."""
    text: tuple[str, ...] = ()
    """Compare patches and images with these; none: the texts of the data."""
    out: Annotated[Path | None, arg(metavar="DIR")] = None
    """A folder that is new, empty, or of an earlier call; none: pictures/ and a name after MODEL."""
    layer: int | None = None
    """Block whose attention is shown, from 0, or from the end as -1; none: what the embedding is read from."""
    query: Annotated[NotNegative[tuple[int, int] | None], arg(metavar="ROW COLUMN")] = None
    """Patch whose attention is shown, from 0; none: the middle."""
    limit: Positive[int] = 12
    """Images of each folder or data set, spread evenly over it."""
    device: Literal["cpu", "cuda"] | None = None
    """What to compute on; none: cuda where there is one."""

    def __post_init__(self):
        super().__post_init__()
        if not self.images:
            raise UserError("which images? contrastive visualize MODEL photo.jpg ..., or data such as scenes:test")


def visualize(options: VisualizeOptions) -> None:
    out = options.out or Path("pictures", re.sub(r"\W+", "-", str(options.model)).strip("-") or "model")
    claim(out)
    bundle = contrastive.load(options.model, device=chosen_device(options.device))
    bundle.check_image_tower("there is nothing to see")
    tokenizer = bundle.tokenizer
    if options.text:
        bundle.check_text_tower("leave out --text")
        tokenizer(list(options.text))  # one that the folder lacks says so now, not after the first pictures
    pictured = PicturedModel(
        name=shortened([str(options.model)], TITLE_CHARACTERS)[0],
        model=bundle.model,
        preprocess=bundle.preprocess,
        tokenizer=tokenizer,
        inputs=read_inputs(options.images, bundle.preprocess, limit=options.limit, texts=list(options.text) or None),
        layer=options.layer,
        query=options.query,
    )
    made = [make_picture(name, pictured) for name in bar(PICTURES, "drawing")]
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
    visualize(parse(VisualizeOptions, arguments, prog="visualize", description=__doc__))
