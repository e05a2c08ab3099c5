"""What a data source holds, measured on some of its samples, and what makes one doubt that it is what was meant."""

import hashlib
import io
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from contrastive.data.captions import caption_fault
from contrastive.data.decode import FORMATS, decode
from contrastive.data.record import BadSample, FaultCounts, Record, Source
from contrastive.data.samples import SampleDataset
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
ONE_COLOUR = 2  # of 255: how far apart the pixels of a picture of nothing may be, after JPEG
REMOTE_BLOCKS = 4  # of consecutive samples, so that few shards are fetched
# What people do not say of a picture, the first that fits. Each is matched against the whole text.
NO_CAPTIONS = {
    "URLs": r"(?:\w+://|www\.)\S+",
    "file names": r"\S(?:.*\S)?\.(?:jpe?g|png|webp|gif|bmp|tiff?|txt|json|npy)",
    "numbers or boxes": r"(?=\D*\d)[\d.,;:xe\s()\[\]{}+-]+",
    "rows of a table": r".*\t.*",
    "lists, dicts or JSON": r"(?:\[.*\]|\{.*\}|\(\s*['\"\d].*\))",
    "Python's bytes": r"b(['\"]).*\1",
    "markup": r"<\w[^<>]*>.*",
    "missing values": r"(?:none|null|nan|n/a|undefined|<na>|true|false)",
    "identifiers": r"(?=\S*\d)(?:[\w-]*\d{5,}[\w-]*|[0-9a-f]{12,}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})",
}
FEW, MOST = 0.1, 0.9  # shares: of captions or images that are odd, of images that are small
ENLARGED = 3  # times, from which more pixels are made up than it is worth
TEXTS = 512  # tokenized to be compared


@dataclass
class Measured:
    """What the inspected samples and their captions are; see `summary`."""

    inspected: int = 0
    readable: int = 0  # whose image was read, and decoded as far as asked
    lengths: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # by the names of QUANTITIES
    formats: Counter = field(default_factory=Counter)
    labels: Counter = field(default_factory=Counter)
    faults: FaultCounts = field(default_factory=FaultCounts)
    caption_keys: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # text to keys
    image_keys: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # hash to keys
    one_colour: list[str] = field(default_factory=list)  # keys of images that show nothing
    drawn: Counter = field(default_factory=Counter)  # text, or group of texts, to how often it is drawn in an epoch
    drawn_twice: float = 0.0  # of these squares' sum, what a sample has with itself

    @property
    def matching(self) -> float:
        """The probability that two of the samples come with one text, or with two of one `caption_group`."""
        pairs = sum(self.drawn.values()) * (sum(self.drawn.values()) - 1)
        return max(0.0, (sum(n * n for n in self.drawn.values()) - self.drawn_twice) / pairs) if pairs > 0 else 0.0


@dataclass(frozen=True)
class Seen:
    """One sample as the model gets it: image uint8 (3, S, S), tokens int64 (L,); and what the source has for it."""

    image: torch.Tensor
    tokens: torch.Tensor | None  # None for a classifier
    key: str
    captions: tuple[str, ...]
    label: int | None


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


def measure(
    source: Source, indices: Iterable[int], tokenizer: Tokenizer | None, decoded: int | None = None
) -> Measured:
    """Read the samples at `indices` and return what they are.

    Args:
        tokenizer: None leaves captions aside.
        decoded: how many images to decode, of which alone the sizes are known; None: all. The others are compared.
    """
    found = Measured()
    for index in bar(indices, "reading samples"):
        found.inspected += 1
        key = ""
        try:
            record = source[int(index)]
            key = record.key
            _measure_image(record, found, whole=decoded is None or found.readable < decoded)
        except BadSample as fault:
            found.faults.add(fault.reason, fault.key or key)
            continue
        if record.label is not None:
            found.labels[record.label] += 1
        if tokenizer is not None:
            _measure_captions(record, tokenizer, found)
    return found


def image_hash(image: Any) -> str:
    """Return a hash of an image as it is stored: of its bytes, or of its pixels where there is no file."""
    content = image if isinstance(image, bytes) else decode(image).contiguous().numpy().tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _measure_image(record: Record, found: Measured, whole: bool) -> None:
    if whole:
        pixels = decode(record.image)
        _, height, width = pixels.shape
        for name, length in (("height", height), ("width", width), ("short_side", min(height, width))):
            found.lengths[name].append(length)
        if int((pixels.amax((1, 2)).int() - pixels.amin((1, 2)).int()).max()) <= ONE_COLOUR:
            found.one_colour.append(record.key)
        if isinstance(record.image, bytes):
            with Image.open(io.BytesIO(record.image), formats=FORMATS) as opened:
                found.formats[f"{opened.format} {opened.mode}"] += 1
            found.lengths["file_bytes"].append(len(record.image))
        else:
            found.formats["pixels"] += 1
    found.image_keys[image_hash(record.image)].append(record.key)
    found.readable += 1


def _measure_captions(record: Record, tokenizer: Tokenizer, found: Measured) -> None:
    found.lengths["captions_per_sample"].append(len(record.captions))
    if not record.captions:
        found.faults.add("missing_caption", record.key)
    shares = Counter()
    for caption, weight in zip(record.captions, record.caption_weights or (1,) * len(record.captions), strict=False):
        fault = caption_fault(caption)
        if fault:
            found.faults.add(fault, record.key)
            continue
        found.caption_keys[caption].append(record.key)
        found.lengths["caption_characters"].append(len(caption))
        found.lengths["caption_tokens"].append(tokenizer.num_tokens(caption))
        shares[record.caption_group or tokenizer.cleaned(caption)] += weight if 0 <= weight < math.inf else 0
    for text, share in shares.items():
        share /= shares.total() or 1
        found.drawn[text] += share
        found.drawn_twice += share**2


def summary(source: Source, found: Measured, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the figures as plain values for JSON. Sizes are in pixels, upright; of text in characters and tokens."""
    lengths, context = found.lengths["caption_tokens"], tokenizer and tokenizer.context_length
    long_texts = sum(length > context for length in lengths)
    result = {
        "source": source.name,
        "samples": len(source),
        "inspected": found.inspected,
        "readable": found.readable,
        "unusable": found.faults.commonest_first(),
        "formats": dict(found.formats.most_common()),
        **{name: distribution(found.lengths[name]) for name in QUANTITIES},
        "context_length": context,
        "truncated_captions": {"count": long_texts, "share": long_texts / max(1, len(lengths))},
        # Captions made from class names repeat by design.
        "duplicate_captions": None if source.prompted or not tokenizer else _duplicates(found.caption_keys),
        "duplicate_images": _duplicates(found.image_keys),
        "images_of_one_colour": len(found.one_colour),
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


def facts(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the figures that are not distributions as (name, value) in words."""
    rows = [
        ("samples", f"{figures['samples']:,}"),
        ("inspected", f"{figures['inspected']:,}, {figures['readable']:,} of them readable"),
        ("formats", ", ".join(f"{count:,} {name}" for name, count in figures["formats"].items()) or "none"),
    ]
    for reason, found in figures["unusable"].items():
        more = ", ..." if found["count"] > 5 else ""
        rows.append((f"unusable: {reason}", f"{found['count']:,}: {', '.join(found['keys'][:5])}{more}"))
    if "classes" in figures:
        commonest = ", ".join(f"{name} ({count:,})" for name, count in figures["classes"]["commonest"][:5])
        rows.append(("classes", f"{figures['classes']['seen']:,} seen, the commonest: {commonest}"))
    if figures["context_length"]:
        cut, context = figures["truncated_captions"], f"the context of {figures['context_length']} tokens"
        rows.append(("cut captions", f"{cut['count']:,} ({cut['share']:.1%}) are longer than {context}"))
    for what in ("captions", "images"):
        found = figures[f"duplicate_{what}"]
        if found is not None:
            rows.append((f"duplicate {what}", f"{found['count']:,} of {found['of']:,}"))
    if figures.get("images_per_second"):
        rows.append(("loader", f"{figures['images_per_second']:,.0f} images/s in one process, augmented"))
    return rows


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


def first_samples(dataset: SampleDataset, count: int) -> list[Seen]:
    """Return the samples that training sees first.

    Raises:
        UserError: as from training, where no sample can be used.
    """
    shown = []
    for sample in map(dataset.__getitem__, range(count)):
        record = dataset.source[sample["index"]]
        shown.append(Seen(sample["image"], sample.get("tokens"), record.key, record.captions, record.label))
    return shown


def kind_of_text(text: str) -> str | None:
    """Return which of NO_CAPTIONS a text is, None where it may be a caption."""
    flags = re.IGNORECASE | re.DOTALL
    return next((kind for kind, form in NO_CAPTIONS.items() if re.fullmatch(form, text.strip(), flags)), None)


def doubts(source: Source, found: Measured, tokenizer: Tokenizer | None, image_size: int) -> list[str]:
    """Return what is odd about measured samples of a source, for a model of this size and tokenizer."""
    of_captions = tokenizer is not None and not source.prompted
    return (_about_captions(found.caption_keys, tokenizer) if of_captions else []) + _about_images(found, image_size)


def _about_captions(captions: dict[str, list[str]], tokenizer: Tokenizer) -> list[str]:
    said, kinds, examples, total = [], Counter(), {}, sum(map(len, captions.values()))
    for caption, keys in captions.items():
        kind = kind_of_text(caption)
        kinds[kind] += len(keys)
        examples.setdefault(kind, caption)
    for kind, count in kinds.most_common():
        if kind and count >= max(2, FEW * total):
            said.append(
                f"{count / total:.0%} of the captions look like {kind}, as '{short(examples[kind])}': name the column "
                "or field of the captions with --data.caption_column, or clean them"
            )
    if len(captions) == 1 and not said:
        said.append(f"all captions are '{short(next(iter(captions)))}': there is nothing to learn from them")
    return said + _about_tokens(list(captions)[:TEXTS], tokenizer)


def _about_tokens(captions: list[str], tokenizer: Tokenizer) -> list[str]:
    """Different captions that the model cannot tell apart: they differ where it does not look."""
    texts = list({" ".join(tokenizer.cleaned(text).casefold().split()): text for text in captions}.values())
    rows = [row.tobytes() for row in tokenizer(texts).numpy()] if texts else []
    first: dict[bytes, str] = {}
    alike = [(first.setdefault(row, text), text) for row, text in zip(rows, texts, strict=True)]
    alike = [(one, other) for one, other in alike if one is not other]
    if len(alike) < max(2, FEW * len(texts)):
        return []
    one, other = alike[0]
    cut = tokenizer.num_tokens(other) > tokenizer.context_length
    mend = "a longer --model.text.context_length" if cut else "a --data.tokenizer that knows their words"
    return [
        f"{len(alike) / len(texts):.0%} of the different captions are the same tokens, as '{short(one)}' and "
        f"'{short(other)}': use {mend}"
    ]


def _about_images(found: Measured, image_size: int) -> list[str]:
    said, sides = [], found.lengths["short_side"]
    if sides and (largest := np.quantile(sides, MOST)) * ENLARGED <= image_size:
        said.append(
            f"the images are {largest:.0f} pixels wide or high and are enlarged {image_size / largest:.1f} times to "
            f"{image_size}: a smaller image size learns as much in less time"
        )
    blank = len(found.one_colour)
    if blank >= max(2, FEW * len(sides)):
        said.append(f"{blank} of {len(sides)} images are of one colour, as '{found.one_colour[0]}': look at the files")
    repeats = found.readable - len(found.image_keys)
    if repeats >= max(2, FEW * found.readable) and blank < repeats:
        keys = max(found.image_keys.values(), key=len)
        said.append(
            f"{repeats} of {found.readable} images are there before, as '{keys[0]}' and '{keys[1]}': an image with "
            "several captions is best one sample with all of them"
        )
    return said


def short(text: str, length: int = 100) -> str:
    """Return the text on one line, its middle left out where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 24]} ... {line[-18:]}"
