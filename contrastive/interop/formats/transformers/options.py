"""What each option of a config.json may be: JSON holds anything, and a wrong type would fail deep inside a model."""

import math
from collections.abc import Mapping

from contrastive.errors import UserError

COUNTS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "num_patches",
    "vocab_size",
    "max_position_embeddings",
    "projection_dim",
)
OPTIONAL_COUNTS = ("projection_size",)


def is_count(value: object) -> bool:
    """Whether a value of a JSON file is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_number(value: object) -> bool:
    """Whether a value of a JSON file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_options(options: Mapping[str, object], where: str, is_image: bool) -> None:
    """Raise UserError, naming the option behind `where`, where a tower's option cannot be what it is."""
    for name in COUNTS + OPTIONAL_COUNTS:
        value = options.get(name)
        left_out = name not in options or (value is None and name in OPTIONAL_COUNTS)
        if not left_out and not is_count(value):
            raise UserError(f"{where}{name} is {value!r}: it has to be a whole number above 0")
    eps = options["layer_norm_eps"]
    if not is_number(eps) or eps < 0:
        raise UserError(f"{where}layer_norm_eps is {eps!r}: it has to be a number, 0 or more")
    if not isinstance(options["hidden_act"], str):
        raise UserError(f"{where}hidden_act is {options['hidden_act']!r}: it has to be the name of an activation")
    if is_image and not isinstance(options.get("vision_use_head", True), bool):
        raise UserError(f"{where}vision_use_head is {options['vision_use_head']!r}: it has to be true or false")
    if is_image and options.get("is_causal"):
        raise UserError(f"{where}is_causal is true: only images whose patches all attend to each other can be read")
