"""What words of open_clip, transformers and timm are called here, from the table in words.md."""

import functools
import re
from collections.abc import Collection
from importlib.resources import files


@functools.cache
def table() -> tuple[tuple[str, tuple[str, ...], str], ...]:
    """Return the rows of words.md: where the words are looked for, the words, what there is instead."""
    text = (files("contrastive") / "words.md").read_text("utf-8")
    rows = re.findall(r"^\| (.+?) \| (`.+?`) \| (.+) \|$", text, re.MULTILINE)
    return tuple((place, tuple(words.replace("`", "").split()), ours) for place, words, ours in rows)


def called_here(place: str, word: str) -> str:
    """Return ": here it is ..." for a word of another library that is looked for in `place`; "" for an unknown one."""
    found = (ours for where, words, ours in table() if where == place and word in words)
    return next((f": here it is {ours.replace('{}', word)}" for ours in found), "")


def no_attribute(place: str, owner: object, word: str) -> AttributeError:
    """Return what to raise for an attribute that `owner` has not."""
    return AttributeError(f"'{type(owner).__name__}' object has no attribute '{word}'{called_here(place, word)}")


def flag_here(flag: str, after: str, known: Collection[str]) -> str:
    """Return "--accum-freq 4 is --train.accumulate 4 here." for a flag of another library; "" for an unknown one.

    Args:
        flag: as typed, '--accum-freq' or '--accum-freq=4'. after: the word after it.
        known: the flags that there are, without dashes; a row about another one is passed over.
    """
    typed, equals, value = flag.partition("=")
    value = value if equals else "" if after.startswith("--") else after
    name, known = typed.removeprefix("--").replace("-", "_"), {one.replace("-", "_") for one in known}
    for word in (f"{name}={value}", name):
        for ours in (ours for place, words, ours in table() if place == "flag" and word in words):
            target = re.match(r"--([\w.-]+)", ours)
            if target is None:
                return f"{typed}: {ours.replace('{}', value)}."
            if target[1].replace("-", "_") in known:
                return f"{typed} {value}".rstrip() + f" is {ours.replace('{}', value or '...')} here."
    return ""
