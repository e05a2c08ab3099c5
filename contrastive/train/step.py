"""One optimizer step's loss and gradients: embed both towers, one loss over the global batch, backward."""

import hashlib
from contextlib import nullcontext

import torch
from torch import nn

from contrastive.distributed.runtime import Runtime
from contrastive.models import Features


def seed_step(seed: int, step: int, rank: int, part: int = 0) -> None:
    """Make dropout and patch dropout a function of where we are, so that no random state needs saving."""
    place = f"{seed} {step} {rank} {part}".encode()
    torch.manual_seed(int.from_bytes(hashlib.blake2b(place, digest_size=7).digest()))


def forward_backward(
    model: nn.Module,
    loss: nn.Module,
    pixels: torch.Tensor,
    tokens: torch.Tensor,
    caption_ids: torch.Tensor,
    *,
    accumulate: int,
    seed: tuple[int, int],
    runtime: Runtime,
) -> torch.Tensor:
    """Add the gradient of the loss over the global batch; return this rank's loss, a detached scalar.

    Args:
        model: the wrapped dual encoder. pixels: (b, 3, H, W) normalised. tokens: (b, L). caption_ids: (b,).
        accumulate: number of micro-batches that the local batch b is embedded in; must divide b.
        seed: (run seed, step), for dropout.
    """
    if accumulate > 1:
        return _accumulated(model, loss, pixels, tokens, caption_ids, accumulate, seed, runtime)
    seed_step(*seed, runtime.rank)
    value = loss(*model(pixels, tokens), caption_ids=caption_ids)
    value.backward()
    return value.detach()


def _accumulated(model, loss, pixels, tokens, caption_ids, accumulate, seed, runtime) -> torch.Tensor:
    """The same loss and gradient with the activations of one micro-batch at a time.

    A contrastive loss is not a sum over micro-batches: all are embedded first without a graph, the loss of
    the whole batch gives each feature its gradient, and each micro-batch is embedded again, with the same
    random numbers, to carry it into the towers (Gao et al. 2021, "GradCache").
    """
    parts = list(zip(pixels.chunk(accumulate), tokens.chunk(accumulate), strict=True))

    def embed(part: int) -> Features:
        seed_step(*seed, runtime.rank, part)
        return model(*parts[part])

    with torch.no_grad():
        cached = [embed(part) for part in range(accumulate)]
    image, text = (torch.cat([part[i] for part in cached]).requires_grad_() for i in (0, 1))
    logits = [None if scalar is None else scalar.detach().clone().requires_grad_() for scalar in cached[0][2:]]
    value = loss(image, text, *logits, caption_ids=caption_ids)
    value.backward()

    image_grads, text_grads = image.grad.chunk(accumulate), text.grad.chunk(accumulate)
    for part in range(accumulate):
        is_last = part == accumulate - 1
        with nullcontext() if is_last else runtime.without_gradient_sync(model):
            features = embed(part)
            # Its gradient is the loss's: features times the gradients they were given.
            surrogate = (features.image * image_grads[part]).sum() + (features.text * text_grads[part]).sum()
            for scalar, leaf in zip(features[2:], logits, strict=True):
                if scalar is not None:  # in shares, because under DDP every pass must reach every parameter
                    surrogate = surrogate + scalar * leaf.grad / accumulate
            surrogate.backward()
    return value.detach()
