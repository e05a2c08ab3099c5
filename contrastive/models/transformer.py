"""The pre-norm transformer that both towers share, and its parts. B batch, N tokens, D width, H heads."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from contrastive import products
from contrastive.errors import UserError
from contrastive.models.packing import Segments, attend, attend_within
from contrastive.option_types import NotNegative, Positive, Probability, check_bounds
from contrastive.products import product

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]


class QuickGELU(nn.Module):
    """x·σ(1.702x): the GELU approximation of OpenAI's CLIP weights."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


# Far above every model that there is: what a file says is not built whatever it takes.
MOST = {
    "width": 2**16,
    "depth": 2**10,
    "mlp_dim": 2**20,
    "image_size": 2**14,
    "vocab_size": 2**24,
    "context_length": 2**16,
}
ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "quick_gelu": QuickGELU,
}


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The options of a tower's blocks. The defaults are those of SigLIP's B/16."""

    SECTION = ""  # what their names begin with in a configuration, for messages

    width: Positive[int] = 768
    """Channels of every token."""
    depth: NotNegative[int] = 12
    """Number of transformer blocks."""
    num_heads: Positive[int] = 12
    """Attention heads; must divide width."""
    mlp_dim: Positive[int] = 3072
    """Hidden channels of the MLP."""
    activation: Activation = "gelu_tanh"
    """Activation of the MLP."""
    norm_eps: float = 1e-6
    """Epsilon of every LayerNorm."""
    dropout: Probability[float] = 0.0
    """Dropout probability after attention and MLP, and on attention weights."""

    def check(self) -> None:
        """Raise UserError when the options contradict each other, or are of no model that there could be."""
        check_bounds(self, f"{self.SECTION}.")
        for name, most in MOST.items():
            if (getattr(self, name, None) or 0) > most:
                raise UserError(f"{self.SECTION}.{name} {getattr(self, name):,} is more than the most, {most:,}")
        if self.width % self.num_heads:
            own = self.SECTION
            raise UserError(f"{own}.width {self.width} is not a multiple of {own}.num_heads {self.num_heads}")


class Linear(nn.Linear):
    """nn.Linear whose float32 products on a CPU, forward and backward, are oneDNN's where those are faster."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain = (
            not products.ONEDNN
            or x.device.type != "cpu"
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_exporting()
        )
        if plain or not x.dtype == self.weight.dtype == torch.float32:
            return super().forward(x)
        return _OneDNNLinear.apply(x, self.weight, self.bias)


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows, grads = x.flatten(0, -2), grad.flatten(0, -2)
        return (
            product(grad, weight.t()) if for_x else None,
            product(grads.t(), rows.t()) if for_weight else None,
            grads.sum(0) if for_bias else None,
        )


Extent = Segments | torch.Tensor | None
"""What attention stays within: the segments of packed tokens (T, D); or of (B, N, D) the tokens that are attended to,
True in a bool tensor that broadcasts to (B, H, M, N); None: all of them."""


class Attention(nn.Module):
    """Scaled dot-product attention with H heads (Vaswani et al. 2017, section 3.2.2).

    Queries, keys, values and output are separate Linear layers, so that LoRA and weight import reach each.
    No causal mask is ever materialised: `is_causal` keeps flash kernels eligible.
    """

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.out_proj = Linear(width, width)

    def forward(
        self, x: torch.Tensor, query: torch.Tensor | None = None, is_causal: bool = False, extent: Extent = None
    ) -> torch.Tensor:
        """Attend from `query` (B, M, D), or from x itself, to x (B, N, D). Returns (B, M, D).

        With segments as `extent`, x is (T, D) and so is what is returned; or `query` is one of each segment, (S, D).
        """
        query = x if query is None else query
        return self.attend(self.queries(query), *self.keys_values(x), is_causal, extent)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """(B, M, D) to (B, M, H, D/H); packed (T, D) to (T, H, D/H)."""
        return self.q_proj(x).unflatten(-1, (self.num_heads, -1))

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What can be attended to of x, of the shapes of `queries`: who decodes token by token keeps it."""
        return tuple(projection(x).unflatten(-1, (self.num_heads, -1)) for projection in (self.k_proj, self.v_proj))

    def attend(self, q, k, v, is_causal: bool = False, extent: Extent = None) -> torch.Tensor:
        """Attend from `queries` to `keys_values`: to what `forward` returns."""
        dropout = self.dropout if self.training else 0.0
        if isinstance(extent, Segments):
            attended = attend_within(q, k, v, extent, dropout, is_causal)
        else:
            attended = attend(q, k, v, dropout, is_causal, mask=extent)
        return self.out_proj(attended.flatten(-2))


class MLP(nn.Module):
    """Linear, activation, Linear: (B, N, D) to (B, N, D)."""

    def __init__(self, width: int, mlp_dim: int, activation: Activation, dropout: float = 0.0):
        super().__init__()
        self.fc1 = Linear(width, mlp_dim)
        self.activation = ACTIVATIONS[activation]()
        self.fc2 = Linear(mlp_dim, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.fc2(self.dropout(self.activation(self.fc1(x)))))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (ViT, equations 2 and 3)."""

    def __init__(self, options: TransformerConfig):
        super().__init__()
        width, dropout = options.width, options.dropout
        self.norm1 = nn.LayerNorm(width, eps=options.norm_eps)
        self.attention = Attention(width, options.num_heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=options.norm_eps)
        self.mlp = MLP(width, options.mlp_dim, options.activation, dropout)
        self.dropout = nn.Dropout(dropout)
        self.compiled: Callable | None = None  # `through`, for training

    def forward(self, x: torch.Tensor, is_causal: bool = False, extent: Extent = None) -> torch.Tensor:
        # Not the module itself is compiled: what FSDP hangs on it has to run.
        run = type(self).through if self.compiled is None or not self.training else self.compiled
        return run(self, x, is_causal, extent)

    def through(self, x: torch.Tensor, is_causal: bool, extent: Extent) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), is_causal=is_causal, extent=extent))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A stack of blocks: (B, N, D) to (B, N, D), or packed (T, D) to (T, D) with their `extent`.

    block: their kind; another one than Block may take an `extent` of its own kind.
    gradient_checkpointing: the share of the blocks, rounded up, the first of them, that are recomputed in backward
    wherever gradients are recorded; settable, 0 by default: less memory, about a third more time with 1.
    mean_squares: where it is a list, each pass appends those of what leaves each block, scalars in float32, fillers not
    counted, and of how many tokens each is the mean.
    """

    def __init__(self, options: TransformerConfig, is_causal: bool = False, block: type[Block] = Block):
        super().__init__()
        self.is_causal, self.kind = is_causal, block
        self.gradient_checkpointing = 0.0
        self.mean_squares: list[tuple[torch.Tensor, int]] | None = None
        self.blocks = nn.ModuleList(block(options) for _ in range(options.depth))

    def forward(self, x: torch.Tensor, extent: Extent = None) -> torch.Tensor:
        for number in range(len(self.blocks)):
            x = self._through(number, x, extent)
            if self.mean_squares is not None:
                own = (x[extent.fillers :] if isinstance(extent, Segments) else x).detach()
                self.mean_squares.append((own.float().square().mean(), own.shape[:-1].numel()))
        return x

    def states(self, x: torch.Tensor, wanted: Collection[int], extent: Extent = None) -> dict[int, torch.Tensor]:
        """Run all blocks and keep the tokens with these numbers: 0 is x itself, k what leaves block k."""
        kept = {0: x} if 0 in wanted else {}
        for number in range(len(self.blocks)):
            x = self._through(number, x, extent)
            if number + 1 in wanted:
                kept[number + 1] = x
        return kept

    def compile_blocks(self) -> None:
        """Run the blocks compiled in training, all by one code; in evaluation, whose batches have other sizes, plainly.

        The weights keep their names. Dropout draws what it draws uncompiled, so that it can be replayed.
        """
        compiled = torch.compile(self.kind.through, options={"fallback_random": True})
        for block in self.blocks:
            block.compiled = compiled

    def _through(self, number: int, x: torch.Tensor, extent: Extent = None) -> torch.Tensor:
        block = self.blocks[number]
        if number < math.ceil(self.gradient_checkpointing * len(self.blocks)) and torch.is_grad_enabled():
            return checkpoint(block, x, self.is_causal, extent, use_reentrant=False)
        return block(x, self.is_causal, extent)


class AttentionPooling(nn.Module):
    """Multi-head attention pooling: one learned probe attends to all tokens, then a residual MLP.

    (B, N, D) to (B, D), or packed (T, D) to one of each segment, (S, D), with their `extent`. Source: Zhai et al. 2022,
    "Scaling Vision Transformers"; SigLIP's MAP head.
    """

    def __init__(self, options: TransformerConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, options.width))
        self.attention = Attention(options.width, options.num_heads)
        self.norm = nn.LayerNorm(options.width, eps=options.norm_eps)
        self.mlp = MLP(options.width, options.mlp_dim, options.activation)

    def forward(self, x: torch.Tensor, extent: Extent = None) -> torch.Tensor:
        probe = self.probe.to(x.dtype)
        if isinstance(extent, Segments):
            query = probe[0].expand(len(extent.boundaries) - 1, -1)
        else:
            query = probe.expand(x.shape[0], -1, -1)
        pooled = self.attention(x, query=query, extent=extent)
        pooled = pooled + self.mlp(self.norm(pooled))
        return pooled if isinstance(extent, Segments) else pooled[:, 0]
