"""An output layer over a large vocabulary and its cross entropy as one, lest all the logits exist at once.

T tokens, V vocabulary, D width.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from contrastive import products

CPU_LOGITS = 2**22
"""Logits of a chunk: 16 MiB of float32, which a cache nearly holds."""
GPU_LOGITS = 2**27
"""512 MiB of float32: 512 tokens against 256k, enough for the product's full rate."""


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
