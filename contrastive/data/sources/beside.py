"""What lies beside an image under its key, in a shard or a folder: KEY.txt, a caption a line, KEY.json, other texts."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from functools import cached_property

from contrastive.data.record import BadSample, FaultCounts
from contrastive.data.sources.columns import shared_out, texts_in, weighted_names
from contrastive.errors import UserError, did_you_mean

CAPTION_FIELDS = ("captions", "caption")
MAX_TEXT_BYTES = 2**20
MOST_REASONS = 16

Captions = tuple[tuple[str, ...], tuple[float, ...] | None]


class Beside(ABC):
    """The files of one key. `key` names the sample in messages.

    A name of captions is a field of KEY.json, or '.' and the suffix of a file: '.txt' for KEY.txt, '.json' for the
    `CAPTION_FIELDS` of KEY.json.
    """

    key: str

    @abstractmethod
    def read(self, suffix: str, limit: int) -> bytes | None:
        """Return the bytes of KEY.suffix, None where there is none. BadSample 'too_large' above `limit`."""

    def text(self, suffix: str) -> str | None:
        data = self.read(suffix, MAX_TEXT_BYTES)
        try:
            return None if data is None else data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise BadSample("bad_utf8", self.key) from None

    @cached_property
    def fields(self) -> dict:
        """The fields of KEY.json, an empty dict where there is none. BadSample 'bad_utf8', 'bad_json'."""
        data = self.read("json", MAX_TEXT_BYTES)
        try:
            return {} if data is None else json_fields(data)
        except ValueError as error:
            raise BadSample("bad_utf8" if isinstance(error, UnicodeDecodeError) else "bad_json", self.key) from None

    def captions(self, names: Sequence[str], weights: Sequence[float] | None = None) -> Captions:
        """Return the captions and their weights, or None for weights where all captions are alike.

        weights: one for each name: the captions of all names, as `shared_out` weighs them. None: those of the first
        name that has any, as of '.txt' where KEY.json has none; if all have blank ones or none, those blank ones.
        """
        if weights:
            return shared_out([self._named(name)[0] for name in names], weights)
        found: tuple[str, ...] = ()
        for name in names:
            texts, given = self._named(name)
            if any(map(str.strip, texts)):
                return texts, _weights(given, len(texts), self.key)
            found = found or texts
        return found, None

    def _named(self, name: str) -> tuple[tuple[str, ...], object]:
        """Return the captions of one name, and whatever stands for their weights."""
        if name.startswith(".") and name != ".json":
            text = self.text(name[1:])
            return () if text is None else caption_lines(text), None
        for field in CAPTION_FIELDS if name == ".json" else (name,):
            texts = _texts(self.fields.get(field), self.key)
            if any(map(str.strip, texts)):
                return texts, self.fields.get("weights") if field == "captions" else None
        return texts, None


class FileBeside(Beside):
    """The files whose path is `stem` with a suffix."""

    def __init__(self, stem: str, key: str):
        self.stem, self.key = stem, key

    def read(self, suffix: str, limit: int) -> bytes | None:
        for ending in (suffix, suffix.upper()):
            try:
                with open(f"{self.stem}.{ending}", "rb") as file:
                    data = file.read(limit + 1)
            except OSError:
                continue
            if len(data) > limit:
                raise BadSample("too_large", self.key)
            return data
        return None


def caption_lines(text: str) -> tuple[str, ...]:
    """Return the captions of a KEY.txt: one a line, blank lines left out; of blank ones alone, that as one.

    Lines end as files have it, in '\\n', '\\r\\n' or '\\r', and in no other character that Unicode has for it.
    """
    # The end of the line belongs to the file, not to the caption.
    text = text.rstrip("\r\n")
    if "\n" not in text and "\r" not in text:
        return (text,)
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return tuple(line for line in lines if line.strip()) or (text,)


def json_fields(data: bytes) -> dict:
    """Return the fields of a KEY.json. ValueError: no JSON object; UnicodeDecodeError, which is one: no UTF-8."""
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("not an object")
    return content


def caption_names(
    asked: str, fields: Collection[str], suffixes: Collection[str], where: str
) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """Return the names of captions that `asked` means and their weights, None of a single one, as `Beside` takes them.

    asked: fields of KEY.json or suffixes of files, with weights as `weighted_names` takes them. A field goes before a
    suffix of that name, which '.txt' names too.

    Raises:
        UserError: one that is not there.
    """
    names, weights = [], []
    for name, weight in weighted_names(asked, fields):
        suffix = name.removeprefix(".").lower()
        if name not in fields and suffix not in suffixes:
            there = f"the fields there are: {', '.join(fields)}" if fields else "the samples have no JSON"
            files = ", ".join(f".{known}" for known in suffixes)
            hint = did_you_mean(name, (*fields, *suffixes))
            raise UserError(
                f"{where}: no caption field '{name}' in the JSON of the samples; {there}; "
                f"the texts beside the images are: {files or 'none'}.{hint}"
            )
        names.append(name if name in fields else f".{suffix}")
        weights.append(weight)
    return tuple(names), tuple(weights) if len(names) > 1 else None


def spoken(name: str) -> str:
    """Return a name of captions as a source's `reading` has it: "KEY.txt", "KEY.json 'alt'"."""
    return f"KEY{name}" if name.startswith(".") else f"KEY.json '{name}'"


def same_texts(lines: Sequence[str], value: object) -> bool:
    """Whether one of the two, lines of KEY.txt and a field of KEY.json, has all texts of the other, up to blanks."""
    first, second = ({" ".join(str(text).split()) for text in given} for given in (lines, texts_in(value)))
    return first <= second or second <= first


def count_aside(counts: FaultCounts, reason: str, *keys: str, count: int = 1) -> None:
    """Count what is not read by its reason; from the 17th reason on as 'other', for suffixes may be anything."""
    counts.add(reason if reason in counts or len(counts) < MOST_REASONS else "other", *keys, count=count)


def _texts(value: object, key: str) -> tuple[str, ...]:
    """Return the captions of a JSON field, none of a number. BadSample 'bad_caption'."""
    texts = texts_in(value) if isinstance(value, str | list | dict) else []
    if not all(isinstance(text, str) for text in texts):
        raise BadSample("bad_caption", key)
    return tuple(texts)


def _weights(value: object, count: int, key: str) -> tuple[float, ...] | None:
    """Return the weights beside `count` captions, None where there are none. BadSample 'bad_weights'."""
    if value is None:
        return None
    numbers = value if isinstance(value, list) else []
    good = len(numbers) == count and all(type(number) in (int, float) and number >= 0 for number in numbers)
    if not good or not 0 < sum(numbers) < math.inf:
        raise BadSample("bad_weights", key)
    return tuple(map(float, numbers))
