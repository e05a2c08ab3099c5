"""What `--help` and `--help-all` print: usage, examples and options, out of a command's docstrings.

The short one has at most LINES lines of COLUMNS columns, and examples first; the other one has every option.
"""

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from contrastive.named_sections import choices_of, hidden_fields
from contrastive.option_types import is_positional

COLUMNS, LINES = 80, 30
_LEFT, _DEFAULT = 24, 40  # columns of the flags, and the most of a default in the short help
_LABEL = 12  # "prune: " is no clause


@dataclass(frozen=True)
class _Option:
    """One line of the options."""

    flag: str
    """'--lr', or the name of a positional argument: 'MODEL'."""
    value: str
    """What stands for its value: 'N', 'cpu|cuda', '' of a switch."""
    text: str
    default: str
    """'' where there is none to tell."""


def help_text(
    cls: type,
    name: str,
    doc: str,
    *,
    whole: bool,
    start: Any = None,
    recipe: str = "",
    named: Mapping[str, Any] = MappingProxyType({}),
    shown: tuple[str, ...] = (),
    extra: Mapping[str, tuple[str, str]] = MappingProxyType({}),
) -> str:
    """Return what to print.

    Args:
        cls: the options, with the chosen sections in place. name: of the command. doc: its module's docstring.
        whole: every option, instead of `shown`; of none, all. start: an instance with what the recipe says, and
            `recipe` its name. named: what flags and recipe chose, by section.
        extra: flags that are no option of `cls`: what stands for the value, and the text.
    """
    positional, sections = _options(cls, start, recipe)
    usage = " ".join([f"usage: contrastive {name}", *(one.flag for one in positional), "[--OPTION VALUE ...]"])
    summary, examples, remarks = _parts(doc)
    extra_options = [_Option(_dashed(flag), *told, "") for flag, told in extra.items()]
    named_options = _named_sections(cls, start, named)
    of_sections = [one for _, options in sections for one in options]
    known = {one.flag: one for one in (*of_sections, *named_options, *extra_options)}
    short = getattr(cls, "SHORT_FLAGS", {})
    for flag, long in short.items():
        if one := known.get(_dashed(long)):
            known[_dashed(flag)] = dataclasses.replace(one, flag=_dashed(flag))
    lines = [usage, "", *textwrap.wrap(summary, COLUMNS), "", *examples, *([""] if examples else [])]
    if not whole:
        chosen = [known[_dashed(flag)] for flag in shown] or list(known.values())
        more = "--help-all: every option, and more on what it does" if remarks or shown else ""
        return "\n".join([*lines, *map(_line, [*positional, *chosen]), "", more]).rstrip()
    lines += [*remarks, *([""] if remarks else [])]
    sections[0][1][:0] = [*positional, *named_options, *extra_options]
    for title, options in sections:
        lines += ["", *textwrap.wrap(title, COLUMNS)] if title else []
        lines += [line for one in options for line in _lines(one)]
    if told := ", ".join(f"{_dashed(flag)}: {_dashed(long)}" for flag, long in short.items()):
        lines += ["", *textwrap.wrap(f"short for longer ones: {told}", COLUMNS, break_on_hyphens=False)]
    return "\n".join(lines)


def _named_sections(cls: type, start: Any, named: Mapping[str, Any]) -> list[_Option]:
    """The flags that choose sections by name, as --loss."""
    options = []
    for name, choice in choices_of(cls).items():
        default = named.get(name, "")
        if not default and choice.is_slot:
            default = choice.registry.name_of(type(getattr(start or cls(), name)))
        value = "|".join(choice.registry.names()) if choice.is_slot else "NAME"
        text = f"The {choice.registry.kind}" if choice.is_slot else choice.told(name)
        options.append(_Option(_dashed(name), value, text, _word(default)))
    return options


def _dashed(name: str) -> str:
    """The flag as it is shown: a dotted one as the key that it is in a file, others with dashes. Both are taken."""
    return "--" + (name if "." in name else name.replace("_", "-"))


def _parts(doc: str) -> tuple[str, list[str], list[str]]:
    """A docstring's first paragraph, its indented lines, and the other paragraphs, wrapped."""
    first, *others = doc.strip().split("\n\n")
    examples, remarks = [], []
    for paragraph in others:
        if paragraph.startswith("    "):
            examples += [f"  {line.strip()}" for line in paragraph.splitlines()]
        else:
            remarks += [*([""] if remarks else []), *textwrap.wrap(paragraph, COLUMNS)]
    return first, examples, remarks


def _options(cls: type, start: Any, recipe: str) -> tuple[list[_Option], list[tuple[str, list[_Option]]]]:
    """The positional arguments, and for each section of the options its title and what is in it."""
    positional, sections = [], []
    for prefix, section, instance, usual in _sections(cls, start):
        texts, own, inherited = field_texts(section), [], []
        hints = typing.get_type_hints(section, include_extras=True)
        for field in dataclasses.fields(section):
            if field in hidden_fields(section) or dataclasses.is_dataclass(_bare(hints[field.name])):
                continue
            value, text = _value(hints[field.name]), texts.get(field.name, "")
            if is_positional(hints[field.name]):
                positional.append(_Option(value, "", text, ""))
                continue
            default = _told(usual, field.name)
            if instance is not None and usual is not None:
                here = getattr(instance, field.name)
                if here != getattr(usual, field.name, here):
                    default = f"{default or 'none'}; {recipe} {_word(here)}"
            name = f"no_{field.name}" if default == "on" else field.name
            one = _Option(_dashed(prefix + name), value, text, "" if default in ("on", "off") else default)
            # The first class may be one made on the way, which repeats what was chosen.
            is_own = any(field.name in base.__dict__.get("__annotations__", {}) for base in section.__mro__[:2])
            (own if is_own else inherited).append(one)
        title = (section.__doc__ or "").partition("\n")[0] if prefix else ""
        sections.append((f"{prefix.rstrip('.')}: {title}" if prefix else "", own + inherited))
    return positional, sections


def _sections(cls: type, start: Any, prefix: str = "", usual: Any = None) -> Iterator[tuple[str, type, Any, Any]]:
    """Each class of options with what its names begin with, its values by the recipe, and its own defaults."""
    if usual is None:
        defaults = {field.name: _default_of(field) for field in dataclasses.fields(cls)}
        usual = types.SimpleNamespace(**{name: one for name, one in defaults.items() if one is not dataclasses.MISSING})
    yield prefix, cls, start, usual
    for field in dataclasses.fields(cls):
        value = getattr(start if start is not None else usual, field.name, None)
        if dataclasses.is_dataclass(value) and field not in hidden_fields(cls):
            own = type(value)() if field.name in choices_of(cls) else getattr(usual, field.name, None)
            yield from _sections(type(value), value, f"{prefix}{field.name}.", own)


def _default_of(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@functools.cache
def field_texts(cls: type) -> dict[str, str]:
    """Return the docstrings below the fields of a dataclass and of those it inherits from, each as one line."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):  # made on the way, from one that has the docstrings
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for pair in zip(body, body[1:], strict=False):
            match pair:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=text)):
                    texts[name] = " ".join(str(text).split())
    return texts


def _bare(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint


def _value(hint: Any) -> str:
    """What stands for a value of this type: the metavar that it has, as positional ones do, else a word for it."""
    notes = getattr(hint, "__metadata__", ())
    return next((note.metavar for note in notes if getattr(note, "metavar", None)), None) or _word_for(_bare(hint))


def _word_for(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return "|".join(_word_for(_bare(one)) for one in inner if one is not types.NoneType)
    if origin is typing.Literal:
        return "|".join(map(str, inner))
    if origin is tuple:
        one = _word_for(_bare(inner[0]))
        return f"{one} ..." if inner[-1] is Ellipsis else " ".join([one] * len(inner))
    return {int: "N", float: "X", bool: "", str: "TEXT"}.get(hint, "PATH" if hint.__name__ == "Path" else "VALUE")


def _told(usual: Any, name: str) -> str:
    value = getattr(usual, name, None)
    return ("on" if value else "off") if isinstance(value, bool) else _word(value)


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def _lines(one: _Option) -> list[str]:
    """The option in two columns."""
    left = f"  {one.flag} {one.value}".rstrip()
    text = one.text.rstrip(".") + _bracketed(one)
    wrapped = textwrap.wrap(text, COLUMNS - _LEFT) or [""]
    if len(left) >= _LEFT:
        return [left, *(f"{'':{_LEFT}}{line}" for line in wrapped)]
    return [f"{left if number == 0 else '':{_LEFT}}{line}" for number, line in enumerate(wrapped)]


def _line(one: _Option) -> str:
    """The option in one line, with as many clauses of its text as fit."""
    left = f"  {one.flag} {one.value}".rstrip()
    left = f"{left:{_LEFT}}" if len(left) < _LEFT else f"{left}  "
    default = textwrap.shorten(_bracketed(one), _DEFAULT, placeholder=" ...]") if one.default else ""
    default = f" {default}" if default else ""
    room = COLUMNS - len(left) - len(default)
    text = one.text.rstrip(".")
    for clauses, instead in ((r"\. .*", ""), (r"[;:] .*", ""), (r" \(.*", ""), (r", .*", ", ...")):
        if len(text) > room and len(shorter := re.sub(clauses, instead, text, count=1)) > _LABEL:
            text = shorter
    return left + textwrap.shorten(text, max(room, 4), placeholder=" ...") + default


def _bracketed(one: _Option) -> str:
    return f" [{one.default}]" if one.default else ""
