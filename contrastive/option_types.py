"""The types of options: what fits one, what it is called, and tyro, which reads flags by them."""

import contextlib
import dataclasses
import io
import re
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from contrastive.errors import UserError
from contrastive.words import flags_of

T = TypeVar("T")
_NAME_IN_BOX = (
    r"^\S? {5,6}(\S.*?) +\S?$"  # of an option that tyro misses; there is no box where the output is not UTF-8
)


@dataclasses.dataclass(frozen=True)
class Bound:
    """What the number of an option must be: `lr: Positive[float] = 1e-3`. None, an option left out, may always be."""

    words: str
    """What an error says: 'it must be above 0'."""
    holds: Callable[[float], bool]


Positive = Annotated[T, Bound("it must be above 0", lambda value: value > 0)]
NotNegative = Annotated[T, Bound("it must be at least 0", lambda value: value >= 0)]
Share = Annotated[T, Bound("it must be from 0 to 1", lambda value: 0 <= value <= 1)]
Probability = Annotated[T, Bound("it must be at least 0 and below 1", lambda value: 0 <= value < 1)]


def check_bounds(options: Any, prefix: str = "") -> None:
    """Raise UserError for a number outside its bound, in a dataclass or within it; `prefix` goes before the names."""
    for name, annotation in typing.get_type_hints(type(options), include_extras=True).items():
        value = getattr(options, name)
        if dataclasses.is_dataclass(value):
            check_bounds(value, f"{prefix}{name}.")
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        for part in filter(dataclasses.is_dataclass, value if isinstance(value, tuple) else ()):
            check_bounds(part, f"{prefix}{name}.")
        for bound in getattr(annotation, "__metadata__", ()):
            if isinstance(bound, Bound) and not all(map(bound.holds, numbers)):
                raise UserError(f"{prefix}{name} is {' '.join(map(str, numbers))}; {bound.words}")


def as_option(name: str, annotation: Any, value: Any) -> Any:
    """Return a YAML value as the option's own type: 3 and '1e-3' as floats, a list as a tuple.

    Raises:
        UserError: it is of another type; the message begins with `name`. tyro itself would take it.
    """
    try:
        return _read(annotation, value)
    except ValueError:
        raise UserError(f"{name} is {value!r}, expected {type_name(annotation)}") from None


def _read(annotation: Any, value: Any) -> Any:
    """Return the value as this type; ValueError where it is of another."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        for option in inner:
            with contextlib.suppress(ValueError):
                return _read(option, value)
    elif origin is tuple and isinstance(value, list):
        wanted = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(_read(kind, item) for kind, item in zip(wanted, value, strict=True))
    elif annotation is float:
        # YAML reads 1e-3, without a point, as text.
        exponent = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
        if exponent or type(value) in (int, float):
            return float(value)
    elif dataclasses.is_dataclass(annotation):
        return _read_fields(annotation, value)
    elif type(value) is annotation or (origin is typing.Literal and value in inner):
        return value
    raise ValueError(f"{value!r} is no {annotation}")


def _read_fields(cls: type[T], value: Any) -> T:
    """Return a dataclass of a mapping, or of one in words: 'until=0.6,image_size=32'; ValueError as `_read`."""
    import yaml

    hints = typing.get_type_hints(cls)
    with contextlib.suppress(yaml.YAMLError, TypeError):
        if isinstance(value, str):
            value = yaml.safe_load("{" + value.replace("=", ": ") + "}")
        if isinstance(value, dict) and value.keys() <= hints.keys():
            return cls(**{name: _read(hints[name], one) for name, one in value.items()})
    raise ValueError(f"{value!r} is no {cls}")


def type_name(annotation: Any) -> str:
    """int, 'float or none', 'one of gelu, quick_gelu', 'float float': what to write, in words."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(type_name, inner))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is tuple:
        return f"a list of {type_name(inner[0])}" if inner[-1] is Ellipsis else f"{len(inner)} values"
    if dataclasses.is_dataclass(annotation):
        return ",".join(f"{name}={type_name(hint)}" for name, hint in typing.get_type_hints(annotation).items())
    return "none" if annotation is types.NoneType else annotation.__name__


def is_positional(hint: Any) -> bool:
    """Whether values of this type, with its annotations, are given without a flag."""
    import tyro

    return tyro.conf.Positional in getattr(hint, "__metadata__", ())


def fixed(annotation: Any) -> Any:
    """The type of a field that tyro is to leave as it is, and unmentioned."""
    import tyro

    return tyro.conf.Suppress[tyro.conf.Fixed[annotation]]


def _in_words(known: dict[str, Any]) -> Any:
    """What makes tyro read the dataclasses of a list, one word each, as `_read_fields` does."""
    import tyro

    items = [typing.get_args(hint)[0] for hint in known.values() if typing.get_origin(hint) is tuple]
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: Any) -> Any:
        if not dataclasses.is_dataclass(info.type) or info.type not in items:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=type_name(info.type),
            instance_from_str=lambda words: _read_fields(info.type, words[0]),
            is_instance=lambda one: isinstance(one, info.type),
            str_from_instance=lambda one: [",".join(f"{n}={v}" for n, v in vars(one).items() if v is not None)],
        )

    return registry


def run_tyro(
    cls: type[T],
    args: list[str],
    *,
    known: dict[str, Any],
    given: list[str],
    default: T | None = None,
) -> T:
    """Fill the dataclass `cls` from flags with tyro; what it says of a mistake becomes one line of a UserError.

    Args:
        known: dotted option name to its type. given: the flags as the user wrote them.
        default: where values start that no flag gives; None: the defaults of `cls`.
    """
    import tyro

    errors = io.StringIO()
    how = {"prog": "", "add_help": False, "use_underscores": True, "return_unknown_args": True}
    how["registry"] = _in_words(known)
    how["config"] = (tyro.conf.HelptextFromCommentsOff,)  # all help is in docstrings; looking for comments takes longer
    if default is not None:
        how["default"] = default
    try:
        with contextlib.redirect_stderr(errors):
            options, stray = tyro.cli(cls, args=args, **how)
    except SystemExit:
        message = _first_message(errors.getvalue())
    else:
        if not stray:
            return options
        message = _about_stray(stray[0], given, known) or f"Unrecognized options: {', '.join(stray)}"
    if message.startswith("Missing from") and (missing := re.findall(_NAME_IN_BOX, errors.getvalue(), re.M)):
        message = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    flag = re.match(r"Error parsing --(\S+): .*'(.*)'", message)
    if flag and flag[1] in known:  # tyro's words are about its parser
        message = f"--{flag[1]} is '{flag[2]}', expected {type_name(known[flag[1]])}"
    raise UserError(f"{message}. See --help")


def _about_stray(value: str, args: list[str], known: dict[str, Any]) -> str | None:
    """What to say of a value that nothing takes: a switch was given it, or a pattern lacked its quotes."""
    flags = flags_of(args)
    if value not in args:  # tyro split --flag=value
        switch = next((flag.typed for flag in flags if flag.value == value and known.get(flag.name) is bool), None)
        return switch and f"{switch} is a switch and takes no value, not '{value}'"
    place = args.index(value)
    if place == 0 and "data.train" in known:
        return f"'{value}' belongs to no flag; data to train on are named by --data.train"
    flag = next((flag for flag in reversed(flags[:place]) if flag.name), None)
    if place == 0 or (flag and known.get(flag.name) is not str):
        return None
    taken, typed = ("this", "") if flag is None else (flag.typed, f"{flag.typed} ")
    return (
        f"{taken} takes one value, not also '{value}'; quote a pattern, or the shell expands it: {typed}'shards/*.tar'"
    )


def _first_message(box: str) -> str:
    """tyro draws an error as a box with a rule under the message; keep the message, as one line."""
    lines = []
    for line in box.splitlines()[1:]:
        text = line.strip("│╭╮╰╯ ")
        rule = set(text) <= {"─", "-"}  # hyphens where the output is not UTF-8, and then one above the message too
        if (rule and lines) or text.startswith("Got errors"):
            break
        if not rule:
            lines.append(text)
    return " ".join(lines).rstrip(" .")
