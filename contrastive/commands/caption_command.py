"""Write captions of images with a model that was trained with a caption decoder.

    contrastive caption runs/mine photo.jpg folder/ --beam 4
    contrastive caption runs/mine scenes:test --sample --top-p 0.9 --json

MODEL is a run folder, a checkpoint folder, or a final model whose run kept its decoder (--objectives.caption.keep).
IMAGE is an image file, a folder of images, or data as in training. Prints a line for each image, its name and its
caption, as they come; with --json an object: image, caption, log_likelihood (in nats). Without --beam or --sample each
token is the likeliest.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from contrastive.command_line import LoadingOptions, chosen_device, print_json
from contrastive.config import parse
from contrastive.errors import UserError
from contrastive.evaluate.captioning import GeneratedCaption, caption_images, images_of
from contrastive.evaluate.embeddings import pick_indices
from contrastive.log import warn
from contrastive.models.generate import GenerationConfig
from contrastive.objectives.captioner import load_captioner
from contrastive.option_types import NotNegative, Positive

SAMPLING = ("temperature", "top_k", "top_p", "seed", "best_of")


@dataclass(frozen=True, kw_only=True)
class WriteCaptionsOptions(LoadingOptions):
    """Of what, and how its captions are chosen."""

    model: Annotated[Positional[Path], arg(metavar="MODEL")]
    """Folder of a run, checkpoint or model."""
    images: Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGE ...")]
    """Image files, folders of images, or data."""
    beam: Positive[int | None] = None
    """Beam search that follows N captions."""
    sample: bool = False
    """Draw the tokens at random."""
    length_penalty: float | None = None
    """Of --beam: 0 favours short captions; none: 1."""
    temperature: float | None = None
    """Of --sample: below 1 for likelier tokens; none: 1."""
    top_k: Positive[int | None] = None
    """Of --sample: draw from the N likeliest tokens."""
    top_p: float | None = None
    """Of --sample: draw from the likeliest tokens of this probability."""
    seed: NotNegative[int | None] = None
    """Of --sample; none: 0."""
    best_of: Positive[int | None] = None
    """Of --sample: of N, the nearest to the image."""
    limit: Positive[int | None] = None
    """Of each data set, a fixed random subset of N."""
    json: bool = False
    """Print an object a line."""

    def __post_init__(self):
        super().__post_init__()
        if not self.images:
            raise UserError("which images? contrastive caption MODEL photo.jpg ...")
        if self.sample and self.beam:
            raise UserError("--beam and --sample are two ways to choose a caption; give one of them")


def chosen_way(options: WriteCaptionsOptions) -> GenerationConfig:
    """How captions are chosen; UserError for a flag that the others leave without effect."""
    own = {"sample": SAMPLING, "beam": ("length_penalty",)}
    method = "sample" if options.sample else "greedy" if options.beam is None else "beam"
    given = {name: getattr(options, name) for names in own.values() for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    for kind, names in own.items():
        for name in names:
            if name in given and kind != method:
                raise UserError(f"--{name.replace('_', '-')} has no effect without --{kind}; leave it out")
    how = GenerationConfig(method, **({} if options.beam is None else {"num_beams": options.beam}), **given)
    how.check()
    return how


def caption(options: WriteCaptionsOptions) -> None:
    how, device = chosen_way(options), chosen_device(options.device)
    sources = images_of(options.images)
    captioner = load_captioner(options.model, device)
    loading = options.loading()

    def tell(one: GeneratedCaption) -> None:
        told = {"image": one.key, "caption": one.text, "log_likelihood": round(one.log_likelihood, 4)}
        print_json(told) if options.json else print(f"{one.key}\t{one.text}", flush=True)

    number, bad = 0, Counter()
    for source in sources:
        indices = pick_indices(len(source), options.limit)
        written, faults = caption_images(captioner, source, how, indices=indices, device=device, tell=tell, **loading)
        number, bad = number + len(written), bad + faults
    if bad:
        warn("not captioned: " + ", ".join(f"{count:,} {reason}" for reason, count in sorted(bad.items())))
    if not number:
        raise UserError("none of the images can be read")


def main(arguments: list[str]) -> None:
    caption(parse(WriteCaptionsOptions, arguments, prog="caption", description=__doc__))
