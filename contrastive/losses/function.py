"""A loss whose gradients are known once it is: computed together in the forward pass, scaled in the backward pass.

Import it when a loss is called: `torch.compiler.disable` takes a second to load.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch.autograd.function import once_differentiable

from contrastive.losses.base import Duplicates
from contrastive.losses.checks import check_inputs
from contrastive.losses.sweep import Gradient, Labels, row_products

Sweep = Callable[..., tuple[torch.Tensor, Gradient]]


@torch.compiler.disable  # to compile it would be to retrace, for every batch size, what is matrix products already
def swept_loss(
    sweep: Sweep,
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor | None,
    caption_ids: torch.Tensor | None,
    duplicates: Duplicates,
) -> torch.Tensor:
    """Return this rank's share of a loss as a scalar that autograd can differentiate once.

    Args:
        sweep: called as sweep(image, text, scale, bias, labels=Labels, wants=(bool, bool)); see `Gradient`.
        The others are those of `SigmoidLoss`, which also says what is raised.
    """
    scalars = {"logit_scale": logit_scale}
    if logit_bias is not None:
        scalars["logit_bias"] = logit_bias
    features = {"image_features": image_features, "text_features": text_features}
    needs = tuple(
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (image_features, text_features, logit_scale, logit_bias)
    )
    check_inputs(features, scalars, caption_ids, duplicates, needs)
    sweep = partial(sweep, labels=Labels.of(duplicates, caption_ids, len(image_features)))
    scale, bias = (None if scalar is None else scalar.reshape(()) for scalar in (logit_scale, logit_bias))
    product_type = _product_type(image_features, text_features)
    with torch.autocast(image_features.device.type, enabled=False):
        return _SweptLoss.apply(image_features, text_features, scale, bias, sweep, product_type, needs)


class _SweptLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, scale, bias, sweep, product_type, needs):
        wants = needs[:2]
        if not any(wants) and any(needs[2:]):
            wants = True, False  # the scalars' gradients are by-products of either
        x, y = (features.to(product_type).contiguous() for features in (image, text))
        exact = torch.promote_types(product_type, torch.float32)
        scalars = [None if scalar is None else scalar.detach().to(exact) for scalar in (scale, bias)]
        loss, sums = sweep(x, y, *scalars, wants=wants)
        # ∂L/∂scale = Σ G·(x·yᵀ), which either features' gradient already holds: Σ x·(G·y) = Σ y·(Gᵀ·x).
        scale_sum = None
        if any(wants):
            scale_sum = (row_products(x, sums.image) if wants[0] else row_products(y, sums.text)).sum()
        kept = [_kept(sums.image, image) if needs[0] else None]
        sums.image = None  # freed before the text's is converted
        kept.append(_kept(sums.text, text) if needs[1] else None)
        ctx.save_for_backward(*kept, scalars[0], scale_sum, sums.bias)
        ctx.types = image.dtype, text.dtype
        ctx.batch = len(image)
        return (loss / ctx.batch).to(exact)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        image_sum, text_sum, scale, scale_sum, bias_sum = ctx.saved_tensors
        factor = upstream * (scale / ctx.batch)
        in_place = not _graph_is_kept()
        image_grad = _scaled(image_sum, factor, ctx.types[0], in_place) if ctx.needs_input_grad[0] else None
        text_grad = _scaled(text_sum, factor, ctx.types[1], in_place) if ctx.needs_input_grad[1] else None
        share = upstream / ctx.batch
        scale_grad = (share * scale_sum).to(scale.dtype) if ctx.needs_input_grad[2] else None
        bias_grad = (share * bias_sum).to(scale.dtype) if ctx.needs_input_grad[3] else None
        return image_grad, text_grad, scale_grad, bias_grad, None, None, None


def _product_type(image: torch.Tensor, text: torch.Tensor) -> torch.dtype:
    """Return what the matrix products take: bfloat16 on a GPU for such features or under such autocast.

    They gather in float32 all the same. Everything else is raised to float32 at least: a CPU gains nothing from
    bfloat16 here, and float16 has no room for the small gradients of many negatives.
    """
    kind = torch.promote_types(image.dtype, text.dtype)
    device = image.device.type
    under_bf16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    if device == "cuda" and (kind == torch.bfloat16 or (under_bf16 and kind == torch.float32)):
        return torch.bfloat16
    return torch.promote_types(kind, torch.float32)


def _kept(total: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Keep a gradient in the features' type, but float16's in float32: GradScaler has not scaled it yet."""
    return total if features.dtype == torch.float16 else total.to(features.dtype)


def _scaled(total: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype, in_place: bool) -> torch.Tensor:
    scaled = total.mul_(factor) if in_place else total * factor
    return scaled.to(dtype)


def _graph_is_kept() -> bool:
    """Whether this backward pass leaves the graph for another one, which needs what is saved unchanged.

    torch tells only through a private name; without it, assume so, which costs a copy of the gradients.
    """
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    return ask()
