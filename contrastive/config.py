"""Configuration: frozen dataclasses filled from defaults, then a YAML file, then dotted flags.

tyro parses the flags and writes the help. This front rewrites YAML files as flags put ahead of the user's,
lets `--loss NAME` choose which options a slot has, and turns every mistake into one line.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from contrastive.errors import UserError, did_you_mean
from contrastive.files import read_yaml
from contrastive.option_types import accepts, run_tyro, type_name
from contrastive.registry import Registry

T = TypeVar("T")


@dataclass(frozen=True)
class NamedSection:
    """How one section of the configuration is chosen by name: `--loss sigmoid`, `--model clip_vit_b_16`."""

    default_for: Callable[[str], Any]
    """Name to the section's options; UserError for an unknown name."""
    names: tuple[str, ...]
    registry: Registry | None = None
    """Of a slot, whose components have options of their own; presets share one type and differ in values."""

    @property
    def is_slot(self) -> bool:
        return self.registry is not None


def slot(registry: Registry, default: str) -> Any:
    """A field filled by one of the option classes of `registry`; only the chosen one's options exist."""
    choice = NamedSection(lambda name: registry.get(name)(), registry.names(), registry)
    return dataclasses.field(default_factory=registry.get(default), metadata={"choice": choice})


def preset(default_for: Callable[[str], Any], names: tuple[str, ...], default: Callable[[], Any]) -> Any:
    """A field of one type whose defaults a named preset replaces."""
    return dataclasses.field(default_factory=default, metadata={"choice": NamedSection(default_for, names)})


@dataclass(frozen=True)
class Gone:
    """What becomes of an option in RENAMED that nobody used: it has one value for all."""

    value: Any


@dataclass
class _Layer:
    """One YAML file as flat dotted keys."""

    path: Path
    values: dict[str, Any]


def parse(
    cls: type[T],
    args: list[str],
    files: list[Path],
    *,
    prog: str,
    description: str,
    either: tuple[tuple[str, ...], ...] = (),
    also: tuple[str, ...] = (),
    written: bool = False,
) -> T:
    """Fill the dataclass `cls`: defaults, then each of `files` in turn, then the flags `args`.

    Of the options in one group of `either`, the one given last is kept: a flag for one outdoes another in a file.
    `also` names further flags of the script, which an unknown one may have been meant to be.

    Options that have been renamed are told by their new names. A class says which: RENAMED, a class attribute, maps
    an old dotted name, relative to the class, to the new one, or to `Gone`. With `written`, the files were written by
    the program itself, perhaps by an older version of it: what they say under old names is taken as said under the
    new ones, which count for more where both are there.

    A section chosen by name (`loss`, `optimizer`, `model`) takes the flag's choice, else the last file's. What
    a file says about a component that was not chosen is left aside. `--help` prints and exits with status 0.

    Raises:
        UserError: an unknown key or flag (with a suggestion), a value of the wrong type, an unreadable file.
    """
    layers = [_Layer(path, _read(path)) for path in files]
    rest, named = _take(
        args, {name: f"a name: one of {', '.join(choice.names)}" for name, choice in _choices(cls).items()}
    )
    for name, choice in _choices(cls).items():
        _settle(name, choice, layers, named)
    for group in either:
        _keep_one(group, layers, rest)
    chosen = _with_choices(cls, named)
    known = _flat_types(chosen)
    renamed = {old: new for old, new in _renamed(chosen).items() if old not in known}
    for layer in layers:
        layer.values = _with_new_names(layer, renamed, written)
    flags = [
        flag
        for layer in layers
        for key, value in layer.values.items()
        for flag in _as_flags(key, value, known, layer.path)
    ]
    for arg in rest:
        if arg.startswith("--"):
            _check_known(arg, known, (*_choices(cls), *also), renamed)
    words = {"known": known, "prog": prog, "description": _describe(description, cls), "given": args}
    if flags and {"-h", "--help"} & {*rest}:  # the defaults that it tells are then those of the files
        return run_tyro(chosen, rest, default=run_tyro(chosen, flags, **words), **words)
    return run_tyro(chosen, flags + rest, **words)


def _keep_one(group: tuple[str, ...], layers: list[_Layer], args: list[str]) -> None:
    """Drop from each layer what a later one, or a flag, replaces by an alternative."""
    flags = {arg.removeprefix("--").partition("=")[0] for arg in args}
    given = [name for name in group if name in flags]
    if len(given) > 1:
        raise UserError(f"give --{' or --'.join(given)}, not {'both' if len(given) == 2 else 'all'}")
    for layer in reversed(layers):
        present = [name for name in group if layer.values.get(name) is not None]
        if len(present) > 1:
            much = "both" if len(present) == 2 else "all"
            raise UserError(f"{layer.path}: give {' or '.join(present)}, not {much}")
        if given:
            layer.values = {name: value for name, value in layer.values.items() if name not in group}
        given += present


def take_option(args: list[str], name: str) -> tuple[list[str], str | None]:
    """Split one `--name VALUE` off the flags; UserError when the value is missing."""
    rest, taken = _take(args, {name: "a value"})
    return rest, taken.get(name)


def rename_flags(args: list[str], short: Mapping[str, str]) -> list[str]:
    """Return the flags with those that are short for longer ones written out: `--epochs 3` as `--train.epochs 3`."""
    written = []
    for arg in args:
        name, equals, value = arg.partition("=")
        longer = short.get(name.removeprefix("--").replace("-", "_")) if name.startswith("--") else None
        written.append(f"--{longer}{equals}{value}" if longer else arg)
    return written


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain values for YAML, the chosen components by name."""
    plain = dataclasses.asdict(config)
    for name, choice in _choices(type(config)).items():
        if choice.is_slot:
            plain[name] = {"name": choice.registry.name_of(type(getattr(config, name))), **plain[name]}
    return _without_tuples(plain)


def from_dict(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Build a dataclass without choices (a ModelConfig, say) from `dataclasses.asdict`'s values.

    Raises:
        UserError: a key that the class does not have; `where` names the file in the message.
    """
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{where}: unknown key '{key}'.{did_you_mean(key, hints)}")
        if dataclasses.is_dataclass(hints[key]):
            value = from_dict(hints[key], value, where)
        arguments[key] = tuple(value) if isinstance(value, list) else value
    return cls(**arguments)


def _without_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_tuples(item) for key, item in value.items()}
    return [_without_tuples(item) for item in value] if isinstance(value, (list, tuple)) else value


def _read(path: Path) -> dict[str, Any]:
    content = read_yaml(path, "the configuration")
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{path}: expected `key: value` lines, got {type(content).__name__}")
    return flatten(content or {})


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys: {'train': {'steps': 3}} to {'train.steps': 3}."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _choices(cls: type) -> dict[str, NamedSection]:
    return {f.name: f.metadata["choice"] for f in dataclasses.fields(cls) if "choice" in f.metadata}


def _take(args: list[str], needs: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """Split `--loss sigmoid` and the like off the flags; `needs` says what each name's value is."""
    rest, taken = [], {}
    remaining = iter(args)
    for arg in remaining:
        name, equals, value = arg.removeprefix("--").partition("=")
        if arg.startswith("--") and name in needs:
            value = value if equals else next(remaining, "")
            if not value or value.startswith("--"):
                raise UserError(f"--{name} needs {needs[name]}")
            taken[name] = value
        else:
            rest.append(arg)
    return rest, taken


def _settle(name: str, choice: NamedSection, layers: list[_Layer], named: dict[str, str]) -> None:
    """Decide what component section `name` holds; drop what layers say about another one."""
    in_files = []
    for layer in layers:
        whole = layer.values.pop(name, None)  # `loss: sigmoid`
        in_files.append(layer.values.pop(f"{name}.name", whole))
        if in_files[-1] is not None and not isinstance(in_files[-1], str):
            raise UserError(f"{layer.path}: {name} is {in_files[-1]!r}, expected one of {', '.join(choice.names)}")
    from_file = next((found for found in reversed(in_files) if found), None)
    if name not in named and from_file is None:
        return
    named.setdefault(name, from_file)
    for layer, in_file in zip(layers, in_files, strict=True):
        # An unnamed section of options belongs to any component of a slot, but only to its own preset.
        other = in_file != named[name] and (in_file or not choice.is_slot)
        if other:
            layer.values = {k: v for k, v in layer.values.items() if not k.startswith(f"{name}.")}


def _with_choices(cls: type[T], named: dict[str, str]) -> type[T]:
    """Return `cls` with each chosen section's own type and defaults in place."""
    fields = []
    for field in dataclasses.fields(cls):
        if "choice" in field.metadata:
            choice = field.metadata["choice"]
            default = choice.default_for(named[field.name]) if field.name in named else field.default_factory()
            fields.append((field.name, type(default), _like(field, default)))
    return dataclasses.make_dataclass(cls.__name__, fields, bases=(cls,), frozen=True)


def _like(field: dataclasses.Field, default: Any) -> Any:
    return dataclasses.field(default_factory=lambda: default, metadata=field.metadata)


def _flat_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted option name to its type."""
    flat: dict[str, Any] = {}
    for name, annotation in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(annotation):
            flat.update(_flat_types(annotation, f"{prefix}{name}."))
        else:
            flat[prefix + name] = annotation
    return flat


def _renamed(cls: type, prefix: str = "") -> dict[str, str | Gone]:
    """Old dotted option names to the new ones, of the class and all within it."""
    renamed = {}
    for old, new in getattr(cls, "RENAMED", {}).items():
        renamed[prefix + old] = new if isinstance(new, Gone) else prefix + new
    for name, annotation in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(annotation):
            renamed |= _renamed(annotation, f"{prefix}{name}.")
    return renamed


def _with_new_names(layer: _Layer, renamed: dict[str, str | Gone], written: bool) -> dict[str, Any]:
    """Return a file's values by the names of today; UserError for an old name, unless the program wrote the file."""
    moved = {}
    for name in [name for name in layer.values if name in renamed]:
        new, value = renamed[name], layer.values[name]
        if not written:
            raise UserError(f"{layer.path}: {_old_name(name, new)}")
        if not isinstance(new, Gone):
            moved[new] = value
        elif value != new.value:
            raise UserError(f"{layer.path}: {name} is {value}, but is no option any more: it is always {new.value}")
    return moved | {name: value for name, value in layer.values.items() if name not in renamed}


def _old_name(name: str, new: str | Gone, dashes: str = "") -> str:
    now = f"no option any more: it is always {new.value}" if isinstance(new, Gone) else f"{dashes}{new} now"
    return f"{dashes}{name} is {now}"


def _check_known(flag: str, known: dict[str, Any], also: tuple[str, ...], renamed: dict[str, str | Gone]) -> None:
    name = flag.removeprefix("--").partition("=")[0].replace("-", "_")
    if name in renamed:
        raise UserError(_old_name(name, renamed[name], "--"))
    section, _, option = name.rpartition(".")
    positive = f"{section}.{option.removeprefix('no_')}".lstrip(".")  # --evaluate.no_progress
    if name not in known and known.get(positive) is not bool and name != "help":
        raise UserError(f"unknown flag --{name}.{did_you_mean(name, (*known, *also))} See --help")


def _as_flags(key: str, value: Any, known: dict[str, Any], path: Path) -> list[str]:
    if key not in known:
        raise UserError(f"{path}: unknown key '{key}'.{did_you_mean(key, known)}")
    if not accepts(known[key], value):
        raise UserError(f"{path}: {key} is {value!r}, expected {type_name(known[key])}")
    if known[key] is bool:
        section, _, option = key.rpartition(".")
        return [f"--{key}"] if value else ["--" + f"{section}.no_{option}".lstrip(".")]
    items = value if isinstance(value, list) else [value]
    return [f"--{key}", *map(str, items)]


def _describe(description: str, cls: type) -> str:
    lines = [f"--{name} {{{','.join(c.names)}}}" for name, c in _choices(cls).items() if c.is_slot]
    lines += [f"--{name} NAME" for name, c in _choices(cls).items() if not c.is_slot]
    return "\n\n".join([description, *(["Chosen by name: " + "  ".join(lines)] if lines else [])])
