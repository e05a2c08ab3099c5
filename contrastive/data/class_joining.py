"""Class names that come from two places, joined by name: those of data with those given for them, or of other data."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contrastive.data.class_sets import (
    CLASS_FILES,
    IMAGENET,
    ClassSet,
    are_lemmas,
    bare_names,
    class_set,
    class_sets,
    is_wordnet_id,
    name_key,
    places_of,
    wordnet_lines,
)
from contrastive.data.prompts import check_no_code, load_templates
from contrastive.data.record import Source, some_have
from contrastive.data.sources.derived import Renamed
from contrastive.errors import UserError, did_you_mean
from contrastive.log import warn

MOST_SHOWN = 5
MOST_PAIRS = 100  # where nothing but their order has joined them
IN_ORDER = "in the order of the classes, since no name is in both"
PARTS_OF_IMAGENET = ("imagenette", "imagewoof")

_ID_LIKE = re.compile(r"n\d{8}|(?:class|label|cls|category|id)?[ _-]?\d+|(?=.*\d)[0-9a-fA-F-]{8,}")
# Lines that say which class they name: 'n01440764 tench, Tinca tinca', 'n02119789 1 kit_fox', '0: cat'; 'cat 0'.
_KEYED_LINES = (
    re.compile(r"(?P<key>n\d{8}|\d+)(?:[\s,:;]+(?:\d+\s+)?(?P<name>\S.*))?"),
    re.compile(r"(?P<name>\S.*?)[\s,:;=]+(?P<key>\d+)"),
)


def load_class_set(name_or_file: str | Path) -> ClassSet:
    """Return a set by its name (see `class_sets`), or the names in a file; UserError where there is neither."""
    path, known = Path(name_or_file).expanduser(), class_sets()
    if str(name_or_file) in known:
        return class_set(str(name_or_file))
    if path.exists():
        return read_class_file(path)
    hint = did_you_mean(str(name_or_file), known)
    raise UserError(f"{name_or_file}: neither a file nor a set of class names ({', '.join(known)}).{hint}")


def spoken_names(names: Sequence[str], sets: Sequence[str] = PARTS_OF_IMAGENET) -> tuple[str, ...] | None:
    """Return class names with each WordNet id as WordNet says it, ImageNet's as CLIP does; None where all are spoken.

    Where two would be called alike, all that WordNet calls them is said. An id that it does not know stays as it is.
    The classes of one of `sets` go by its names, WordNet's own of all ImageNet by CLIP's, '001.Laysan_Albatross' by
    what follows the number.
    """
    if are_lemmas(names):
        return class_set(IMAGENET).names
    ids = {name for name in names if is_wordnet_id(name)}
    if not ids:
        return bare_names(names)
    for known in map(class_set, sets):
        if places := known.places(names):
            return tuple(known.names[place] for place in places)
    known = class_set("imagenet")
    said = {own: name for own, name in zip(known.own_names, known.names, strict=True) if own in ids}
    if ids - said.keys():
        lines = (line.partition("\t")[::2] for line in wordnet_lines("imagenet_synset_to_lemma.txt"))
        synonyms = {own: text for own, text in lines if own in ids and own not in said}
        said |= _told_apart({own: text.split(", ") for own, text in synonyms.items()}, set(said.values()))
    return tuple(said.get(name, name) for name in names)


def _told_apart(synonyms: dict[str, list[str]], taken: set[str]) -> dict[str, str]:
    """The first synonym of each where it is its alone, else all of them, and the id where those are shared too."""
    said: dict[str, str] = {}
    for say in ("{0}", "{1}", "{1} ({2})"):
        texts = {own: say.format(words[0], ", ".join(words), own) for own, words in synonyms.items() if own not in said}
        times = Counter((*texts.values(), *taken, *said.values()))
        said |= {own: text for own, text in texts.items() if times[text] == 1}
    return said


def like_ids(names: Sequence[str]) -> list[str]:
    """Return the class names that say nothing to a text tower: numbers and hashes, where most are such; WordNet ids."""
    found = [name for name in names if _ID_LIKE.fullmatch(name)]
    return found if 2 * len(found) > len(names) else list(filter(is_wordnet_id, found))


def read_class_file(path: Path) -> ClassSet:
    """Read class names: a name a line or a JSON list, in the order of the labels; or by what the data call the classes.

    The latter are lines as 'n01440764 tench, Tinca tinca' (the first synonym counts) or '0: airplane' (from 0 or 1 on),
    or JSON as {"1": "pink primrose"}, {"cat": 0} or {"0": ["n01440764", "tench"]}. Ids without a name are spoken.

    UserError: not text, something else in it, an empty name, or a name that comes twice.
    """
    try:
        text = path.read_text("utf-8-sig")
        names = json.loads(text) if path.suffix == ".json" else text.rstrip().split("\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # bad UTF-8 or bad JSON
        raise UserError(f"{path}: not a list of names, one a line or as JSON ({error})") from None
    keys: Sequence[str] | None = None
    if isinstance(names, dict) and isinstance(names.get("id2label"), dict):  # of a model's config.json
        names = names["id2label"]
    if isinstance(names, dict) and names:
        keys, names = list(names), list(names.values())
        if all(type(number) is int for number in names):  # torchvision's class_to_idx
            keys, names = list(map(str, names)), keys
        if all(map(_is_number, keys)):
            keys, names = zip(*sorted(zip(keys, names, strict=True), key=lambda pair: int(pair[0])), strict=True)
        if all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in names):
            keys, names = zip(*names, strict=True)
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        how = "a JSON list, or one a line; or a JSON object with a name for each class"
        raise UserError(
            f"{path}: class names must be a list of strings, one a class, in the order of the labels; {how}"
        )
    names = [name.strip() for name in names]
    check_no_code(str(path), names)
    empty = next((number for number, name in enumerate(names, start=1) if not name), None)
    if empty:
        raise UserError(f"{path}: class {empty} has no name; blank lines shift the others")
    keys, names = _keys_in_lines(names) if keys is None else (keys, names)
    if bare := bare_names(names):  # '1. cat', and what follows the number in CUB's '1 001.Laysan_Albatross'
        keys, names = (bare if keys is names else keys), bare
    if len(set(keys)) == len(keys) and all(map(is_wordnet_id, keys)):
        return ClassSet(str(path), "", _by_wordnet(keys, names), tuple(keys))
    first: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if name in first:
            pair = f"class {first[name]} and class {number}"
            raise UserError(f"{path}: '{name}' names both {pair}; class name '{name}' is there twice")
        first[name] = number
    return ClassSet(str(path), "", tuple(names), tuple(keys))


def _is_number(key: str) -> bool:
    return key.isdecimal() and len(key) < 20  # int() takes no more than 4,300 digits


def _keys_in_lines(lines: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Split 'n01440764 tench' or '0: airplane' into keys and names, if all lines are such; else the lines are both."""
    for form in _KEYED_LINES:
        found = [form.fullmatch(line) for line in lines]
        if all(found):
            keys, names = zip(*((line["key"], line["name"] or "") for line in found), strict=True)
            numbers = list(map(int, keys)) if all(names) and all(map(_is_number, keys)) else []
            in_order = numbers in (list(range(len(keys))), list(range(1, len(keys) + 1)))
            if (in_order and len(set(names)) > 1) or all(map(is_wordnet_id, keys)):
                return keys, names
    return lines, lines


def _by_wordnet(ids: Sequence[str], texts: Sequence[str]) -> tuple[str, ...]:
    """The first synonym of each id; what `spoken_names` says where others share that, or where there is no text."""
    words = {own: text.split(", ") for own, text in zip(ids, texts, strict=True) if text not in ("", own)}
    said = {own: name for own, name in _told_apart(words, set()).items() if name == words[own][0]}
    rest = [own for own in ids if own not in said]
    said |= zip(rest, spoken_names(rest, ()) or (), strict=True)
    return tuple(said[own] for own in ids)


def join(
    given: ClassSet, own: Sequence[str] | None, also: Sequence[str] | None = None, of: str = "the data"
) -> tuple[tuple[str, ...], str]:
    """Return a name out of `given` for each class of data, and in words how it was found.

    Args:
        own: what the data call their classes, in the order of their labels; None where they are numbers only.
        also: other names that these go by. of: whose classes they are, for messages.

    Names, WordNet ids and numbers are joined to the same, whatever their order; of a set, or a file that says which
    class each name is for, a part will do. A list of as many names of which none is known is taken in its order.

    UserError: another number of names, only a part of them known, or numbers that may count from 0 or from 1.
    """
    if own is None:
        keys = () if given.is_list or given.templates else given.own_names
        if all(map(str.isdecimal, keys)) and list(map(int, keys)) != list(range(len(keys))):
            raise UserError(f"{given.name}: names of the numbers {keys[0]} to {keys[-1]}, but labels count from 0 up")
        return given.names, "by label"
    ids = [name[:9] for name in own]  # of 'n02085620-Chihuahua'
    for known in (own, also, spoken_names(own), spoken_names(own, ()), ids if all(map(is_wordnet_id, ids)) else None):
        places = known and given.places(known, part=not given.is_list)
        if places:
            return tuple(given.names[place] for place in places), "by name"
    ordered = given.is_list or given.templates or all(map(is_wordnet_id, given.own_names))  # not a file with own keys
    if all(map(str.isdecimal, own)) and ordered:
        return _by_number(given, [int(name) for name in own])
    own = spoken_names(own) or own
    shared = set(map(name_key, own)) & set(map(name_key, (*given.names, *given.own_names)))
    if shared or not given.is_list or len(own) != len(given.names):
        raise UserError(_what_is_missing(given, own, of))
    return given.names, IN_ORDER


def _by_number(given: ClassSet, numbers: list[int]) -> tuple[tuple[str, ...], str]:
    count, low, high = len(given.names), min(numbers), max(numbers)
    if low == 0 and high < count and len(set(numbers)) == len(numbers):
        return tuple(given.names[number] for number in numbers), "by number, from 0"
    if sorted(numbers) == list(range(1, count + 1)):
        return tuple(given.names[number - 1] for number in numbers), "by number, from 1"
    if high >= count:
        raise UserError(f"{count} class names given, but a class is numbered {high}: {given.name} has no name for it")
    told = f"{count} class names given, but the classes are numbered {low} to {high}, which may count from 0 or from 1"
    raise UserError(f'{given.name}: {told}; give a JSON file that says it, as {{"{low}": "{given.names[low]}"}}')


def _what_is_missing(given: ClassSet, own: Sequence[str], of: str) -> str:
    places = list(zip(places_of(own, given.names), places_of(own, given.own_names), strict=True))
    known = {place for at in places for place in at}
    unnamed = [name for name, at in zip(own, places, strict=True) if at == (None, None)]
    unused = [name for place, name in enumerate(given.names) if place not in known and given.is_list]
    told = f"{len(given.names)} class names given, but {of} has {len(own)} classes"
    if len(given.names) == len(own):
        told = f"the class names given and the {len(own)} of {of} are the same in part only"
    told += f"; without a name there: {_some(unnamed)}; without a class in the data: {_some(unused)}"
    return f'{given.name}: {told}. Give the same names, or a JSON file as {{"{own[0]}": "a name"}}'


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:MOST_SHOWN]) or "none"
    return shown + (f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else "")


def named(source: Source, classes: str | None) -> Source:
    """Return a labelled source under the names of `classes`, None for those of its WordNet ids, and say so."""
    members, how = members_under(source, None if classes is None else load_class_set(classes))
    if how:
        told = f"class names of {classes}, {how}" if classes else f"class names {how}"
        most = MOST_PAIRS if how == IN_ORDER else MOST_SHOWN
        told += pairs_of(members["own_names"], members["class_names"], most)
        members["reading"] = _with(source, told)
    return Renamed(source, **members)


def _with(source: Source, told: str) -> str:
    return f"{source.reading}; {told}" if source.reading else told


def members_under(data: Any, given: ClassSet | None) -> tuple[dict[str, Any], str]:
    """Return 'class_names', 'own_names' and 'templates' of labelled data under other names, and how these were joined.

    data: a Source, or whatever else has these three and a name. given: None: its own names, with WordNet ids spoken.
    Raises UserError as `join` does.
    """
    own, names = data.own_names or data.class_names, data.class_names
    spoken, of_wordnet = spoken_names(own or ()), any(map(is_wordnet_id, own or ())) or are_lemmas(own or ())
    if given is not None:
        names, how = join(given, own, names, data.name)
    elif spoken and names == own:
        names, how = spoken, "by WordNet id" if of_wordnet else "without their numbers"
    else:
        own, how = data.own_names, ""
    templates = data.templates
    fitting = "imagenet" if of_wordnet else given.templates if given else ""
    if not templates and fitting:
        templates = load_templates(fitting)
    return {"class_names": names, "own_names": own, "templates": templates}, how


def pairs_of(own: Sequence[str] | None, names: Sequence[str], most: int = MOST_PAIRS) -> str:
    """Say which class goes by which name, but for those that are called so."""
    differ = [(a, b) for a, b in zip(own or (), names, strict=False) if name_key(a) != name_key(b)]
    shown = ", ".join(f"{a} → {b}" for a, b in differ[:most])
    more = f" and {len(differ) - most} more" if len(differ) > most else ""
    return f": {shown}{more}" if differ else ""


def places_among(classes: Sequence[str], data: Any) -> tuple[int, ...] | None:
    """Return which of `classes` each class of labelled data is, None where one is none of them."""
    for theirs in (data.class_names, data.own_names, spoken_names(data.class_names)):
        for mine in (classes, spoken_names(classes), spoken_names(classes, ())):
            if theirs and mine and None not in (places := places_of(theirs, mine)):
                return places
    return None


def in_classes_of(own: Sequence[str] | None, owner: str, source: Source) -> Source:
    """Return `source` with the labels that its classes have among `own`, those of `owner`: a model, or other data.

    Numbers are taken as they are where `own` is None. UserError: a class that is none of `own`, or without a name.
    """
    others = source.class_names
    if others is None:
        if own is None or not some_have(source, lambda index: source.label(index) is not None):
            return source
        raise UserError(
            f"{source.name} has labels without class names: nothing says which of the {len(own)} classes of {owner} "
            f"they are; put {' or '.join(CLASS_FILES)} beside the data or one folder up"
        )
    if own is None:
        return Renamed(source, others, reading=_with(source, f"labels as they are, since {owner} names no classes"))
    if tuple(own) == tuple(others) or (places := places_among(own, source)) == tuple(range(len(own))):
        return source
    if places:
        how = f"its {len(others)} classes are joined to the {len(own)} of {owner} by name"
        return Renamed(source, tuple(own), places, own_names=None, reading=_with(source, how))
    unknown = [number for number, place in enumerate(places_of(others, own)) if place is None]
    if len(own) != len(others):
        counts = f"{source.name} has {len(others)} classes, but {owner} has {len(own)}"
        raise UserError(f"{counts}; none of these: {_some([others[number] for number in unknown])}")
    what = f"class {unknown[0]} is '{others[unknown[0]]}' in {source.name}, but '{own[unknown[0]]}' in {owner}"
    raise UserError(f"{what}; their labels mean different things")


def check_classes(sources: Sequence[Source], asked: dict[str, str | None]) -> None:
    """Warn of class names that say nothing as prompts, where prompts are to be made of them.

    asked: the flags of labelled data ('data.classes', 'data.templates') and what they say; the first names classes.

    UserError: a flag of labelled data where nothing is labelled; labels without names or captions.
    """
    parts = [part for source in sources for part in source.parts]
    for part in parts:
        captioned = some_have(part, part.captions) if part.captioned is None else part.captioned
        if not captioned and not part.class_names:
            if part.masked and not part.labelled:
                raise UserError(f"{part.name} has masks, for contrastive evaluate, but neither captions nor labels")
            what = f"{part.name} has labels, but neither captions nor class names"
            flag = next(iter(asked))
            raise UserError(f"{what}: give --{flag} a set or file of them, or put a classnames.txt beside the data")
        if part.prompted:
            warn_of_ids(part)
    for option, value in asked.items():
        if value is not None and not any(part.class_names for part in parts):
            raise UserError(f"--{option} {value} is for labelled data, and nothing here has labels; leave it out")


def warn_of_ids(source: Source) -> None:
    """Warn of class names that say nothing to a text tower."""
    if found := like_ids(source.class_names or ()):
        told = f"{len(found)} of {len(source.class_names)} class names look like ids, as '{found[0]}'"
        warn(f"{source.name}: {told}, and prompts say nothing but that; name them with classes (a set or a file)")
