"""Which patches of an image a word speaks of: heat maps of a sentence, word by word. N words, h by w patches."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from contrastive.data.captions import caption_fault
from contrastive.data.preprocess import Preprocess
from contrastive.data.record import BadSample
from contrastive.data.tokenizer import Tokenizer
from contrastive.errors import UserError
from contrastive.patches import Patches
from contrastive.visualize.drawing import as_uint8, colour_scale, over
from contrastive.visualize.pictured_model import Inputs, PicturedModel

LEAST_SIDE = 480
"""Pixels of a picture's shorter side, or a little more: whole multiples of what the model sees."""


@dataclass(frozen=True)
class WordMap:
    """A heat map over an image as the model sees it."""

    cosines: torch.Tensor
    """(h, w); of a word within its sentence, by how much it raises them."""
    picture: np.ndarray
    """(H, W, 3) uint8: the map over the image in grey."""
    colours: np.ndarray
    """(1, 256, 3) uint8: the colours from `low` to `high`."""
    low: float
    high: float


def words_of(sentence: str) -> tuple[str, ...]:
    """Return what stands between spaces."""
    return tuple(sentence.split())


def word_map(bundle: Any, image: bytes, sentence: str, word: int | None = None, *, alone: bool = False) -> WordMap:
    """Compare each patch of an image with a word of a sentence, or with all of the sentence.

    A word within its sentence is shown by what it changes: each patch's cosine with the sentence, minus that with the
    sentence without this word. Words that say nothing of the image are then 0, where the cosine of any two texts with a
    patch is much the same. Alone it is a text of one word. Colours are one scale for all words of the sentence. How a
    patch is brought into the space of texts: see `patch_embeddings`.

    Args:
        bundle: anything with `model`, `preprocess` and `tokenizer`.
        image: the bytes of a file.
        word: its number from 0; None: the whole sentence.
        alone: the word as a text of its own.

    Raises:
        UserError: an image that cannot be read; a text that is empty, or too long for the model.
    """
    check_text(sentence, bundle.tokenizer)
    words = words_of(sentence)
    if word is None:
        texts = (sentence,)
    elif alone or len(words) == 1:
        texts = words
    else:
        texts = (sentence, *(" ".join(words[:place] + words[place + 1 :]) for place in range(len(words))))
    pictured = PicturedModel(
        name="",
        model=bundle.model,
        preprocess=bundle.preprocess,
        tokenizer=bundle.tokenizer,
        inputs=Inputs(bundle.preprocess.collate([as_seen(image, bundle.preprocess)]), ("",), texts, (None,), False),
    )
    maps = pictured.text_maps[0][0]
    within = len(texts) > len(words) and word is not None
    maps = maps[:1] - maps[1:] if within else maps
    scale = colour_scale(maps, centre=within)
    cosines, seen = maps[word or 0], pictured.inputs.canvas[0]
    times = -(-LEAST_SIDE // min(seen.shape[1:]))
    large = seen.repeat_interleave(times, dim=1).repeat_interleave(times, dim=2)
    colours = as_uint8(scale.to_rgba(np.linspace(scale.norm.vmin, scale.norm.vmax, 256))[None, :, :3])
    return WordMap(cosines, over(large, cosines, scale), colours, scale.norm.vmin, scale.norm.vmax)


def as_seen(image: bytes, preprocess: Preprocess) -> torch.Tensor | Patches:
    """Return the image of a file as `Preprocess.pixels`; UserError where it cannot be read."""
    try:
        return preprocess.pixels(image)
    except BadSample as bad:
        raise UserError(f"the image cannot be read ({bad.reason.replace('_', ' ')}); give another file") from None


def check_text(text: str, tokenizer: Tokenizer) -> None:
    """Raise UserError for a text that is empty, or longer than the model reads."""
    if fault := caption_fault(text):
        raise UserError("type a text first" if not text.strip() else f"the text cannot be used ({fault})")
    if (found := tokenizer.num_tokens(text)) > tokenizer.context_length:
        raise UserError(f"the text has {found} tokens, the model reads {tokenizer.context_length}; shorten it")
