"""The types of options: what fits one, and what it is called."""

import re
import types
import typing
from typing import Any


def accepts(annotation: Any, value: Any) -> bool:
    """Whether a YAML value has the option's type. tyro itself would take a wrongly typed default."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(accepts(option, value) for option in inner)
    if origin is typing.Literal:
        return value in inner
    if origin is tuple:
        if not isinstance(value, list):
            return False
        wanted = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        return len(wanted) == len(value) and all(map(accepts, wanted, value))
    if annotation is types.NoneType:
        return value is None
    if annotation is float:  # YAML reads 1e-3, without a point, as text
        text = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
        return bool(text) or (isinstance(value, (int, float)) and not isinstance(value, bool))
    return type(value) is annotation


def type_name(annotation: Any) -> str:
    """int, 'float or none', 'one of gelu, quick_gelu', 'float float': what to write, in words."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(type_name, inner))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is tuple:
        return f"a list of {type_name(inner[0])}" if inner[-1] is Ellipsis else f"{len(inner)} values"
    return "none" if annotation is types.NoneType else annotation.__name__
