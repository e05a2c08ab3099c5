"""Whether an option of another library's config is of the kind that it has to be: JSON holds anything."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contrastive.errors import UserError


def is_count(value: object) -> bool:
    """Whether it is a whole number above 0."""
    return type(value) is int and value > 0


def is_number(value: object) -> bool:
    """Whether it is a finite number; true and false are none."""
    return type(value) in (int, float) and math.isfinite(value)


def is_like(value: Any, example: Any) -> bool:
    """Whether both are of one kind: a float may be a whole number, true and false are no numbers."""
    if isinstance(example, float):
        return type(value) in (int, float)
    if isinstance(example, Mapping):
        return isinstance(value, Mapping)
    return type(value) is type(example)


def check_like(name: str, value: Any, example: Any, where: Path) -> None:
    """Raise UserError, which names the option, where a value is of another kind than the example."""
    if not is_like(value, example):
        raise unlike(name, value, example, where)


def unlike(name: str, value: Any, example: Any, where: Path) -> UserError:
    """The error about an option of a wrong kind."""
    wanted = "an object with options" if isinstance(example, Mapping) else f"like {example!r}"
    return UserError(f"{where}: {name} is {value!r}; it has to be {wanted}")


def per_channel(name: str, value: Any, where: Path) -> tuple[float, float, float]:
    """Return a number, or a list of one or three of them, as one for each of three channels; UserError for another."""
    values = value if isinstance(value, (list, tuple)) else [value]
    if len(values) not in (1, 3) or not all(is_like(one, 0.0) for one in values):
        raise UserError(f"{where}: {name} is {value!r}; it has to be three numbers, one for each channel")
    return tuple(values) * (3 // len(values))
