"""Multi-head attention and the transformer's two-layer MLP. B batch, N tokens, D width, H heads."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]


class QuickGELU(nn.Module):
    """x·σ(1.702x): the GELU approximation of OpenAI's CLIP weights."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "quick_gelu": QuickGELU,
}


class Attention(nn.Module):
    """Scaled dot-product attention with H heads (Vaswani et al. 2017, section 3.2.2).

    Queries, keys, values and output are separate Linear layers, so that LoRA and weight import reach each.
    No mask is ever materialised: causal attention uses `is_causal`, which keeps flash kernels eligible.
    """

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, query: torch.Tensor | None = None, is_causal: bool = False):
        """Attend from `query` (B, M, D), or from x itself, to x (B, N, D). Returns (B, M, D)."""
        query = x if query is None else query
        q, k, v = (
            projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, N, D/H)
            for projected in (self.q_proj(query), self.k_proj(x), self.v_proj(x))
        )
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=is_causal)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear, activation, Linear: (B, N, D) to (B, N, D)."""

    def __init__(self, width: int, mlp_dim: int, activation: Activation, dropout: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_dim)
        self.activation = ACTIVATIONS[activation]()
        self.fc2 = nn.Linear(mlp_dim, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.fc2(self.dropout(self.activation(self.fc1(x)))))
