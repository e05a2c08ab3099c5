"""Captions out of a caption decoder: greedy, by beam search or drawn at random; and how likely given ones are.

What earlier positions and the patches are attended to with, their keys and values, is computed once and kept.

B images, K captions of each, N patches, L tokens, D width, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from contrastive.errors import UserError
from contrastive.models.caption_decoder import CaptionDecoder, before_end, token_losses
from contrastive.option_types import NotNegative, Positive, check_bounds

POSITIONS_AT_ONCE = 2**14
"""Of captions whose likelihood is asked: 50 MiB a tensor at a width of 768."""


@dataclass(frozen=True)
class GenerationConfig:
    """How a caption is chosen."""

    method: Literal["greedy", "beam", "sample"] = "greedy"
    """The likeliest token each time; the likeliest caption that a beam search finds; or tokens drawn at random."""
    num_beams: Positive[int] = 4
    """beam: captions that are followed at a time."""
    length_penalty: NotNegative[float] = 1.0
    """beam: log-likelihoods are divided by the number of tokens to this power; 0 favours short captions."""
    temperature: Positive[float] = 1.0
    """sample: logits are divided by it; below 1 likely tokens become likelier."""
    top_k: Positive[int | None] = None
    """sample: draw from so many of the likeliest tokens; none: from all."""
    top_p: Positive[float] = 1.0
    """sample: draw from the likeliest tokens that together have this probability (nucleus, Holtzman et al. 2020)."""
    seed: NotNegative[int] = 0
    """sample: of the random numbers, which depend on it and on the image's number alone."""
    best_of: Positive[int] = 1
    """sample: draw so many captions of each image, and take the one whose embedding is nearest to the image's. The
    towers know pairs that the decoder has never told, such as a colour and a shape."""

    def check(self) -> None:
        """Raise UserError for a number that makes no sense."""
        check_bounds(self)
        if self.top_p > 1:
            raise UserError(f"top_p is {self.top_p}; it is a probability, 1 at most")
        if self.best_of > 1 and self.method != "sample":
            raise UserError(f"best_of {self.best_of} is for captions drawn at random, not for method '{self.method}'")


class Decoding:
    """K captions of each of B images under way: what all positions so far are attended to with.

    Args:
        image: patch tokens (B, N, D). own: which of them are no padding, bool (B, N); None: all.
    """

    def __init__(self, decoder: CaptionDecoder, image: torch.Tensor, own: torch.Tensor | None = None):
        self.decoder, self.blocks, self.length = decoder, decoder.transformer.blocks, 0
        projected = decoder.image_projection(image)
        self.image = [block.image_attention.keys_values(projected) for block in self.blocks]
        self.past, self.own = [None] * len(self.blocks), None if own is None else own[:, None, None]

    def states(self, x: torch.Tensor) -> torch.Tensor:
        """Go on by M positions: `inputs` of the decoder (B · K, M, D) to the states that tell their ids."""
        x = x + self.decoder.position_embedding[self.length : self.length + x.shape[1]]
        self.length += x.shape[1]
        for number, block in enumerate(self.blocks):
            x, self.past[number] = block.go_on(x, self.image[number], self.past[number], self.own)
        return self.decoder.norm(x)

    def log_probabilities(self, ids: torch.Tensor) -> torch.Tensor:
        """Of what follows the ids (B · K, l) told so far, all but the last of which were given before: (B · K, V)."""
        embed, start = self.decoder.token_embedding, self.decoder.start
        x = embed(ids[:, -1:]) if ids.shape[1] else start.expand(len(ids), 1, -1)
        return self.decoder.logits(self.states(x)[:, -1]).float().log_softmax(dim=-1)

    def choose(self, rows: torch.Tensor) -> None:
        """Go on with these of the B · K captions, (B · K,) int64, of the same images."""
        self.past = [tuple(part[rows] for part in own) for own in self.past]


@torch.no_grad()
def generate(
    decoder: CaptionDecoder,
    image: torch.Tensor,
    how: GenerationConfig,
    numbers: Sequence[int] | None = None,
    attempt: int = 0,
    own: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a caption of each image: ids (B, L), `eos_id` from its end on, and its log-likelihood (B,) in nats.

    L is `max_tokens` at most; a caption that has not ended by then has no end. The decoder has to be in eval mode.

    Args:
        image, own: see `Decoding`. numbers: of the images, which the random numbers go by; from 0 when None.
        attempt: which of the captions drawn for an image, 0 for the first; `best_of` is the caller's to choose.
    """
    how.check()
    if how.method == "beam":
        return _beam_search(Decoding(decoder, image, own), image, how)
    decoding, count = Decoding(decoder, image, own), len(image)
    ids, score = image.new_empty(count, 0, dtype=torch.int64), image.new_zeros(count, dtype=torch.float32)
    ended = torch.zeros(count, dtype=torch.bool, device=image.device)
    draws = None
    if how.method == "sample":
        places = ((number, attempt) if attempt else (number,) for number in numbers or range(count))
        draws = _draws(how.seed, places, decoder.max_tokens).to(image.device)
    while ids.shape[1] < decoder.max_tokens and not ended.all():
        likely = decoding.log_probabilities(ids)
        token = likely.argmax(dim=-1) if draws is None else _drawn(likely, draws[:, ids.shape[1]], how)
        token = token.masked_fill(ended, decoder.eos_id)
        score += likely.gather(1, token[:, None])[:, 0].masked_fill(ended, 0)
        ended |= token == decoder.eos_id
        ids = torch.cat([ids, token[:, None]], dim=1)
    return ids, score


def _draws(seed: int, places: Iterable[tuple[int, ...]], length: int) -> torch.Tensor:
    """Numbers in [0, 1), float64 (B, length): a row for each image, whatever batch it comes in."""
    return torch.from_numpy(np.stack([np.random.default_rng((seed, *place)).random(length) for place in places]))


def _drawn(likely: torch.Tensor, draws: torch.Tensor, how: GenerationConfig) -> torch.Tensor:
    """Log-probabilities (B, V) and numbers in [0, 1), (B,), to tokens (B,)."""
    most = likely.shape[1] if how.top_k is None else min(how.top_k, likely.shape[1])
    likely, tokens = (likely / how.temperature).double().log_softmax(dim=-1).topk(most)
    share = likely.exp() / likely.exp().sum(dim=-1, keepdim=True)
    before = share.cumsum(dim=-1) - share  # of all likelier ones
    share = share.masked_fill(before >= how.top_p, 0)
    upto = share.cumsum(dim=-1)
    place = (upto <= draws[:, None] * upto[:, -1:]).sum(dim=-1)
    return tokens.gather(1, place.clamp(max=most - 1)[:, None])[:, 0]


def _beam_search(decoding: Decoding, image: torch.Tensor, how: GenerationConfig) -> tuple:
    """As `generate`. A caption that ends leaves its beam empty; the best that has ended is what is returned."""
    count, beams, length, eos = len(image), how.num_beams, decoding.decoder.max_tokens, decoding.decoder.eos_id
    ids = image.new_empty(count, beams, 0, dtype=torch.int64)
    score = image.new_full((count, beams), -torch.inf, dtype=torch.float32)
    score[:, 0] = 0  # all begin alike, and one will do
    best_score, best_raw = score.new_full((2, count), -torch.inf)
    best_ids = ids.new_full((count, length), eos)
    own = torch.arange(count, device=image.device)[:, None] * beams
    for told in range(1, length + 1):
        likely = decoding.log_probabilities(ids.flatten(0, 1)).unflatten(0, (count, beams))
        score, place = (score[..., None] + likely).flatten(1).topk(beams)
        beam, token = place // likely.shape[-1], place % likely.shape[-1]
        decoding.choose((own + beam).flatten())
        ids = torch.cat([ids.gather(1, beam[..., None].expand_as(ids)), token[..., None]], dim=2)
        ended = (token == eos) | (told == length)
        finished, which = (score / told**how.length_penalty).masked_fill(~ended, -torch.inf).max(dim=1)
        better = finished > best_score
        best_score = torch.where(better, finished, best_score)
        best_raw = torch.where(better, score.gather(1, which[:, None])[:, 0], best_raw)
        found = F.pad(ids[torch.arange(count), which], (0, length - told), value=eos)
        best_ids = torch.where(better[:, None], found, best_ids)
        score = score.masked_fill(ended, -torch.inf)
        # What a beam could reach at the most: all that is still to come certain, and as long as can be.
        if (best_score >= score.amax(dim=1) / length**how.length_penalty).all():
            break
    return best_ids, best_raw


def log_likelihood(
    decoder: CaptionDecoder, image: torch.Tensor, tokens: torch.Tensor, own: torch.Tensor | None = None
) -> torch.Tensor:
    """Return log p(caption | image) of each image and caption, ends included, (B, C) in nats.

    Args:
        image, own: see `Decoding`. tokens: a tokenizer's rows for C captions, (C, context_length).
    """
    ids = decoder.ids(tokens)
    counted = before_end(ids, decoder.eos_id)
    longest = int(counted.sum(dim=1).amax())  # what follows is not looked at
    ids, counted, count = ids[:, :longest], counted[:, :longest], len(image)
    decoding, found = Decoding(decoder, image, own), []
    at_once = max(1, POSITIONS_AT_ONCE // (count * longest))
    for some, inside in zip(ids.split(at_once), counted.split(at_once), strict=True):
        decoding.past, decoding.length = [None] * len(decoding.blocks), 0
        x = decoder.inputs(some).expand(count, -1, -1, -1).flatten(0, 1)  # (B · c, L, D)
        states = decoding.states(x).unflatten(0, (count, -1))[:, inside]  # (B, t, D)
        told = some[inside].expand(count, -1)
        losses = token_losses(states.flatten(0, 1), decoder.token_embedding.weight, told.flatten()).view(count, -1)
        caption = inside.nonzero()[:, 0]  # of each of the t tokens
        found.append(losses.new_zeros(count, len(some)).index_add(1, caption, -losses))
    return torch.cat(found, dim=1)
