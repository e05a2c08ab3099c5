"""What makes one doubt that data is what it was meant to be: one line each, with what to do."""

import re
from collections import Counter

import numpy as np

from contrastive.data.inspection import Measured
from contrastive.data.record import Source
from contrastive.data.tokenizer import Tokenizer

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
