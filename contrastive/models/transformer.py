"""The pre-norm transformer that both towers share."""

from collections.abc import Collection

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from contrastive.models.attention import MLP, Activation, Attention


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (ViT, equations 2 and 3)."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_dim: int,
        activation: Activation,
        norm_eps: float,
        dropout: float,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attention = Attention(width, num_heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, mlp_dim, activation, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, is_causal: bool = False) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), is_causal=is_causal))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A stack of blocks: (B, N, D) to (B, N, D).

    `gradient_checkpointing` recomputes each block in backward, wherever gradients are recorded.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        num_heads: int,
        mlp_dim: int,
        activation: Activation,
        norm_eps: float,
        dropout: float = 0.0,
        is_causal: bool = False,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        self.is_causal = is_causal
        self.gradient_checkpointing = gradient_checkpointing
        self.blocks = nn.ModuleList(
            Block(width, num_heads, mlp_dim, activation, norm_eps, dropout) for _ in range(depth)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = self._through(block, x)
        return x

    def states(self, x: torch.Tensor, wanted: Collection[int]) -> dict[int, torch.Tensor]:
        """Run all blocks and keep the tokens with these numbers: 0 is x itself, k what leaves block k."""
        kept = {0: x} if 0 in wanted else {}
        for number, block in enumerate(self.blocks, start=1):
            x = self._through(block, x)
            if number in wanted:
                kept[number] = x
        return kept

    def _through(self, block: Block, x: torch.Tensor) -> torch.Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, self.is_causal, use_reentrant=False)
        return block(x, self.is_causal)
