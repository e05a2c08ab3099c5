"""Sections of a configuration whose options depend on a name: `--loss sigmoid`, `--model NAME`, `--objectives A B`."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from contrastive.errors import UserError, did_you_mean
from contrastive.option_types import fixed
from contrastive.registry import Registry
from contrastive.words import Flag, flags_of

T = TypeVar("T")
NONE = "none"


@dataclass(frozen=True)
class NamedSection:
    """How one section of the configuration is chosen by name, or by several names."""

    default_for: Callable[[Any], Any]
    """Name to the section's options; UserError for an unknown name. Of several, names to a dataclass of all."""
    registry: Registry | None = None
    """Of components with options of their own; presets share one type and differ in values."""
    table: Callable[[], str] | None = None
    """Of presets, what `--model list` prints."""
    several: bool = False
    """Any number of components at once, each a section of its own within this one."""

    @property
    def is_slot(self) -> bool:
        return self.registry is not None and not self.several

    def told(self, section: str) -> str:
        """Which names there are, or how to see them."""
        if self.registry is None:
            return f"one that --{section} list shows"
        names = ", ".join(self.registry.names())
        return f"any of {names}; or {NONE}" if self.several else f"one of {names}"


@dataclass(frozen=True)
class Chosen:
    """The options of several components, each under its name; of none, as here."""


def slot(registry: Registry, default: str) -> Any:
    """A field filled by one of the option classes of `registry`; only the chosen one's options exist."""
    choice = NamedSection(lambda name: registry.get(name)(), registry)
    return dataclasses.field(default_factory=registry.get(default), metadata={"choice": choice})


def preset(default_for: Callable[[str], Any], default: Callable[[], Any], table: Callable[[], str]) -> Any:
    """A field of one type whose defaults a named preset replaces; `table` has the names."""
    return dataclasses.field(default_factory=default, metadata={"choice": NamedSection(default_for, table=table)})


def several(registry: Registry) -> Any:
    """A field that holds the option classes of any number of components of `registry`, none by default."""
    choice = NamedSection(functools.partial(chosen, registry), registry, several=True)
    return dataclasses.field(default_factory=Chosen, metadata={"choice": choice})


def chosen(registry: Registry, components: Iterable[str] | dict[str, Any]) -> Chosen:
    """Return the options of components by name: their defaults, or those given. They keep the registry's order."""
    known = {name: registry.get(name) for name in components}
    given = components if isinstance(components, dict) else {name: cls() for name, cls in known.items()}
    fields = [(name, known[name], dataclasses.field(default=given[name])) for name in registry.names() if name in known]
    return dataclasses.make_dataclass("Chosen", fields, bases=(Chosen,), frozen=True)()


def by_name(components: Chosen) -> dict[str, Any]:
    """Return the options of each of the chosen components by its name."""
    return {field.name: getattr(components, field.name) for field in dataclasses.fields(components)}


def hidden(default: Any = None) -> Any:
    """A field that is no option: it has neither flag nor key, and no place in what is written.

    `parse` fills one called `given` with the dotted names of the options that were given: True by a flag, False by a
    file.
    """
    return dataclasses.field(default=default, repr=False, compare=False, metadata={"hidden": True})


def hidden_fields(cls: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(cls) if "hidden" in field.metadata]


def choices_of(cls: type) -> dict[str, NamedSection]:
    """Return the named sections of a class of options."""
    return {f.name: f.metadata["choice"] for f in dataclasses.fields(cls) if "choice" in f.metadata}


def with_choices(cls: type[T], named: dict[str, Any]) -> type[T]:
    """Return `cls` with each chosen section's own type and defaults in place."""
    fields = [(field.name, fixed(field.type), field) for field in hidden_fields(cls)]
    for field in dataclasses.fields(cls):
        if "choice" in field.metadata:
            choice = field.metadata["choice"]
            default = choice.default_for(named[field.name]) if field.name in named else field.default_factory()
            own = dataclasses.field(default=default, metadata=field.metadata)
            fields.append((field.name, type(default), own))
    return dataclasses.make_dataclass(cls.__name__, fields, bases=(cls,), frozen=True)


def settle(
    name: str, choice: NamedSection, values: dict[str, Any], named: dict[str, Any], file: Path | None
) -> dict[str, Any]:
    """Decide what section `name` holds; return the file's values without what they say about other components.

    named: what flags and the files before this one chose, by section; this file's choice is added where it is first.
    """
    if choice.several:
        return _settle_several(name, choice, values, named, file)
    whole = values.pop(name, None)  # `loss: sigmoid`
    in_file = values.pop(f"{name}.name", whole)
    if in_file is not None and not isinstance(in_file, str):
        raise UserError(f"{file}: {name} is {in_file!r}, expected {choice.told(name)}")
    if in_file:
        named.setdefault(name, in_file)
    # An unnamed section of options belongs to any component of a slot, but only to its own preset.
    if in_file == named.get(name) or (not in_file and choice.is_slot):
        return values
    return {key: value for key, value in values.items() if not key.startswith(f"{name}.")}


def _settle_several(name: str, choice: NamedSection, values: dict[str, Any], named: dict[str, Any], file: Path | None):
    """As `settle`: components are named by a list, or by having a section: `objectives: {caption: {weight: 2}}`."""
    listed = values.pop(name, None)
    listed = [listed] if isinstance(listed, str) else listed or []
    if not (isinstance(listed, list) and all(isinstance(one, str) for one in listed)):
        raise UserError(f"{file}: {name} is {listed!r}, expected {choice.told(name)}")
    own = {key: key.split(".")[1] for key in values if key.startswith(f"{name}.")}
    in_file = tuple(dict.fromkeys([*listed, *own.values()]))
    for one in in_file:
        if one not in choice.registry.names():
            known = choice.registry.names()
            raise UserError(f"{file}: {name} has no '{one}'.{did_you_mean(one, known)} There are {', '.join(known)}")
    if in_file:
        named.setdefault(name, in_file)
    kept = named.get(name, ())
    bare = {f"{name}.{one}" for one in in_file}  # `caption: {}` or `caption:`, all by default
    return {key: value for key, value in values.items() if key not in own or (own[key] in kept and key not in bare)}


def take(args: list[str], choices: dict[str, NamedSection]) -> tuple[list[str], dict[str, Any]]:
    """Split `--loss sigmoid` and the like off the flags; return the rest, and the names by section.

    Raises:
        UserError: no name follows.
    """
    rest, taken, place = [], {}, 0
    flags = flags_of(args)
    while place < len(args):
        arg, flag = args[place], flags[place]
        place += 1
        if flag.name not in choices:
            rest.append(arg)
            continue
        choice = choices[flag.name]
        if not flag.value:
            raise UserError(f"--{flag.name} needs a name: {choice.told(flag.name)}")
        words = [flag.value]
        if arg == flag.typed:
            place += 1
            while choice.several and place < len(args) and not args[place].startswith("--"):
                words.append(args[place])
                place += 1
            _check_alone(flag, args[place : place + 1])
        if choice.several:
            words = () if words == [NONE] else tuple(dict.fromkeys(words))
        taken[flag.name] = words if choice.several else words[0]
    return rest, taken


def _check_alone(flag: Flag, after: list[str]) -> None:
    """Raise UserError where a word follows the value of a flag that takes one: it would go to another flag."""
    if after and not after[0].startswith("-"):
        raise UserError(f"{flag.typed} takes one value, {flag.value}, not also '{after[0]}'")


def check_chosen(choices: dict[str, NamedSection], named: dict[str, Any], args: list[str]) -> None:
    """Raise UserError for a flag of a component that was not chosen: it would say nothing about the run."""
    for flag in flags_of(args):
        section, _, rest = flag.name.partition(".")
        one = rest.partition(".")[0]
        choice = choices.get(section)
        if choice is not None and choice.several and one in choice.registry.names():
            present = named.get(section, ())
            if one not in present:
                names = " ".join([*present, one])
                what = choice.registry.kind
                raise UserError(f"{flag.typed} is of an {what} that was not chosen: --{section} {names}")


def take_option(args: list[str], name: str) -> tuple[list[str], str | None]:
    """Split one `--name VALUE` off the flags; UserError when the value is missing."""
    rest, value, skip = [], None, False
    for place, (arg, flag) in enumerate(zip(args, flags_of(args), strict=True)):
        if skip:
            skip = False
        elif flag.name != name:
            rest.append(arg)
        elif not flag.value:
            raise UserError(f"--{name} needs a value")
        else:
            value, skip = flag.value, arg == flag.typed
            _check_alone(flag, args[place + 1 + skip : place + 2 + skip])
    return rest, value
