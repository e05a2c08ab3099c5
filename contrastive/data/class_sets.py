"""The names of the classes of well-known data sets, spoken as a caption would say them."""

import functools
import importlib.util
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from types import ModuleType

from contrastive.files import package_file

ALIASES = {"mnist": "digits", "imagenet1k": "imagenet"}
"""Other names of sets."""

IMAGENET = "imagenet"
CLASS_FILES = ("classes.json", "classnames.txt")
"""Files of class names beside data: see `read_class_file` of class_joining."""

_WORDNET_ID = re.compile(r"n\d{8}")
_NUMBERED = re.compile(r"(n\d{8}|\d+)[ ._-]+(?=\D)(.+)")  # '001.Black_footed_Albatross', 'n02085620-Chihuahua'
# CLIP's list of 1,000 names says 'missile' and 'sunglasses' twice each, so that no model can tell those apart;
# the second missile and the first sunglasses get WordNet's own name back.
_TOLD_APART = {744: "projectile", 836: "sunglass"}


@dataclass(frozen=True)
class ClassSet:
    """The classes of a data set, or of a file of class names.

    templates: the set of prompt templates that suits them; '' where that is not known, as of a file. names: spoken, in
    the order of the labels. own_names: what the data set itself calls them, in folders or in its metadata: WordNet
    ids, numbers, or the same names.
    """

    name: str
    templates: str
    names: tuple[str, ...]
    own_names: tuple[str, ...]

    @property
    def is_list(self) -> bool:
        """Whether it is a file that lists names and says of none which class it is for."""
        return not self.templates and self.names == self.own_names

    def places(self, names: Sequence[str], *, part: bool = False) -> tuple[int, ...] | None:
        """Return which class of the set each of `names` is; None unless they are all of its classes, or a `part`."""
        if not part and len(names) != len(self.names):
            return None
        found = (places_of(names, column) for column in (self.own_names, self.names))
        return next((places for places in found if None not in places), None)


def is_wordnet_id(name: str) -> bool:
    return _WORDNET_ID.fullmatch(name) is not None


def bare_names(names: Sequence[str]) -> tuple[str, ...] | None:
    """Return names without the number or id that each begins with; None where one has none or two would be alike."""
    found = [match.groups() for match in map(_NUMBERED.fullmatch, names) if match]
    alone = all(len(set(map(name_key, column))) == len(names) for column in zip(*found, strict=True))
    return tuple(bare for _, bare in found) if found and alone else None


def are_lemmas(names: Sequence[str]) -> bool:
    """Whether they are ImageNet's 1,000 in their order as WordNet has them, but for some that were told apart."""
    if len(names) != 1000 or "," not in names[0]:
        return False
    lemmas = dict(line.split("\t") for line in wordnet_lines("imagenet_synset_to_lemma.txt"))
    return sum(lemmas[own] == name for own, name in zip(class_set(IMAGENET).own_names, names, strict=True)) > 900


@functools.lru_cache(maxsize=2**16)
def name_key(name: str) -> str:
    """Return what counts in a class name: neither case, spaces and punctuation nor zeros before a number."""
    if name.isascii() and name.isdecimal() and len(name) < 20:
        return str(int(name))
    letters = unicodedata.normalize("NFC", name).casefold()
    # Symbols stay, and so do the vowel signs of Indian scripts, which are no letters.
    return "".join(letter for letter in letters if unicodedata.category(letter)[0] not in "PZC") or name


def places_of(names: Sequence[str], column: Sequence[str]) -> tuple[int | None, ...]:
    """Return where in `column` each of `names` stands, None for nowhere: as it is written, else by its `name_key`.

    A name whose key is that of several names, on either side, stands nowhere.
    """
    written = {name: place for place, name in enumerate(column)}
    if all(name in written for name in names):
        return tuple(written[name] for name in names)
    keys, asked = list(map(name_key, column)), list(map(name_key, names))
    alone = {key for key, times in Counter(keys).items() if times == 1}
    alone -= {key for key, times in Counter(asked).items() if times > 1}
    place_of = {key: place for place, key in enumerate(keys) if key in alone}
    return tuple(map(place_of.get, asked))


def shipped(folder: str) -> dict[str, Traversable]:
    """Return the text files that come with the package, in 'classes' or 'templates', by the names of their sets."""
    entries = (files("contrastive.data") / folder).iterdir()
    return {entry.name.removesuffix(".txt"): entry for entry in entries if entry.name.endswith(".txt")}


def class_sets() -> tuple[str, ...]:
    """Return the names of the sets that `load_class_set` of class_joining knows."""
    return tuple(sorted((*shipped("classes"), *ALIASES, IMAGENET)))


@functools.lru_cache(maxsize=64)
def class_set(name: str) -> ClassSet:
    """Return the set called `name`, one of `class_sets()`."""
    name = ALIASES.get(name, name)
    if name == IMAGENET:
        names = imagenet_metadata().IMAGENET_CLASSNAMES
        names = tuple(_TOLD_APART.get(place, spoken) for place, spoken in enumerate(names))
        return ClassSet(IMAGENET, IMAGENET, names, tuple(wordnet_lines("imagenet_synsets.txt")))
    text = shipped("classes")[name].read_text("utf-8")
    templates = text.partition("# templates: ")[2].partition("\n")[0]
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    names, _, own_names = zip(*(line.partition(" = ") for line in lines), strict=True)
    own_names = (own or name for name, own in zip(names, own_names, strict=True))
    return ClassSet(name, templates, names, tuple(own_names))


def class_set_of(names: Sequence[str]) -> ClassSet | None:
    """Return the set whose classes `names` are, in any order, or None. WordNet ids are ImageNet's, however many."""
    if names and all(map(is_wordnet_id, names)):
        return class_set(IMAGENET)
    # ImageNet's names lie in another package, which is not opened for ten classes.
    passed_over = ALIASES if len(names) == 1000 else (*ALIASES, IMAGENET)
    known = (class_set(name) for name in class_sets() if name not in passed_over)
    return next((found for found in known if found.places(names) is not None), None)


def class_names_beside(folder: str | Path) -> tuple[str, ...] | None:
    """Return the class names that lie with the data, see `class_set_beside`; None without such a file."""
    found = class_set_beside(folder)
    return found and found.names


def class_set_beside(*folders: str | Path) -> ClassSet | None:
    """Return the class names in the first of `CLASS_FILES` in the first of the folders that has one; else None."""
    from contrastive.data.class_joining import read_class_file

    paths = (Path(folder, name) for folder in folders for name in CLASS_FILES)
    return next((read_class_file(path) for path in paths if path.is_file()), None)


def wordnet_lines(file: str) -> list[str]:
    """Return the lines of one of timm's lists of WordNet's synsets, without loading timm."""
    missing = "the names of WordNet ids come with timm, which open_clip_torch needs too; pip install timm"
    return package_file("timm", missing, "data", "_info", file).read_text("utf-8").splitlines()


@functools.cache
def imagenet_metadata() -> ModuleType:
    """Return open_clip's module of CLIP's ImageNet prompts and class names, without the rest of the package."""
    missing = "CLIP's ImageNet prompts come with open_clip_torch; pip install open_clip_torch"
    path = package_file("open_clip", missing, "zero_shot_metadata.py")
    spec = importlib.util.spec_from_file_location("open_clip_zero_shot_metadata", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
