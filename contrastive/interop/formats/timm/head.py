"""What timm's `head` is: the projection into an embedding space, or a classifier."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch

from contrastive.errors import UserError
from contrastive.log import warn

KEY = "contrastive_head"
PROJECTION = "image_tower.projection.weight"
Head = Literal["none", "projection", "classifier"]


def head_kind(
    description: Mapping, num_classes: int, label_names: object, weights: Mapping[str, torch.Tensor], where: Path
) -> Head:
    """Return what the head of a model is.

    Our own folders say so in config.json, under a key that timm passes over. For others, a head whose bias is zero
    throughout is a projection, as timm keeps those of CLIP, unless `label_names` name its rows; a warning says so
    where the architecture is none of CLIP's.

    Args:
        description: config.json. where: that file, for messages.

    Raises:
        UserError: our key has a value that it cannot have here.
    """
    if KEY in description:
        kind = description[KEY]
        if kind not in get_args(Head) or (kind == "none") != (num_classes == 0):
            raise UserError(
                f"{where}: {KEY} {kind!r} with num_classes {num_classes}; without classes it has to be 'none', else "
                "'projection' or 'classifier'"
            )
        return kind
    if num_classes == 0:
        return "none"
    zero = {"head.weight", "head.bias"} <= weights.keys() and not weights["head.bias"].any()
    if label_names or not zero:
        return "classifier"
    if "clip" not in str(description.get("architecture")):
        warn(
            f"{where}: the bias of the head is zero, so its {num_classes:,} rows are taken for a projection into an "
            f'embedding space; for a classifier add "{KEY}": "classifier"'
        )
    return "projection"


def drop_zero_bias(weights: dict[str, torch.Tensor], name: str, where: Path, library: str) -> None:
    """Leave the bias of a projection out; UserError where it is not zero, since our projection has none."""
    bias = weights.pop(name, None)
    if bias is not None and bias.any():
        raise UserError(f"{where}: '{name}' is not zero, and our projection has no bias; {library} can load this model")
