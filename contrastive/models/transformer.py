"""The pre-norm transformer that both towers share."""

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
    """A stack of blocks: (B, N, D) to (B, N, D). `gradient_checkpointing` recomputes each block in backward."""

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
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, self.is_causal, use_reentrant=False)
            else:
                x = block(x, self.is_causal)
        return x
