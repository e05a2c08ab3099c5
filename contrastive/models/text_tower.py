"""The text tower: a transformer over token ids, causal as in CLIP or bidirectional as in SigLIP."""

import warnings
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from contrastive.errors import UserError
from contrastive.models.packing import Segments
from contrastive.models.transformer import Transformer, TransformerConfig
from contrastive.option_types import Positive

UNPADDED = (
    "{} tokens a text, where this text tower reads the last of {} positions: pad each text to that length, as the "
    "model's tokenizer does, or its embedding is another one"
)


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig(TransformerConfig):
    """Options of the text transformer. The defaults are SigLIP's B/16."""

    SECTION = "model.text"

    vocab_size: int | None = None
    """Number of token ids; none: as many as the run's tokenizer has."""
    context_length: Positive[int] = 64
    """Tokens per text; shorter texts are padded, longer ones cut."""
    causal: bool = False
    """Attend to earlier positions only, as in CLIP."""
    pool: Literal["eos", "last", "average"] = "last"
    """The vector of a text: its end-of-text token (CLIP), the last position (SigLIP), or the mean of its tokens."""
    attend_padding: bool = True
    """Attend to the padding too, as SigLIP does; false: to a text's own tokens alone, which are then all that is
    computed. Of no effect where no padding is seen or where it is pooled: with causal, or pool=last."""
    projection: bool = True
    """Linear projection to embed_dim after pooling; without it width must equal embed_dim."""
    projection_bias: bool = True
    """Bias in the projection to embed_dim; SigLIP has one, CLIP none."""
    eos_id: int | None = None
    """Id of the end-of-text token; none: the run's tokenizer's."""
    pad_id: int | None = None
    """Id of the padding token; none: the run's tokenizer's."""

    def check(self) -> None:
        """Raise UserError when the options contradict each other."""
        super().check()
        if self.vocab_size is None:
            raise UserError("model.text.vocab_size is not set: give the size of the tokenizer's vocabulary")
        if not self.attend_padding and (self.causal or self.pool == "last"):
            why = "causal: padding follows the text" if self.causal else "pool last, which reads padding"
            raise UserError(f"model.text.attend_padding false has no effect with model.text.{why}; leave it out")
        for name, pool in (("eos_id", "eos"), ("pad_id", "average")):
            token_id = getattr(self, name)
            if token_id is None and self.pool == pool:
                raise UserError(f"model.text.pool '{pool}' needs model.text.{name}: give the tokenizer's")
            if token_id is not None and not 0 <= token_id < self.vocab_size:
                raise UserError(f"model.text.{name} {token_id} is outside the vocabulary of {self.vocab_size}")


class PackedTokens(NamedTuple):
    """B texts without what follows their ends, one behind the other in rising order of length: T tokens in all.

    A few texts of one token may precede them, see `pack`.
    """

    ids: torch.Tensor
    """(T,) int64."""
    positions: torch.Tensor
    """(T,) int64, from 0 in each text."""
    places: torch.Tensor
    """(B,) int64: the number of each text in this order, those before them counted."""
    segments: Segments

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedTokens":
        """Return them on a device, as a tensor's `to` does."""
        return PackedTokens(*(part.to(device, non_blocking=non_blocking) for part in self))


class TextTower(nn.Module):
    """Token ids (B, N) to one vector per text (B, E). E is embed_dim, D the width."""

    def __init__(self, config: TextTowerConfig, embed_dim: int):
        super().__init__()
        config.check()
        if not config.projection and config.width != embed_dim:
            raise UserError(
                f"model.text.width {config.width} differs from model.embed_dim {embed_dim}: "
                "make them equal or set model.text.projection true"
            )
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Parameter(torch.zeros(config.context_length, config.width))
        self.transformer = Transformer(config, is_causal=config.causal)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        bias = config.projection_bias
        self.projection = nn.Linear(config.width, embed_dim, bias=bias) if config.projection else None

    def set_context_length(self, length: int) -> str:
        """Make the positions those of texts of another length; return in words what became of them.

        Of a shorter one the first are kept, unless texts are read at their last position; else they are interpolated
        linearly, as by open_clip. The parameter is a new one: call this before an optimizer takes hold of it.
        """
        now, kept = self.position_embedding.detach(), length < self.config.context_length and self.config.pool != "last"
        new = now[:length] if kept else F.interpolate(now.T[None], size=length, mode="linear")[0].T
        self.position_embedding = nn.Parameter(new.clone(memory_format=torch.contiguous_format))
        self.config = replace(self.config, context_length=length)
        return f"the first {length} are kept" if kept else f"resampled for {length} tokens"

    def pack(self, tokens: torch.Tensor) -> torch.Tensor | PackedTokens:
        """Return ids (B, N) without what has no part in the embeddings; themselves where all has.

        The embeddings are the same but for rounding. A text ends with its first eos (pool eos) or with its last token
        that is not padding (average). With attention to padding, or the last position pooled, nothing can be left out.
        Call it before they are on a GPU, which would be waited for.
        """
        if self.config.pool == "last" or (self.config.attend_padding and not self.config.causal):
            return tokens
        self._check_length(tokens)
        lengths = self._lengths(tokens)
        segments, order, places = Segments.of(lengths, longest=self.config.context_length)
        inside = torch.arange(tokens.shape[1], device=tokens.device) < lengths[order, None]
        ids, positions = (
            F.pad(part, (segments.fillers, 0)) for part in (tokens[order][inside], inside.nonzero()[:, 1])
        )
        return PackedTokens(ids, positions, places, segments)

    def forward_features(self, tokens: torch.Tensor | PackedTokens) -> torch.Tensor:
        """Tokens after the last block and the final LayerNorm: ids (B, N) to (B, N, D), packed ones to (T, D).

        N may be shorter than context_length, never longer (UserError).
        """
        if isinstance(tokens, PackedTokens):
            x = self.token_embedding(tokens.ids) + F.embedding(tokens.positions, self.position_embedding)
            return self.norm(self.transformer(x, tokens.segments))
        self._check_length(tokens)
        x = self.token_embedding(tokens) + self.position_embedding[: tokens.shape[1]]
        attended = None
        if not self.config.attend_padding:
            inside = torch.arange(tokens.shape[1], device=tokens.device) < self._lengths(tokens)[:, None]
            attended = inside[:, None, None]  # (B, 1, 1, N): for all heads and queries
        return self.norm(self.transformer(x, attended))

    def forward(self, tokens: torch.Tensor | PackedTokens) -> torch.Tensor:
        """(B, N) int64 ids, or what `pack` makes of them, to (B, E), not L2-normalised."""
        x = self._pooled(self.forward_features(tokens), tokens)
        return x if self.projection is None else self.projection(x)

    def _check_length(self, tokens: torch.Tensor) -> None:
        length, most = tokens.shape[1], self.config.context_length
        if length > most:
            raise UserError(f"{length} tokens per text, but the model's context_length is {most}")

    def _lengths(self, tokens: torch.Tensor) -> torch.Tensor:
        """How many tokens each text has up to its end: ids (B, N) to (B,) int64, 1 or more."""
        if self.config.pool == "eos":
            return first_eos(tokens, self.config.eos_id) + 1
        count = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        return (count * (tokens != self.config.pad_id)).amax(dim=1).clamp(min=1)

    def _pooled(self, x: torch.Tensor, tokens: torch.Tensor | PackedTokens) -> torch.Tensor:
        """Tokens (B, N, D), or packed (T, D), to a vector of each text in the caller's order, (B, D)."""
        packed = isinstance(tokens, PackedTokens)
        if self.config.pool == "last":  # which is never packed
            if tokens.shape[1] < self.config.context_length:
                warnings.warn(UNPADDED.format(tokens.shape[1], self.config.context_length), stacklevel=3)
            return x[:, -1]
        if self.config.pool == "eos":
            if packed:
                return x[tokens.segments.boundaries[1:][tokens.places] - 1]
            return x[torch.arange(x.shape[0], device=x.device), first_eos(tokens, self.config.eos_id)]
        kept = ((tokens.ids if packed else tokens) != self.config.pad_id).unsqueeze(-1).to(x.dtype)
        if packed:
            total, count = (
                # unsafe: no check that waits for a GPU
                torch.segment_reduce(part, "sum", offsets=tokens.segments.boundaries, unsafe=True)[tokens.places]
                for part in (x * kept, kept)
            )
        else:
            total, count = (x * kept).sum(dim=1), kept.sum(dim=1)
        return total / count.clamp(min=1)


def first_eos(tokens: torch.Tensor, eos_id: int) -> torch.Tensor:
    """Return the first end-of-text position of each text, 0 where there is none: ids (B, N) to (B,)."""
    return (tokens == eos_id).int().argmax(dim=1)
