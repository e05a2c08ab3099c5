"""Whether an option of another library's config is of the kind that it has to be."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contrastive.errors import UserError


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
        wanted = "an object with options" if isinstance(example, Mapping) else f"like {example!r}"
        raise UserError(f"{where}: {name} is {value!r}; it has to be {wanted}")


def per_channel(name: str, value: Any, where: Path) -> tuple[float, float, float]:
    """Return a number, or a list of one or three of them, as one for each of three channels; UserError for another."""
    values = value if isinstance(value, (list, tuple)) else [value]
    if len(values) not in (1, 3) or not all(is_like(one, 0.0) for one in values):
        raise UserError(f"{where}: {name} is {value!r}; it has to be three numbers, one for each channel")
    return tuple(values) * (3 // len(values))
