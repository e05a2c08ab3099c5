"""Whether an option of another library's config is of the kind that it has to be: JSON holds anything."""

import math
from collections.abc import Callable, Mapping, Sequence

from contrastive.errors import UserError


def is_count(value: object) -> bool:
    """Whether it is a whole number above 0."""
    return type(value) is int and value > 0


def is_number(value: object) -> bool:
    """Whether it is a finite number; true and false are none."""
    return type(value) in (int, float) and math.isfinite(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_object(value: object) -> bool:
    return isinstance(value, Mapping)


def _is_per_channel(value: object) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return len(values) in (1, 3) and all(map(is_number, values))


# What an option has to be, in the words of the message.
KINDS: dict[str, Callable[[object], bool]] = {
    "a whole number above 0": is_count,
    "a number above 0": lambda value: is_number(value) and value > 0,
    "a number, 0 or more": lambda value: is_number(value) and value >= 0,
    "a number, or three of them": _is_per_channel,
    "three numbers, one for each channel": _is_per_channel,
    "true or false": lambda value: isinstance(value, bool),
    "an object of options": _is_object,
    "an object with options": _is_object,
    "a name": _is_text,
    "the name of an activation": _is_text,
    "the name of a class": _is_text,
    "like 'shortest'": _is_text,
    "a list of names of classes": lambda value: isinstance(value, list) and all(map(_is_text, value)),
}


def check_kind(name: str, value: object, kind: str, mark: str = ":") -> None:
    """Raise UserError where the option of this name is not of that one of KINDS; `mark` stands between both parts."""
    if not KINDS[kind](value):
        raise UserError(f"{name} is {value!r}{mark} it has to be {kind}")


def per_channel(value: float | Sequence[float]) -> tuple[float, ...]:
    """Return a number, or a list of one or three of them, as one for each of three channels."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(map(float, values)) * (3 // len(values))
