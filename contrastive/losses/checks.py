"""Input of a loss looked at before any collective, so that what is wrong is said by all ranks and none hangs."""

from typing import Literal, get_args

import torch

from contrastive.distributed.collectives import gather_integers, rank, world_size

Duplicates = Literal["negative", "ignore", "positive"]

_NAMES = ("image_features", "text_features", "logit_scale", "logit_bias")
_FINE, _REFUSED, _NOT_FINITE = range(3)  # and on: which of _NAMES it is


class NonFiniteFeatures(ValueError):
    """A feature, scale or bias is NaN or infinite: a step to skip, rather than a mistake in the call."""

    def __init__(self, name: str, rank: int, detail: str = "values"):
        super().__init__(f"{name} on rank {rank} has {detail} that are NaN or infinite")
        self.name = name


def checked_duplicates(value: str) -> Duplicates:
    """Return `value` if it says what to do with equal captions; raise ValueError otherwise."""
    if value not in get_args(Duplicates):
        raise ValueError(f"duplicates='{value}': choose negative, ignore or positive")
    return value


def as_scalar(value: torch.Tensor | float | None, features: torch.Tensor) -> torch.Tensor | None:
    """Return a plain number as a tensor without gradient where the features are; tensors and None as they are."""
    if value is None or isinstance(value, torch.Tensor):
        return value
    try:
        exact = torch.promote_types(features.dtype, torch.float32)
        return torch.tensor(float(value), dtype=exact, device=features.device)
    except (TypeError, ValueError):  # said by check_inputs, on all ranks
        return torch.empty(0, device=features.device)


def check_inputs(
    features: dict[str, torch.Tensor],
    scalars: dict[str, torch.Tensor],
    caption_ids: torch.Tensor | None,
    duplicates: str,
    needs: tuple[bool, ...],
) -> None:
    """Raise the same kind of error on all ranks if any rank's input is bad.

    Args:
        features: image_features and text_features, floating (B/W, E) of one shape; or K texts each, see
            `PairLoss.forward`. scalars: logit_scale and, if
            any, logit_bias, 0-dim. caption_ids: (B/W,) int64, needed unless duplicates is `negative`.
        needs: whether gradients of image_features, text_features, logit_scale and logit_bias are wanted.

    Raises:
        NonFiniteFeatures: NaN or infinity, on a CPU only: looking would make the host wait for a GPU. There the
            loss becomes NaN.
        ValueError: shapes, types or devices disagree, here or between ranks.
    """
    error = _refusal(features, scalars, caption_ids, duplicates) or _non_finite({**features, **scalars})
    if world_size() > 1:
        _agree(error, features, needs)
    if error is not None:
        raise error


def _refusal(features, scalars, caption_ids, duplicates) -> ValueError | None:
    image, text = features.values()
    shapes = f"image_features {tuple(image.shape)}, text_features {tuple(text.shape)}"
    several = duplicates == "positive" and image.ndim == text.ndim == 2 and len(image) and not len(text) % len(image)
    fit = image.shape[1:] == text.shape[1:] if several else image.shape == text.shape
    if image.ndim != 2 or not fit or not text.numel():
        return ValueError(f"features must be two non-empty matrices (B, E) of one shape, got {shapes}")
    if not (image.is_floating_point() and text.is_floating_point()):
        return ValueError(f"features must be floating point, got {image.dtype} and {text.dtype}")
    for name, tensor in {**features, **scalars}.items():
        if tensor.device != image.device:
            return ValueError(f"{name} is on {tensor.device}, image_features on {image.device}; move one")
    for name, scalar in scalars.items():
        if scalar.numel() != 1:
            return ValueError(f"{name} must be one number, got shape {tuple(scalar.shape)}")
    if duplicates == "negative":
        return None
    if caption_ids is None:
        return ValueError(f"duplicates='{duplicates}' needs caption_ids")
    if caption_ids.shape != image.shape[:1] or caption_ids.dtype != torch.int64 or caption_ids.device != image.device:
        return ValueError(
            f"caption_ids must be int64 {tuple(image.shape[:1])} on {image.device}, "
            f"got {caption_ids.dtype} {tuple(caption_ids.shape)} on {caption_ids.device}"
        )
    return None


def _non_finite(tensors: dict[str, torch.Tensor]) -> NonFiniteFeatures | None:
    for name, tensor in tensors.items():
        # The sum is a quick look: it is finite unless a value is not, or values are huge.
        if tensor.device.type != "cpu" or tensor.sum().isfinite() or tensor.isfinite().all():
            continue
        count = int((~tensor.isfinite()).sum())
        return NonFiniteFeatures(name, rank(), f"{count} of {tensor.numel()} values")
    return None


def _agree(error: ValueError | None, features: dict[str, torch.Tensor], needs: tuple[bool, ...]) -> None:
    """Let every rank know every rank's shapes and troubles; raise unless all can go on together."""
    state = _FINE if error is None else _REFUSED
    if isinstance(error, NonFiniteFeatures):
        state = _NOT_FINITE + _NAMES.index(error.name)
    image, text = features.values()
    rows, dim = (*image.shape, 0, 0)[:2]
    bits = image.element_size() * 8
    everyone = gather_integers([state, rows, dim, bits, text.numel(), *map(int, needs)])
    if error is not None:
        raise error
    for other, (state, *_) in enumerate(everyone):
        if state == _REFUSED:
            raise ValueError(f"rank {other} refused its input; its own message says why")
        if state >= _NOT_FINITE:
            raise NonFiniteFeatures(_NAMES[state - _NOT_FINITE], other)
    for other, (_, *traits) in enumerate(everyone):
        if traits != everyone[0][1:]:
            listed = ", ".join(f"rank {i} ({r}, {d}) {b} bit" for i, (_, r, d, b, *_) in enumerate(everyone))
            what = "shape or type" if traits[:4] != everyone[0][1:5] else "need of gradients"
            raise ValueError(
                f"features of rank {other} differ from rank 0's in {what}: {listed}; "
                "every rank needs the same local batch: drop the last, uneven one"
            )
