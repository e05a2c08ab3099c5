"""The names of the classes of well-known data sets, spoken as a caption would say them."""

import functools
import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from types import ModuleType

from contrastive.errors import UserError, did_you_mean

ALIASES = {"mnist": "digits", "imagenet1k": "imagenet"}
"""Other names of sets."""

IMAGENET = "imagenet"
CLASS_FILES = ("classes.json", "classnames.txt")
"""Files of class names beside data: a list of strings, or one name a line."""

_WORDNET_ID = re.compile(r"n\d{8}")
# CLIP's list of 1,000 names says 'missile' and 'sunglasses' twice each, so that no model can tell those apart;
# the second missile and the first sunglasses get WordNet's own name back.
_TOLD_APART = {744: "projectile", 836: "sunglass"}


@dataclass(frozen=True)
class ClassSet:
    """The classes of a data set.

    templates: the set of prompt templates that suits them. names: spoken, in the order of the labels.
    own_names: what the data set itself calls them, in folders or in its metadata.
    """

    name: str
    templates: str
    names: tuple[str, ...]
    own_names: tuple[str, ...]

    def places(self, names: Sequence[str]) -> tuple[int, ...] | None:
        """Return which class of the set each of `names` is, or None where they are not all of its classes.

        Upper case, spaces and punctuation do not count.
        """
        keys = [_key(name) for name in names]
        for column in (self.own_names, self.names):
            place_of = {_key(name): place for place, name in enumerate(column)}
            if len(keys) == len(place_of) and set(keys) == place_of.keys():
                return tuple(place_of[key] for key in keys)
        return None


def shipped(folder: str) -> dict[str, Traversable]:
    """Return the text files that come with the package, in 'classes' or 'templates', by the names of their sets."""
    entries = (files("contrastive.data") / folder).iterdir()
    return {entry.name.removesuffix(".txt"): entry for entry in entries if entry.name.endswith(".txt")}


def class_sets() -> tuple[str, ...]:
    """Return the names of the sets that `load_class_names` knows."""
    return tuple(sorted((*shipped("classes"), *ALIASES, IMAGENET)))


@functools.lru_cache(maxsize=64)
def class_set(name: str) -> ClassSet:
    """Return the set called `name`, one of `class_sets()`."""
    name = ALIASES.get(name, name)
    if name == IMAGENET:
        names = imagenet_metadata().IMAGENET_CLASSNAMES
        names = tuple(_TOLD_APART.get(place, spoken) for place, spoken in enumerate(names))
        return ClassSet(IMAGENET, IMAGENET, names, names)
    text = shipped("classes")[name].read_text("utf-8")
    templates = text.partition("# templates: ")[2].partition("\n")[0]
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    names, _, own_names = zip(*(line.partition(" = ") for line in lines), strict=True)
    own_names = (own or name for name, own in zip(names, own_names, strict=True))
    return ClassSet(name, templates, names, tuple(own_names))


def class_set_of(names: Sequence[str]) -> ClassSet | None:
    """Return the set whose classes `names` are, in any order, or None. WordNet ids are told by their number."""
    if len(names) == 1000 and all(_WORDNET_ID.fullmatch(name) for name in names):
        return class_set(IMAGENET)
    # ImageNet's names lie in another package, which is not opened for ten classes.
    passed_over = ALIASES if len(names) == 1000 else (*ALIASES, IMAGENET)
    known = (class_set(name) for name in class_sets() if name not in passed_over)
    return next((found for found in known if found.places(names) is not None), None)


def load_class_names(name_or_file: str | Path, own_names: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the spoken names of the classes, in the order of the labels.

    Args:
        name_or_file: a set (see `class_sets`: 'cifar10', 'eurosat', 'imagenet', ...); or a file: a JSON list, or
            text with one name a line.
        own_names: what the data call their classes. Where these are the classes of the set, the spoken names
            come in their order: a folder has its classes in alphabetical order, whatever the set's.

    ImageNet's names are CLIP's, out of open_clip_torch, but for two that stand there twice (744 'projectile',
    836 'sunglass').

    Raises:
        UserError: no such set or file, not text, an empty name, or a name that comes twice.
    """
    if str(name_or_file) in class_sets():
        known = class_set(str(name_or_file))
        places = known.places(own_names or ())
        return known.names if places is None else tuple(known.names[place] for place in places)
    path = Path(name_or_file).expanduser()
    if not path.exists():
        raise UserError(
            f"{name_or_file}: neither a file nor a set of class names ({', '.join(class_sets())})."
            f"{did_you_mean(str(name_or_file), class_sets())}"
        )
    return _names_in(path)


def class_names_beside(folder: str | Path) -> tuple[str, ...] | None:
    """Return the class names that lie with the data: those of the first of `CLASS_FILES` in `folder`; None without one.

    Raises:
        UserError: as from `load_class_names`.
    """
    paths = (Path(folder, name) for name in CLASS_FILES)
    return next((_names_in(path) for path in paths if path.is_file()), None)


@functools.cache
def imagenet_metadata() -> ModuleType:
    """Return open_clip's module of CLIP's ImageNet prompts and class names, without the rest of the package."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        raise UserError("CLIP's ImageNet prompts come with open_clip_torch; pip install open_clip_torch")
    path = Path(package.submodule_search_locations[0]) / "zero_shot_metadata.py"
    spec = importlib.util.spec_from_file_location("open_clip_zero_shot_metadata", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _key(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def _names_in(path: Path) -> tuple[str, ...]:
    """Return the class names that a file lists, a JSON list or one a line.

    Raises:
        UserError: not text, something else in it, an empty name, or a name that comes twice.
    """
    try:
        text = path.read_text("utf-8-sig")
        names = json.loads(text) if path.suffix == ".json" else text.rstrip().split("\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:  # bad UTF-8 or bad JSON
        raise UserError(f"{path}: not a list of names, one a line or as JSON ({error})") from None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{path}: class names must be a list of strings, one a class, in the order of the labels; "
            "a JSON list, or one a line"
        )
    first_line: dict[str, int] = {}
    for line, name in enumerate((name.strip() for name in names), start=1):
        if not name:
            raise UserError(f"{path}: class {line} has no name; blank lines shift the others")
        if name in first_line:
            pair = f"class {first_line[name]} and class {line}"
            raise UserError(f"{path}: '{name}' names both {pair}; class name '{name}' is there twice")
        first_line[name] = line
    return tuple(first_line)
