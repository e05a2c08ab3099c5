"""What is done to a text before it is tokenized, the same in training, evaluation and use."""

import html
import string
from typing import Literal

import ftfy

Cleaning = Literal["none", "whitespace", "clip", "canonicalize"]

_NO_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


def clean_text(text: str, cleaning: Cleaning) -> str:
    """Return the text as it is ('none'), or as `mend`, `clean_clip` or `canonicalize` make it, in this order."""
    if cleaning == "whitespace":
        return mend(text)
    if cleaning == "clip":
        return clean_clip(text)
    return canonicalize(text) if cleaning == "canonicalize" else text


def mend(text: str) -> str:
    """Mend encoding slips and HTML entities and squeeze white space, as open_clip does for any tokenizer."""
    # Printable ASCII without an entity is left alone by the first two, which take most of the time.
    if "&" in text or not (text.isascii() and text.isprintable()):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


def clean_clip(text: str) -> str:
    """Return what `mend` does in lower case, as open_clip does for CLIP."""
    return mend(text).lower()


def canonicalize(text: str) -> str:
    """Return what `clean_clip` does without ASCII punctuation, '_' as a space, as open_clip does for SigLIP."""
    return " ".join(clean_clip(text).translate(_NO_PUNCTUATION).split())
