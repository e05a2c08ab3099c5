"""Captions before they become tokens: how they are cleaned, what is asked of one, which of several is drawn."""

import hashlib
import html
import math
import string
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Literal

from contrastive.data.record import BadSample, Record, Source

# Real captions end far below this; longer ones are documents that cost tokenizing time and teach nothing.
MAX_CAPTION_CHARS = 20_000
TOKENIZER_SAMPLES = 50_000  # enough to count words; more only takes longer

Cleaning = Literal["none", "whitespace", "clip", "canonicalize"]
_NULLS = ("nan", "NaN", "None", "null", "NULL", "<NA>")  # as pandas and others print what is missing
_NO_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


def clean_text(text: str, cleaning: Cleaning) -> str:
    """Return what is tokenized, the same in training, evaluation and use; each way does what those before it do.

    'none' leaves the text as it is; 'whitespace' mends encoding slips and HTML entities and squeezes white space, as
    open_clip does for any tokenizer; 'clip' lower-cases, as open_clip does for CLIP; 'canonicalize' takes ASCII
    punctuation out, '_' as a space, as open_clip does for SigLIP.
    """
    if cleaning == "none":
        return text
    # Printable ASCII without an entity is left alone by ftfy and html, which take most of the time.
    if "&" in text or not (text.isascii() and text.isprintable()):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = " ".join(text.split())
    if cleaning == "whitespace":
        return text
    text = text.lower()
    return text if cleaning == "clip" else " ".join(text.translate(_NO_PUNCTUATION).split())


def caption_fault(text: str) -> str | None:
    """Return None, or why not to use it: 'empty_caption', 'null_caption', 'caption_too_long' or 'bad_utf8'."""
    if len(text) > MAX_CAPTION_CHARS:
        return "caption_too_long"
    if not text or text.isspace():
        return "empty_caption"
    if text.strip() in _NULLS:
        return "null_caption"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # lone surrogates: what Python makes of bytes that were not text
        return "bad_utf8"
    return None


def caption_id(text: str) -> int:
    """Return a signed 64-bit hash of the text: equal captions have equal ids, on every machine and run."""
    # Python's own hash of a text is another one in every process.
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def drawn_order(record: Record, draw: float) -> tuple[str, ...]:
    """Return the captions of a sample, the drawn one first, then those to take where it cannot be used.

    draw: in 0..1, uniform. A caption comes first as often as its weight says; one of weight 0 is left out.

    Raises:
        BadSample: 'missing_caption'; 'bad_weights', where they are not one number for each caption, finite and
            not negative, with a sum above 0.
    """
    captions, weights = record.captions, record.caption_weights
    if not captions:
        raise BadSample("missing_caption", record.key)
    if weights is None:
        first = int(draw * len(captions))
    else:
        if len(weights) != len(captions) or not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise BadSample("bad_weights", record.key)
        captions, weights = zip(*((c, w) for c, w in zip(captions, weights, strict=True) if w), strict=True)
        ends = list(accumulate(weights))
        first = min(bisect_right(ends, draw * ends[-1]), len(captions) - 1)
    return captions[first:] + captions[:first]


def sampled_captions(source: Source) -> Iterator[str]:
    """Yield all captions of at most TOKENIZER_SAMPLES samples, spread evenly over the source: to train a tokenizer on.

    Of shards that lie far away they come in a few runs: each shard that is touched is fetched whole.
    """
    run = TOKENIZER_SAMPLES // 8 if source.remote else 1
    for first in range(0, len(source), run * math.ceil(len(source) / TOKENIZER_SAMPLES)):
        for index in range(first, min(first + run, len(source))):
            try:
                yield from source.captions(index)
            except BadSample:
                continue  # the loader counts it
