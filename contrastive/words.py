"""The flags on a command line; what words and flags of open_clip, transformers and timm are here, from words.md."""

import functools
import re
from collections.abc import Collection, Sequence
from importlib.resources import files
from typing import NamedTuple


class Flag(NamedTuple):
    """A flag on a command line."""

    typed: str
    """As it was typed, without a value: '--accum-freq'."""
    name: str
    """'accum_freq'; '' of a word that is no flag."""
    value: str
    """What stands behind its '=', else the word after it, unless that is a flag too."""


def flags_of(args: Sequence[str]) -> list[Flag]:
    """Return a Flag for each word of a command line."""
    flags = []
    for arg, after in zip(args, [*args[1:], ""], strict=False):
        typed, equals, value = arg.partition("=")
        name = typed[2:].replace("-", "_") if typed.startswith("--") else ""
        flags.append(Flag(typed, name, value if equals else "" if after.startswith("--") else after))
    return flags


@functools.cache
def table() -> tuple[tuple[str, tuple[str, ...], str], ...]:
    """Return the rows of words.md: where the words are looked for, the words, what there is instead."""
    text = (files("contrastive") / "words.md").read_text("utf-8")
    rows = re.findall(r"^\| (.+?) \| (`.+?`) \| (.+) \|$", text, re.MULTILINE)
    split = ((places.split(), tuple(words.replace("`", "").split()), ours) for places, words, ours in rows)
    return tuple((place, words, ours) for places, words, ours in split for place in places)


def answers(place: str, word: str, written: str) -> list[str]:
    """Return what the table has for a word in `place`, with `written` in the place of {}."""
    return [ours.replace("{}", written) for where, words, ours in table() if where == place and word in words]


def called_here(place: str, word: str) -> str:
    """Return ": here it is ..." for a word of another library that is looked for in `place`; "" for an unknown one."""
    return next((f": here it is {ours}" for ours in answers(place, word, word)), "")


def no_attribute(place: str, owner: object, word: str) -> AttributeError:
    """Return what to raise for an attribute that `owner` has not."""
    return AttributeError(f"'{type(owner).__name__}' object has no attribute '{word}'{called_here(place, word)}")


def flag_here(flag: Flag, known: Collection[str]) -> str:
    """Return "--accum-freq 4 is --train.accumulate 4 here." for a flag of another library; "" for an unknown one.

    known: the names of the flags that there are; a row about another one is passed over.
    """
    rows = answers("flag", f"{flag.name}={flag.value}", flag.value) + answers("flag", flag.name, flag.value or "...")
    for ours in rows:
        target = re.match(r"--([\w.-]+)", ours)
        if target is None:
            return f"{flag.typed}: {ours}."
        if target[1] in known:
            return f"{flag.typed} {flag.value}".rstrip() + f" is {ours} here."
    return ""
