"""What a data source holds, measured on some of its samples, and what the model will see of it."""

import copy
import hashlib
import io
import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from contrastive.data.augment import AugmentConfig
from contrastive.data.captions import MAX_CAPTION_CHARS, caption_fault
from contrastive.data.decode import FORMATS, decode
from contrastive.data.loader import train_loader
from contrastive.data.order_choice import order_for
from contrastive.data.record import BadSample, FaultCounts, Record, Source
from contrastive.data.samples import PairDataset
from contrastive.data.tokenizer import Tokenizer
from contrastive.log import bar

# What is measured of images and captions, and what it is called.
QUANTITIES = {
    "short_side": "short side of the images, pixels",
    "width": "width, pixels",
    "height": "height, pixels",
    "file_bytes": "size of the files, bytes",
    "captions_per_sample": "captions of a sample",
    "caption_characters": "length of a caption, characters",
    "caption_tokens": "length of a caption, tokens",
}
BINS = 24
DUPLICATES_SHOWN = 20
REMOTE_BLOCKS = 4  # of consecutive samples, so that few shards are fetched


@dataclass
class Measured:
    """What the inspected samples and their captions are; see `summary`."""

    lengths: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # by the names of QUANTITIES
    formats: Counter = field(default_factory=Counter)
    labels: Counter = field(default_factory=Counter)
    faults: FaultCounts = field(default_factory=FaultCounts)
    caption_keys: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # text to keys
    image_keys: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # hash to keys


@dataclass(frozen=True)
class Seen:
    """One sample as the model gets it: image uint8 (3, S, S), tokens int64 (L,); and what the source has for it."""

    image: torch.Tensor
    tokens: torch.Tensor
    key: str
    captions: tuple[str, ...]


def chosen_indices(source: Source, samples: int | None, seed: int) -> np.ndarray:
    """Return the sorted indices to inspect: a random subset; of remote data a few blocks; None: all."""
    size = len(source)
    if samples is None or samples >= size:
        return np.arange(size)
    rng = np.random.default_rng(seed)
    if source.remote:
        length = math.ceil(samples / REMOTE_BLOCKS)
        starts = rng.choice(max(1, size // length), min(REMOTE_BLOCKS, max(1, size // length)), replace=False)
        return np.sort((starts[:, None] * length + np.arange(length)).ravel())[:samples]
    return np.sort(rng.choice(size, samples, replace=False))


def measure(source: Source, indices: Sequence[int], tokenizer: Tokenizer) -> Measured:
    """Read and decode the samples at `indices` in full and return what they are."""
    # A length that no caption reaches tells how long each is before it is cut.
    uncut = copy.copy(tokenizer)
    uncut.context_length = MAX_CAPTION_CHARS * 4
    found = Measured()
    for index in bar(indices, "reading samples"):
        key = ""
        try:
            record = source[int(index)]
            key = record.key
            _measure_image(record, found)
        except BadSample as fault:
            found.faults.add(fault.reason, fault.key or key)
        else:
            _measure_captions(record, uncut, found)
    return found


def _measure_image(record: Record, found: Measured) -> None:
    pixels = decode(record.image)
    _, height, width = pixels.shape
    for name, length in (("height", height), ("width", width), ("short_side", min(height, width))):
        found.lengths[name].append(length)
    if isinstance(record.image, bytes):
        with Image.open(io.BytesIO(record.image), formats=FORMATS) as opened:
            found.formats[f"{opened.format} {opened.mode}"] += 1
        found.lengths["file_bytes"].append(len(record.image))
        content = record.image
    else:
        found.formats["pixels"] += 1
        content = pixels.contiguous().numpy().tobytes()
    found.image_keys[hashlib.blake2b(content, digest_size=16).hexdigest()].append(record.key)


def _measure_captions(record: Record, uncut: Tokenizer, found: Measured) -> None:
    if record.label is not None:
        found.labels[record.label] += 1
    found.lengths["captions_per_sample"].append(len(record.captions))
    if not record.captions:
        found.faults.add("missing_caption", record.key)
    for caption in record.captions:
        fault = caption_fault(caption)
        if fault:
            found.faults.add(fault, record.key)
            continue
        found.caption_keys[caption].append(record.key)
        found.lengths["caption_characters"].append(len(caption))
        found.lengths["caption_tokens"].append(_num_tokens(uncut(caption)[0], uncut))


def _num_tokens(row: torch.Tensor, tokenizer: Tokenizer) -> int:
    """Return how many ids a text has, special ones included."""
    places = (row == tokenizer.eos_id).nonzero()
    # The text itself may hold the end's token; where padding is that token too, the first one ends the text.
    return int(places[0 if tokenizer.pad_id == tokenizer.eos_id else -1]) + 1


def summary(source: Source, found: Measured, tokenizer: Tokenizer, inspected: int) -> dict[str, Any]:
    """Return the figures as plain values for JSON. Sizes are in pixels, upright; of text in characters and tokens."""
    lengths = found.lengths["caption_tokens"]
    long_texts = sum(length > tokenizer.context_length for length in lengths)
    result = {
        "source": source.name,
        "samples": len(source),
        "inspected": inspected,
        "readable": len(found.lengths["height"]),
        "unusable": found.faults.commonest_first(),
        "formats": dict(found.formats.most_common()),
        **{name: distribution(found.lengths[name]) for name in QUANTITIES},
        "context_length": tokenizer.context_length,
        "truncated_captions": {"count": long_texts, "share": long_texts / max(1, len(lengths))},
        # Captions made from class names repeat by design.
        "duplicate_captions": None if source.prompted else _duplicates(found.caption_keys),
        "duplicate_images": _duplicates(found.image_keys),
    }
    if source.class_names or found.labels:
        names = source.class_names or ()
        result["classes"] = {"names": len(names), "seen": len(found.labels)} | {
            "commonest": [
                [names[label] if label < len(names) else str(label), count]
                for label, count in found.labels.most_common(10)
            ]
        }
    return result


def distribution(values: Sequence[int]) -> dict[str, Any] | None:
    """Return min, median, max and a histogram (edges, counts) of the values, None for none."""
    if not values:
        return None
    low, high = min(values), max(values)
    counts, edges = np.histogram(values, bins=min(BINS, high - low + 1), range=(low, high + 1))
    return {
        "min": low,
        "median": float(np.median(values)),
        "max": high,
        "histogram": {"edges": [round(edge, 2) for edge in edges.tolist()], "counts": counts.tolist()},
    }


def _duplicates(keys_of: dict[str, list[str]]) -> dict[str, Any]:
    """Return how many are repeats of one seen before, and the most repeated ones with their keys."""
    repeated = sorted((item for item in keys_of.items() if len(item[1]) > 1), key=lambda item: -len(item[1]))
    return {
        "count": sum(len(keys) - 1 for _, keys in repeated),
        "of": sum(map(len, keys_of.values())),
        "most_repeated": [
            {"what": what[:200], "times": len(keys), "keys": keys[:5]} for what, keys in repeated[:DUPLICATES_SHOWN]
        ],
    }


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
    first, started = next(batches), time.perf_counter()
    loaded = sum(len(batch["index"]) for batch in batches)
    rate = loaded / (time.perf_counter() - started)
    records = [source[int(index)] for index in first["index"]]
    return [
        Seen(image, tokens, record.key, record.captions)
        for image, tokens, record in zip(first["image"], first["tokens"], records, strict=True)
    ], rate
