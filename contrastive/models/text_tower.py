"""The text tower: a transformer over token ids, causal as in CLIP or bidirectional as in SigLIP."""

import warnings
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from contrastive.errors import UserError
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
        for name, pool in (("eos_id", "eos"), ("pad_id", "average")):
            token_id = getattr(self, name)
            if token_id is None and self.pool == pool:
                raise UserError(f"model.text.pool '{pool}' needs model.text.{name}: give the tokenizer's")
            if token_id is not None and not 0 <= token_id < self.vocab_size:
                raise UserError(f"model.text.{name} {token_id} is outside the vocabulary of {self.vocab_size}")


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

    def forward_features(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens after the last block and the final LayerNorm: ids (B, N) to (B, N, D).

        N may be shorter than context_length, never longer (UserError).
        """
        if tokens.shape[1] > self.config.context_length:
            raise UserError(
                f"{tokens.shape[1]} tokens per text, but the model's context_length is {self.config.context_length}"
            )
        x = self.token_embedding(tokens) + self.position_embedding[: tokens.shape[1]]
        return self.norm(self.transformer(x))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N) int64 ids to (B, E), not L2-normalised."""
        x = self.forward_features(tokens)
        if self.config.pool == "eos":
            x = pool_eos(x, tokens, self.config.eos_id)
        elif self.config.pool == "last":
            if tokens.shape[1] < self.config.context_length:
                warnings.warn(UNPADDED.format(tokens.shape[1], self.config.context_length), stacklevel=2)
            x = x[:, -1]
        else:
            x = pool_average(x, tokens, self.config.pad_id)
        return x if self.projection is None else self.projection(x)


def pool_eos(x: torch.Tensor, tokens: torch.Tensor, eos_id: int) -> torch.Tensor:
    """Return the token at the first end-of-text position: (B, N, D) and ids (B, N) to (B, D)."""
    position = (tokens == eos_id).int().argmax(dim=1)
    return x[torch.arange(x.shape[0], device=x.device), position]


def pool_average(x: torch.Tensor, tokens: torch.Tensor, pad_id: int) -> torch.Tensor:
    """Return the mean over positions that are not padding: (B, N, D) and ids (B, N) to (B, D)."""
    kept = (tokens != pad_id).unsqueeze(-1).to(x.dtype)
    return (x * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
