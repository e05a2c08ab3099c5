"""What words of open_clip, transformers and timm are called here, from the table in words.md."""

import functools
import re
from importlib.resources import files


@functools.cache
def table() -> tuple[tuple[str, tuple[str, ...], str], ...]:
    """Return the rows of words.md: where the words are looked for, the words, what there is instead."""
    rows = re.findall(
        r"^\| (?!in |---)(.+?) \| (`.+?`) \| (.+) \|$", files("contrastive").joinpath("words.md").read_text(), re.M
    )
    return tuple((place, tuple(words.replace("`", "").split()), ours) for place, words, ours in rows)


def called_here(place: str, word: str) -> str:
    """Return ": here it is ..." for a word of another library that is looked for in `place`; "" for an unknown one."""
    found = (ours for where, words, ours in table() if where == place and word in words)
    return next((f": here it is {ours.replace('{}', word)}" for ours in found), "")


def no_attribute(place: str, owner: object, word: str) -> AttributeError:
    """Return what to raise for an attribute that `owner` has not."""
    return AttributeError(f"'{type(owner).__name__}' object has no attribute '{word}'{called_here(place, word)}")
