"""What timm's `head` is: the projection into an embedding space, or a classifier."""

from collections.abc import Mapping
from typing import Literal

import torch

KEY = "contrastive_head"
PROJECTION = "image_tower.projection.weight"
Head = Literal["none", "projection", "classifier"]


def head_kind(description: Mapping, num_classes: int, weights: Mapping[str, torch.Tensor]) -> Head:
    """Return what the head of a model is.

    Our own folders say so in config.json, under a key that timm passes over. For others, a head whose bias is zero
    throughout is a projection, as timm keeps those of CLIP, unless `label_names` name its rows.
    """
    if num_classes == 0:
        return "none"
    if KEY in description:
        return description[KEY]
    names = description.get("label_names") or description.get("pretrained_cfg", {}).get("label_names")
    zero = {"head.weight", "head.bias"} <= weights.keys() and not weights["head.bias"].any()
    return "projection" if zero and not names else "classifier"
