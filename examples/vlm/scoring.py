"""Captions of held-out images: some to read, and how many name the right class."""

import re

import torch
from captioner import Captioner
from rich.markup import escape
from rich.table import Table
from torch.utils.data import default_collate

from contrastive.data.record import BadSample, Source
from contrastive.log import console, say, warn

SHOWN = 8
BATCH = 64


def names_exactly(caption: str, label: int, class_names: tuple[str, ...]) -> bool:
    """Whether all words of the label's class name, and of no other class's, are in the caption."""
    words = set(re.findall(r"\w+", caption.lower()))
    return [i for i, name in enumerate(class_names) if words >= set(name.lower().split())] == [label]


def score(model: Captioner, source: Source, images: int, device: torch.device) -> dict:
    """Caption that many images, spread over the source; print some and, where there are labels, how many are right."""
    chosen = torch.linspace(0, len(source) - 1, min(images, len(source))).round().long().tolist()
    rows, right = [], []
    for first in range(0, len(chosen), BATCH):
        records, pixels = _readable(model, source, chosen[first : first + BATCH])
        captions = model.caption(default_collate(pixels).to(device)) if pixels else []
        for record, caption in zip(records, captions, strict=True):
            rows.append((caption, record.captions[0] if record.captions else ""))
            if record.label is not None and source.class_names is not None:
                right.append(names_exactly(caption, record.label, source.class_names))
    shown = torch.randperm(len(rows))[:SHOWN].tolist()
    title = escape(f"{source.name}: {len(shown)} of {len(rows)} held-out images")
    table = Table("caption", "one that came with the image", title=title)
    for index in shown:
        table.add_row(*map(escape, rows[index]))
    console.print(table)
    result = {"data": source.name, "images": len(rows)}
    if right:
        result["named_right"] = sum(right) / len(right)
        share = 100 * result["named_right"]
        say(f"{source.name}: {share:.1f} % of {len(right)} captions name the right class and no other")
    return result


def _readable(model: Captioner, source: Source, indices: list[int]) -> tuple[list, list[torch.Tensor]]:
    """Records and their pixels; what cannot be read is named and left out."""
    records, pixels = [], []
    for index in indices:
        try:
            record = source[index]
            pixels.append(model.encoder.preprocess(record.image))
            records.append(record)
        except BadSample as error:
            warn(f"{source.name}: sample {index} is left out: {error}")
    return records, pixels
