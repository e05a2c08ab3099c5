"""What an inspection shows: samples as the model gets them, a page, a contact sheet, the figures as JSON."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from contrastive.data.augment import AugmentConfig
from contrastive.data.inspection import QUANTITIES, Seen, facts, first_samples
from contrastive.data.loader import train_loader
from contrastive.data.order_choice import order_for
from contrastive.data.record import Source
from contrastive.data.samples import PairDataset
from contrastive.data.tokenizer import Tokenizer
from contrastive.errors import UserError
from contrastive.files import claim_folder, write_json, write_whole
from contrastive.page import PARTS, data_uri, filled, html_page
from contrastive.visualize.drawing import as_picture, mosaic

FIGURES, SHEET, PAGE = "figures.json", "contact_sheet.png", "index.html"
CAPTIONS_SHOWN = 10
SHEET_GAP = 4
_BARS = " ▁▂▃▄▅▆▇█"


def claim(folder: Path, source: str) -> None:
    """Make the folder, or take one that an inspection of the same source left.

    Raises:
        UserError: it holds anything else.
    """
    earlier = claim_folder(folder, FIGURES, "an inspection", "give another --output")
    if earlier is not None and "source" not in earlier:
        raise UserError(f"{folder / FIGURES} is not of an inspection; give another --output")
    if earlier is not None and earlier["source"] != source:
        raise UserError(f"{folder} holds the inspection of '{earlier['source']}'; give another --output")
    folder.mkdir(parents=True, exist_ok=True)


def see(
    source: Source,
    tokenizer: Tokenizer,
    image_size: int,
    augment: AugmentConfig,
    seed: int,
    caption_templates: tuple[str, ...] = ("{}",),
    *,
    shown: int,
    samples: int,
) -> tuple[list[Seen], float]:
    """Return the first `shown` samples of a training run with this seed, and images/s of the loader in one process.

    The rate is taken over about `samples` samples, after the first batch.

    Raises:
        UserError: as from training, where no sample can be used.
    """
    shown = min(shown, len(source))
    order = order_for(source, shown, seed)
    dataset = PairDataset(source, order, tokenizer, image_size, augment, caption_templates)
    steps = 1 + math.ceil(samples / shown)
    batches = iter(train_loader(dataset, num_steps=steps))
    next(batches)
    started = time.perf_counter()
    loaded = sum(len(batch["index"]) for batch in batches)
    rate = loaded / (time.perf_counter() - started)
    return first_samples(dataset, shown), rate


def write_inspection(folder: Path, figures: dict[str, Any], seen: Sequence[Seen], tokenizer: Tokenizer) -> None:
    """Write index.html, which needs no other file, contact_sheet.png and figures.json."""
    write_json(folder / FIGURES, figures)
    if seen:
        sheet = contact_sheet([sample.image for sample in seen])
        write_whole(folder / SHEET, lambda file: sheet.save(file, "PNG"))
    write_whole(folder / PAGE, _page(figures, seen, tokenizer))


def contact_sheet(images: Sequence[torch.Tensor]) -> Image.Image:
    """Return images uint8 (3, S, S), as they are, side by side in about as many columns as rows."""
    tiles, columns = as_picture(torch.stack(list(images))), math.ceil(math.sqrt(len(images)))
    return Image.fromarray(mosaic(tiles, columns, (SHEET_GAP, SHEET_GAP)))


def spark(distribution: dict[str, Any]) -> str:
    """Return a histogram as one line of characters."""
    counts = distribution["histogram"]["counts"]
    return "".join(_BARS[math.ceil(count / max(counts) * (len(_BARS) - 1))] for count in counts)


def _page(figures: dict[str, Any], seen: Sequence[Seen], tokenizer: Tokenizer) -> str:
    body = filled(
        PARTS / "inspection.html.jinja",
        facts=facts(figures),
        charts={title: figures[name] for name, title in QUANTITIES.items() if figures[name]},
        repeats=[
            found
            for what in ("captions", "images")
            for found in (figures[f"duplicate_{what}"] or {"most_repeated": ()})["most_repeated"]
        ],
        seen=seen,
        tokenizer=tokenizer,
        captions_shown=CAPTIONS_SHOWN,
        as_image=Image.fromarray,
        data_uri=data_uri,
    )
    return html_page(figures["source"], "", body, "inspection.css")
