"""Options that are called something else by now."""

from dataclasses import dataclass, field

import pytest

from contrastive.config import Gone, parse
from contrastive.errors import UserError


@dataclass(frozen=True)
class House:
    rooms: int = 3
    """How many."""


@dataclass(frozen=True)
class Garden:
    RENAMED = {"size": "plot.rooms", "fence": Gone(True)}

    plot: House = field(default_factory=House)
    beds: int = 2
    """How many."""


@dataclass(frozen=True)
class Estate:
    RENAMED = {"beds": "garden.beds"}

    garden: Garden = field(default_factory=Garden)


def estate(*args, file=None, base=None):
    return parse(Estate, list(args), file, prog="t", description="", base=base)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("garden: {size: 3}", "{path}: garden.size is garden.plot.rooms now"),
        ("beds: 3", "{path}: beds is garden.beds now"),
        ("garden: {fence: true}", "{path}: garden.fence is no option any more: it is always True"),
    ],
)
def test_old_names_are_told_by_the_new_ones(file, text, line):
    with pytest.raises(UserError) as error:
        estate(file=file(text))
    assert str(error.value) == line.format(path=file(text))


def test_old_flags_are_told_by_the_new_ones():
    for flag, line in [
        ("--garden.size", "--garden.size is --garden.plot.rooms now"),
        ("--beds=3", "--beds is --garden.beds now"),
        ("--garden.fence", "--garden.fence is no option any more: it is always True"),
    ]:
        with pytest.raises(UserError) as error:
            estate(flag)
        assert str(error.value) == line


def test_old_names_count_in_files_that_the_program_wrote(file):
    old = "beds: 5\ngarden: {fence: true}"
    assert estate(base=file(old)).garden == Garden(beds=5)
    assert estate("--garden.beds", "6", base=file(old)).garden.beds == 6
    assert estate(base=file("beds: 5\ngarden: {beds: 4}")).garden.beds == 4
    with pytest.raises(UserError, match="garden.fence is False, but is no option any more: it is always True"):
        estate(base=file("garden: {fence: false}"))
