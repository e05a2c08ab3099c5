"""The caption decoder: a transformer that tells an image's caption from its patches, as in CapPa and SigLIP 2.

It predicts a caption token by token, each from those before it, or all tokens at once from mask tokens alone, so that
nothing but the image can tell them (Tschannen et al. 2023, "Image Captioners Are Scalable Vision Learners Too").

B images, N patches of each, K captions of each, L tokens of a caption, D width, V vocabulary, T tokens of all captions.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from contrastive import products
from contrastive.errors import UserError
from contrastive.models.init import InitStyle, initialise_blocks, initialise_token_inputs
from contrastive.models.transformer import Attention, Block, Linear, Transformer, TransformerConfig
from contrastive.option_types import NotNegative, Positive

KeysValues = tuple[torch.Tensor, torch.Tensor]
"""Of one attention, (B, N, H, D/H) each."""
CPU_LOGITS = 2**22
"""Logits of a chunk: 16 MiB of float32, which a cache nearly holds."""
GPU_LOGITS = 2**27
"""512 MiB of float32: 512 tokens against 256k, enough for the product's full rate."""


@dataclass(frozen=True, kw_only=True)
class CaptionDecoderConfig(TransformerConfig):
    """Options of the caption decoder. By default its blocks are the text tower's, half as many (SigLIP 2)."""

    SECTION = "objectives.caption"

    width: Positive[int | None] = None
    """Channels of every token; none: as the text tower."""
    depth: NotNegative[int | None] = None
    """Number of transformer blocks; none: half as many as the text tower, rounded up."""
    num_heads: Positive[int | None] = None
    """Attention heads; must divide width; none: as the text tower."""
    mlp_dim: Positive[int | None] = None
    """Hidden channels of the MLP; none: as the text tower."""

    def like(self, text: TransformerConfig) -> "CaptionDecoderConfig":
        """Return the options with those that are not set taken from the text tower's."""
        sizes = {name: getattr(text, name) for name in ("width", "num_heads", "mlp_dim")}
        sizes["depth"] = (text.depth + 1) // 2
        return replace(self, **{name: size for name, size in sizes.items() if getattr(self, name) is None})


class Attended(NamedTuple):
    """What the positions of captions attend to."""

    positions: torch.Tensor
    """Those of the same caption, bool (B · K, 1, L, L), True where a row attends to a column."""
    image: torch.Tensor
    """Patch tokens (B, N, D)."""
    own: torch.Tensor | None = None
    """Which of those are no padding, bool (B, 1, 1, N); None: all."""


class DecoderBlock(Block):
    """x + attention(norm(x)), then x + attention from norm(x) to the image, then x + mlp(norm(x))."""

    def __init__(self, options: TransformerConfig):
        super().__init__(options)
        self.image_norm = nn.LayerNorm(options.width, eps=options.norm_eps)
        self.image_attention = Attention(options.width, options.num_heads, options.dropout)

    def through(self, x: torch.Tensor, is_causal: bool, extent: Attended) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), extent=extent.positions))
        x = x + self.dropout(self._from_image(x, self.image_attention.keys_values(extent.image), extent.own))
        return x + self.mlp(self.norm2(x))

    def go_on(
        self, x: torch.Tensor, image: KeysValues, past: KeysValues | None, own: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, KeysValues]:
        """What `through` gives of the positions after those of `past`, without dropout, and the past with them.

        Args:
            x: (B · K, M, D); M is 1 where there is a past. image: what `image_attention` keeps of the B images.
            own: which of their tokens are no padding, as in `Attended`.
        """
        normed = self.norm1(x)
        told = self.attention.keys_values(normed)
        if past is not None:
            told = tuple(torch.cat(parts, dim=1) for parts in zip(past, told, strict=True))
        x = x + self.attention.attend(self.attention.queries(normed), *told, is_causal=x.shape[1] > 1)
        x = x + self._from_image(x, image, own)
        return x + self.mlp(self.norm2(x)), told

    def _from_image(self, x: torch.Tensor, image: KeysValues, own: torch.Tensor | None = None) -> torch.Tensor:
        # All captions of an image are one row of queries: its keys and values need no copy for each.
        queries = self.image_attention.queries(self.image_norm(x).view(len(image[0]), -1, x.shape[-1]))
        return self.image_attention.attend(queries, *image, extent=own).view_as(x)


class CaptionDecoder(nn.Module):
    """Patch tokens of images and their captions to the loss of predicting these.

    The token embedding is the decoder's own and also its output layer; the text tower's is another one, so that a run
    without a text tower has the same decoder. Captions begin with a learned vector, whatever the tokenizer begins
    them with.

    Args:
        config: with all sizes set, see `like`. image_width: of the patch tokens; another one than the decoder's is
            projected. context_length: of the tokenizer. bos_id: what each of its rows begins with, None for nothing.
    """

    def __init__(
        self,
        config: CaptionDecoderConfig,
        image_width: int,
        *,
        vocab_size: int,
        context_length: int,
        eos_id: int,
        bos_id: int | None = None,
        init: InitStyle = "siglip",
    ):
        super().__init__()
        config.check()
        self.config, self.eos_id, self.bos_id = config, eos_id, bos_id
        width = config.width
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Parameter(torch.zeros(context_length - (bos_id is not None), width))
        self.start, self.mask = (nn.Parameter(torch.empty(width)) for _ in range(2))
        self.image_projection = Linear(image_width, width) if image_width != width else nn.Identity()
        self.transformer = Transformer(config, block=DecoderBlock)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        initialise_blocks(self, init)
        initialise_token_inputs(self, init)
        for vector in (self.start, self.mask):
            nn.init.normal_(vector, std=width**-0.5)
        if image_width != width:
            nn.init.xavier_uniform_(self.image_projection.weight)
            nn.init.zeros_(self.image_projection.bias)

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest caption, its end included."""
        return len(self.position_embedding)

    def ids(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return a tokenizer's rows (B, context_length), or shorter ones, as the ids that are predicted, (B, L)."""
        ids = tokens if self.bos_id is None else tokens[:, 1:]
        if ids.shape[1] > self.max_tokens:
            raise UserError(f"{ids.shape[1]} tokens per caption, but the decoder's captions have {self.max_tokens}")
        return ids

    def weights(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the part of each of the ids (B, L) in its caption's loss, (B, l) float32; none of those left out.

        A caption is told up to and including its first end-of-text token. Call it before the ids are on a GPU, which
        would be waited for.
        """
        counted = before_end(ids, self.eos_id)
        # So that the same sizes come again.
        longest = min(ids.shape[1], -(-int(counted.sum(dim=1).amax()) // 8) * 8)
        return (counted / counted.sum(dim=1, keepdim=True))[:, :longest]

    def loss(
        self,
        image: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        parallel: torch.Tensor,
        hidden: torch.Tensor | None = None,
        own: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the mean over captions of the mean cross entropy of their tokens, a scalar (CapPa, section 3).

        Args:
            image: (B, N, D) patch tokens, not pooled. ids: (B · K, L). weights: theirs, (B · K, l).
            parallel: bool (B · K,): captions predicted all at once. hidden, own: see `forward`.
        """
        states, length = self(image, ids, parallel, hidden, own), weights.shape[1]
        states, ids, weights = states[:, :length].flatten(0, 1), ids[:, :length].flatten(), weights.flatten()
        # A GPU would be waited for, and the fake tensors that contrastive plan counts have no content.
        if weights.device.type == "cpu" and type(weights) is torch.Tensor:
            told = weights.nonzero()[:, 0]
            # To a multiple of about a sixteenth of their number: see TextTower.pack.
            extra = -len(told) % max(1, 2 ** (len(told).bit_length() - 5))
            weights = F.pad(weights[told], (0, extra))
            told = F.pad(told, (0, extra))
            states, ids = states[told], ids[told]
        losses = token_losses(states, self.token_embedding.weight, ids)
        return (losses * weights).sum() / len(parallel)

    def forward(
        self,
        image: torch.Tensor,
        ids: torch.Tensor,
        parallel: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        own: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the states (B · K, L, D) that tell each of the ids (B · K, L), see `logits`.

        A state sees the image and the ids before its own, but for those where `hidden`, (B · K, L) bool; where
        `parallel`, (B · K,) bool, the image alone. Of the image it sees those tokens that are its
        `own`, (B, N) bool, or all.
        """
        x = self.inputs(ids)
        if hidden is not None:  # an id enters one place later
            x = torch.cat([x[:, :1], torch.where(hidden[:, :-1, None], self.mask, x[:, 1:])], dim=1)
        position = torch.arange(ids.shape[1], device=ids.device)
        attended = (position <= position[:, None])[None, None]
        if parallel is not None:
            x = torch.where(parallel[:, None, None], self.mask, x)
            attended = attended | parallel[:, None, None, None]
        x = x + self.position_embedding[: ids.shape[1]]
        own = None if own is None else own[:, None, None]
        return self.norm(self.transformer(x, Attended(attended, self.image_projection(image), own)))

    def inputs(self, ids: torch.Tensor) -> torch.Tensor:
        """Return what enters for each of the ids (B, L), without positions: the one before it, (B, L, D)."""
        start = self.start.expand(len(ids), 1, -1)
        return torch.cat([start, self.token_embedding(ids[:, :-1])], dim=1)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """(..., D) to (..., V)."""
        return F.linear(states, self.token_embedding.weight)


def before_end(ids: torch.Tensor, eos_id: int) -> torch.Tensor:
    """Return which ids (B, L) come before the first end-of-text token or are it, bool; all where there is none."""
    ends = (ids == eos_id).int()
    return ends.cumsum(dim=1) - ends == 0


def token_losses(states: torch.Tensor, embedding: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return −log softmax(states · embeddingᵀ)[target] of each token, (T,), in float32 at least.

    Logits exist for a chunk of the tokens at a time, and are computed again for the gradients. Their product is taken
    in the precision of autocast, where that is on, and all else in float32 at least.

    Args:
        states: (T, D). embedding: (V, D), a row for each id. targets: (T,) int64.
    """
    device = states.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
    return _TokenLosses.apply(states, embedding, targets, torch.float64 if states.dtype == torch.float64 else kind)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, embedding, targets, kind):
        with torch.autocast(states.device.type, enabled=False):
            rows, matrix = states.to(kind), embedding.to(kind)
            parts = [
                (logits.logsumexp(1), logits.gather(1, targets[part, None])[:, 0])
                for part, logits in _chunks(rows, matrix)
            ]
        normalisers, own = (torch.cat(each) for each in zip(*parts, strict=True))
        ctx.save_for_backward(states, embedding, targets, normalisers)
        ctx.kind = kind
        return normalisers - own

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        states, embedding, targets, normalisers = ctx.saved_tensors
        for_states, for_embedding, *_ = ctx.needs_input_grad
        rows, matrix = states.to(ctx.kind), embedding.to(ctx.kind)
        states_grad = torch.empty_like(states) if for_states else None
        # In float32, as it is a sum over all tokens.
        sums = torch.zeros_like(embedding, dtype=normalisers.dtype) if for_embedding else None
        for part, logits in _chunks(rows, matrix):
            g = logits.sub_(normalisers[part, None]).exp_()  # softmax
            g[torch.arange(len(g), device=g.device), targets[part]] -= 1
            g = g.mul_(upstream[part, None]).to(ctx.kind)
            if for_states:
                states_grad[part] = _product(g, matrix.T).to(states.dtype)
            if for_embedding:
                sums += _product(g.T, rows[part].T)
        return states_grad, None if sums is None else sums.to(embedding.dtype), None, None


def _chunks(rows: torch.Tensor, matrix: torch.Tensor):
    """Yield (slice, its logits in float32 at least) over all rows; there is one chunk of none where there are none."""
    most = max(1, (CPU_LOGITS if rows.device.type == "cpu" else GPU_LOGITS) // len(matrix))
    for start in range(0, max(1, len(rows)), most):
        part = slice(start, start + most)
        logits = _product(rows[part], matrix)
        yield part, logits.to(torch.promote_types(logits.dtype, torch.float32))


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x · weightᵀ."""
    by_onednn = products.ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32
    return products.product(x, weight) if by_onednn else F.linear(x, weight)
