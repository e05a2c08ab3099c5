"""Configuration: frozen dataclasses filled from defaults, then a YAML file, then dotted flags.

tyro parses the flags and writes the help. This front makes of a YAML file the configuration that flags start from,
lets `--loss NAME` choose which options a slot has, and turns every mistake into one line.
"""

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from contrastive.errors import UserError, did_you_mean
from contrastive.files import read_yaml
from contrastive.named_sections import (
    NONE,
    NamedSection,
    check_chosen,
    choices_of,
    hidden_fields,
    settle,
    take,
    with_choices,
)
from contrastive.option_types import as_option, is_positional, run_tyro
from contrastive.words import flag_here, flags_of

T = TypeVar("T")
# In the wheel the recipes are part of the package, in a checkout they lie beside it.
RECIPES = next((place / "configs" for place in Path(__file__).parents[:2] if (place / "configs").is_dir()), Path())


@dataclass(frozen=True)
class Gone:
    """What becomes of an option in RENAMED that nobody used: it has one value for all."""

    value: Any


def recipe(name: str, folder: str = "") -> Path:
    """Return the file that `--config NAME` means: one at that path, else one of ours, as 'cc3m' or 'configs/cc3m.yaml'.

    folder: where among ours, as 'suites'.

    Raises:
        UserError: a bare name that none of ours has. SystemExit: 'list', after printing them.
    """
    path, ours = Path(name), RECIPES / folder
    if name == "list":
        for file in sorted(ours.glob("*.yaml")):
            print(f"{file.stem:<24}{file.read_text('utf-8').partition(chr(10))[0].lstrip('# ')}")
        raise SystemExit(0)
    if path.is_file() or path.is_absolute():  # a folder of that name is the data: --config cc3m --data 'cc3m/*.tar'
        return path
    own = ours / f"{path.name.removesuffix('.yaml')}.yaml"
    bare = path.parent == Path() and path.suffix == ""
    if own.exists() and (bare or path.parent in (Path(), Path("configs", folder))):
        return own
    if bare:
        names = sorted(file.stem for file in ours.glob("*.yaml"))
        told = f"no file '{name}' here, and no recipe of that name.{did_you_mean(name, names)}"
        raise UserError(f"{told} There are {', '.join(names)}")
    return path


def parse(
    cls: type[T],
    args: list[str],
    file: Path | None = None,
    *,
    prog: str,
    description: str,
    either: tuple[tuple[str, ...], ...] = (),
    also: Mapping[str, tuple[str, str]] = types.MappingProxyType({}),
    shown: str = "",
    base: Path | None = None,
) -> T:
    """Fill the dataclass `cls`: defaults, then the YAML files `base` and `file`, then the flags `args`.

    Of the options in one group of `either`, one is kept: a flag for one outdoes another in the file.
    `also` has further flags of the command, which an unknown one may have been meant to be: for the help, what stands
    for the value of each, and what it does. `shown` are the flags of the short help, by default all. A class may say
    in SHORT_FLAGS which flags stand for longer ones.

    Options that have been renamed are told by their new names. A class says which: RENAMED, a class attribute, maps
    an old dotted name, relative to the class, to the new one, or to `Gone`. `base` was written by the program itself,
    perhaps by an older version of it: what it says under old names is taken as said under the new ones, which count
    for more where both are there.

    A class with a field `given` is told there which options the file and the flags gave: see `hidden`.

    A section chosen by name (`loss`, `optimizer`, `model`) takes the flag's choice, else the file's. What
    the file says about a component that was not chosen is left aside. `--help` and `--help-all` print `description`
    (a module's docstring) and the options, and exit with status 0.

    Raises:
        UserError: an unknown key or flag (with a suggestion), a value of the wrong type, an unreadable file.
    """
    choices, short = choices_of(cls), getattr(cls, "SHORT_FLAGS", {})
    rest, named = take(rename_flags(args, short), choices)
    given = dict.fromkeys(named, True)
    contents = {path: _read(path) for path in (file, base) if path is not None}
    _settle(choices, contents, named, base)
    for group in either:
        _keep_one(group, contents, rest)
    check_chosen(choices, named, rest)
    chosen = with_choices(cls, named)
    known = _flat_types(chosen)
    renamed = {old: new for old, new in _renamed(chosen).items() if old not in known}
    contents = {path: _with_new_names(own, renamed, path == base, path) for path, own in contents.items()}
    start = _filled(chosen(), values) if (values := _values(contents, known)) else None
    if asked := {"-h", "--help", "--help-all", "--help_all"} & set(rest):
        from contrastive.help import help_text

        of_file = {"start": start, "recipe": file.stem if file else "", "named": named}
        how = {"whole": not asked & {"-h", "--help"}, "shown": tuple(shown.split()), "extra": also}
        print(help_text(chosen, prog, description, **how, **of_file))
        raise SystemExit(0)
    words = typing.get_type_hints(cls, include_extras=True)
    names = {name: hint for name, hint in known.items() if not is_positional(words.get(name))}
    flags = _options_of(rest, names, (*choices, *also, *short), renamed)
    config = run_tyro(chosen, _gathered(rest, known), known=known, default=start, given=args)
    if not hasattr(config, "given"):
        return config
    given = dict.fromkeys([*named, *contents.get(file, ())], False) | given | dict.fromkeys(flags, True)
    return dataclasses.replace(config, given=given)


def _settle(
    choices: dict[str, NamedSection], contents: dict[Path, dict[str, Any]], named: dict[str, Any], base: Path | None
) -> None:
    """Decide what each section holds, in `named`; drop from the files' `contents` what is of others: see `settle`."""
    for name, choice in choices.items():
        if choice.table and named.get(name) in ("list", "help"):
            print(choice.table())
            raise SystemExit(0)
        unnamed = [path for path in contents if not {name, f"{name}.name"} & contents[path].keys()]
        for path in contents:
            # Of a preset the program wrote all that was made of it.
            if choice.registry is not None or path != base:
                contents[path] = settle(name, choice, contents[path], named, path)
        # None has no options: those in a file that names nothing are of others.
        for path in unnamed if choice.is_slot and named.get(name) == NONE else ():
            contents[path] = {key: value for key, value in contents[path].items() if not key.startswith(f"{name}.")}


def _values(contents: dict[Path, dict[str, Any]], known: dict[str, Any]) -> dict[str, Any]:
    """Return what files say, the first outdoing the others, as the options' types; UserError for an unknown key."""
    values = {}
    for path in reversed(contents):
        for key, value in contents[path].items():
            if value == {}:  # a section that says nothing
                continue
            if key not in known:
                raise UserError(f"{path}: unknown key '{key}'.{did_you_mean(key, known)}")
            values[key] = as_option(f"{path}: {key}", known[key], value)
    return values


def _keep_one(group: tuple[str, ...], contents: dict[Path, dict[str, Any]], args: list[str]) -> None:
    """Drop from each file's values what a flag, or a file before it, replaces by an alternative."""
    flags = {flag.name for flag in flags_of(args)}
    said = [("give --", " or --", [name for name in group if name in flags])]
    said += [(f"{path}: give ", " or ", [n for n in group if v.get(n) is not None]) for path, v in contents.items()]
    for give, between, names in said:
        if len(names) > 1:
            raise UserError(f"{give}{between.join(names)}, not {'both' if len(names) == 2 else 'all'}")
    outdone = bool(said[0][2])
    for values, (*_, names) in zip(contents.values(), said[1:], strict=True):
        for name in names if outdone else ():
            del values[name]
        outdone = outdone or bool(names)


def rename_flags(args: list[str], short: Mapping[str, str]) -> list[str]:
    """Return the flags with those that are short for longer ones written out: `--epochs 3` as `--train.epochs 3`."""
    flags = zip(args, flags_of(args), strict=True)
    return [f"--{short[flag.name]}{arg.removeprefix(flag.typed)}" if flag.name in short else arg for arg, flag in flags]


def _gathered(args: list[str], known: dict[str, Any]) -> list[str]:
    """Return the words as tyro reads them rightly: those that stand alone first, then each flag once with its values.

    `A --text a --limit 3 B --text b` is `A B --limit 3 --text a b`.
    """
    alone: list[str] = []
    single: list[str] = []
    lists: dict[str, list[str]] = {}
    taker, room = alone, 0.0
    for arg, flag in zip(args, flags_of(args), strict=True):
        if flag.name:
            room = _num_values(known.get(flag.name, bool))  # unknown is --no_SWITCH alone
            taker = lists.setdefault(flag.name, []) if room == math.inf else single
            inside = [flag.value] if arg != flag.typed else []  # what follows '--text=a' is none of its values
            taker += inside if room == math.inf else [arg]
            room = 0 if inside else room
        elif room:
            taker.append(arg)
            room -= 1
        else:
            alone.append(arg)
    return [*alone, *single, *(word for name, values in lists.items() for word in (f"--{name}", *values))]


def _num_values(hint: Any) -> float:
    """How many words follow the flag of an option of this type, at most."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return max(map(_num_values, inner))
    if origin is tuple:
        return math.inf if ... in inner else len(inner)
    return 0 if hint in (bool, types.NoneType) else 1


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain values for YAML, the chosen components by name."""
    plain = dataclasses.asdict(config)
    for field in hidden_fields(type(config)):
        del plain[field.name]
    for name, choice in choices_of(type(config)).items():
        if choice.is_slot:
            plain[name] = {"name": choice.registry.name_of(type(getattr(config, name))), **plain[name]}
    return json.loads(json.dumps(plain))  # tuples as lists


def written_options(cls: type, path: Path) -> dict[str, Any]:
    """What a file that the program wrote says, by the dotted names of today."""
    return _with_new_names(_read(path), _renamed(cls), True, path)


def from_dict(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Build a dataclass without choices (a ModelConfig, say) from `dataclasses.asdict`'s values.

    Raises:
        UserError: a key that the class does not have, or a value of another type; `where` names the file.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: the options of {cls.__name__} are {values!r}")
    hints, read = typing.get_type_hints(cls), {}
    for key, value in values.items():
        if key == "gradient_checkpointing":  # of models saved when towers had it; it says nothing of what they are
            continue
        if key not in hints:
            raise UserError(f"{where}: unknown key '{key}'.{did_you_mean(key, hints)}")
        nested = dataclasses.is_dataclass(hints[key])
        read[key] = from_dict(hints[key], value, where) if nested else as_option(f"{where}: {key}", hints[key], value)
    return cls(**read)


def _read(path: Path) -> dict[str, Any]:
    content = read_yaml(path, "the configuration")
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{path}: expected `key: value` lines, got {type(content).__name__}")
    return flatten(content or {})


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys: {'train': {'steps': 3}} to {'train.steps': 3}; empty ones stay."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def _filled(options: T, values: dict[str, Any], prefix: str = "") -> T:
    """Return the options with those replaced that `values` gives by their dotted names."""
    changed = {}
    for field in dataclasses.fields(options):
        name, value = prefix + field.name, getattr(options, field.name)
        nested = dataclasses.is_dataclass(value)
        changed[field.name] = _filled(value, values, f"{name}.") if nested else values.get(name, value)
    return dataclasses.replace(options, **changed)


def _sections(cls: type, prefix: str = "") -> Iterator[tuple[str, type, dict[str, Any]]]:
    """The class and all option classes within it: what dotted names begin with, the class, the types of its fields."""
    hints = typing.get_type_hints(cls)
    for field in hidden_fields(cls):
        del hints[field.name]
    yield prefix, cls, hints
    for name, annotation in hints.items():
        if dataclasses.is_dataclass(annotation):
            yield from _sections(annotation, f"{prefix}{name}.")


def _flat_types(cls: type) -> dict[str, Any]:
    """Dotted option name to its type."""
    all_types = {f"{prefix}{name}": hint for prefix, _, hints in _sections(cls) for name, hint in hints.items()}
    return {name: hint for name, hint in all_types.items() if not dataclasses.is_dataclass(hint)}


def _renamed(cls: type) -> dict[str, str | Gone]:
    """Old dotted option names to the new ones, of the class and all within it."""
    return {
        prefix + old: new if isinstance(new, Gone) else prefix + new
        for prefix, section, _ in _sections(cls)
        for old, new in getattr(section, "RENAMED", {}).items()
    }


def _with_new_names(
    values: dict[str, Any], renamed: dict[str, str | Gone], written: bool, file: Path | None
) -> dict[str, Any]:
    """Return a file's values by the names of today; UserError for an old name, unless the program wrote the file."""
    moved = {}
    for name in [name for name in values if name in renamed]:
        new, value = renamed[name], values.pop(name)
        if not written:
            raise UserError(f"{file}: {_old_name(name, new)}")
        if not isinstance(new, Gone):
            # Two old switches became one share: the larger counts.
            moved[new] = max(float(value), moved.get(new, 0.0)) if isinstance(value, bool) else value
        elif value != new.value:
            raise UserError(f"{file}: {name} is {value}, but is no option any more: it is always {new.value}")
    return moved | values


def _old_name(name: str, new: str | Gone, dashes: str = "") -> str:
    now = f"no option any more: it is always {new.value}" if isinstance(new, Gone) else f"{dashes}{new} now"
    return f"{dashes}{name} is {now}"


def _options_of(
    args: list[str], known: dict[str, Any], also: tuple[str, ...], renamed: dict[str, str | Gone]
) -> list[str]:
    """Return the names of the options that flags are of; UserError for old ones, and for all others at once."""
    names, unknown = [], []
    for flag in filter(lambda flag: flag.name, flags_of(args)):
        section, dot, option = flag.name.rpartition(".")
        positive = f"{section}{dot}{option.removeprefix('no_')}"  # --evaluate.no_progress
        if flag.name in renamed:
            raise UserError(_old_name(flag.name, renamed[flag.name], "--"))
        if flag.name in known:
            names.append(flag.name)
        elif known.get(positive) is bool:
            names.append(positive)
        else:
            hint = did_you_mean(flag.name, (*known, *also))
            unknown.append(flag_here(flag, (*known, *also)) or f"unknown flag {flag.typed}.{hint}")
    unknown += [f"{arg}: flags have two dashes here." for arg in args if re.match("-[a-z]", arg)]
    if unknown:
        raise UserError(f"{' '.join(unknown)} See --help")
    return names
