"""From a sequence of tokens to one vector."""

import torch
from torch import nn

from contrastive.models.attention import MLP, Activation, Attention


class AttentionPooling(nn.Module):
    """Multi-head attention pooling: one learned probe attends to all tokens, then a residual MLP.

    (B, N, D) to (B, D). Source: Zhai et al. 2022, "Scaling Vision Transformers"; SigLIP's MAP head.
    """

    def __init__(self, width: int, num_heads: int, mlp_dim: int, activation: Activation, norm_eps: float):
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, width))
        self.attention = Attention(width, num_heads)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, mlp_dim, activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self.attention(x, query=self.probe.to(x.dtype).expand(x.shape[0], -1, -1))
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]


def pool_eos(x: torch.Tensor, tokens: torch.Tensor, eos_id: int) -> torch.Tensor:
    """Return the token at the first end-of-text position: (B, N, D) and ids (B, N) to (B, D)."""
    position = (tokens == eos_id).int().argmax(dim=1)
    return x[torch.arange(x.shape[0], device=x.device), position]


def pool_average(x: torch.Tensor, tokens: torch.Tensor, pad_id: int) -> torch.Tensor:
    """Return the mean over positions that are not padding: (B, N, D) and ids (B, N) to (B, D)."""
    kept = (tokens != pad_id).unsqueeze(-1).to(x.dtype)
    return (x * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
