"""Write captions of images with a model that was trained with a caption decoder.

    python scripts/caption.py runs/mine photo.jpg folder/ --beam 4
    python scripts/caption.py runs/mine scenes:test --limit 20 --sample --top-p 0.9 --seed 1 --json > captions.jsonl

MODEL is a run folder, a checkpoint folder, or a final model whose run kept its decoder (--objectives.caption.keep).
IMAGE is an image file, a folder of images, or data as in training. Prints a line for each image, its name and its
caption, as they come; with --json an object: image, caption, log_likelihood (in nats). Without --beam or --sample each
token is the likeliest.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from contrastive.command_line import Parser, at_least, chosen_device
from contrastive.errors import UserError
from contrastive.evaluate.captioning import GeneratedCaption, caption_images, images_of
from contrastive.evaluate.embeddings import pick_indices
from contrastive.log import run_script, warn
from contrastive.models.generate import GenerationConfig
from contrastive.objectives.captioner import load_captioner

SAMPLING = ("temperature", "top_k", "top_p", "seed", "best_of")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser("caption.py", __doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a run, checkpoint or model")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders of images, or data")
    one_way = parser.add_mutually_exclusive_group()
    one_way.add_argument("--beam", type=at_least(1), metavar="N", help="beam search that follows N captions")
    one_way.add_argument("--sample", action="store_true", help="draw the tokens at random")
    number = {"type": float, "metavar": "X"}
    parser.add_argument("--length-penalty", **number, help="of --beam: 0 favours short captions (default 1)")
    parser.add_argument("--temperature", **number, help="of --sample: below 1 for likelier tokens (default 1)")
    parser.add_argument("--top-k", type=at_least(1), metavar="K", help="of --sample: draw from the K likeliest tokens")
    parser.add_argument("--top-p", **number, help="of --sample: draw from the likeliest tokens of this probability")
    parser.add_argument("--seed", type=at_least(0), metavar="N", help="of --sample (default 0)")
    parser.add_argument("--best-of", type=at_least(1), metavar="N", help="of --sample: of N, the nearest to the image")
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="of each data set, a fixed random subset of N")
    parser.add_argument("--json", action="store_true", help="print an object a line")
    parser.add_loading()
    return parser.parse_args(arguments)


def chosen_way(options: argparse.Namespace) -> GenerationConfig:
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


def caption(options: argparse.Namespace) -> None:
    how, device = chosen_way(options), chosen_device(options.device)
    sources = images_of(options.images)
    captioner = load_captioner(options.model, device)
    loading = {"batch_size": options.batch_size, "num_workers": options.workers, "progress": True}

    def tell(one: GeneratedCaption) -> None:
        told = {"image": one.key, "caption": one.text, "log_likelihood": round(one.log_likelihood, 4)}
        print(json.dumps(told, ensure_ascii=False) if options.json else f"{one.key}\t{one.text}", flush=True)

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
    caption(parse(arguments))


if __name__ == "__main__":
    run_script("caption.py", main)
