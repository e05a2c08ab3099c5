"""Which columns of a table hold the image, the captions and the label."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from contrastive.errors import UserError, did_you_mean

IMAGE_COLUMNS = (
    "image", "img", "image_path", "filepath", "file_path", "path", "file_name", "filename", "jpg", "png", "webp",
)  # fmt: skip
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentence", "sentences")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "fine_label", "category")
_URL_COLUMNS = ("url", "image_url", "img_url")


@dataclass(frozen=True)
class Columns:
    """The names of the columns. None: to be found by its usual names, or there is none.

    caption: a name, or several with weights, as `weighted_names` takes them. weighted: what `find_columns` made
    of that.
    """

    image: str | None = None
    caption: str | None = None
    label: str | None = None
    weighted: tuple[tuple[str, float], ...] = field(default=(), repr=False)

    @property
    def captions(self) -> tuple[str, ...]:
        """The names of the caption columns that were found."""
        return tuple(name for name, _ in self.weighted)

    def names(self) -> list[str]:
        """The names there are."""
        return [name for name in (self.image, *self.captions, self.label) if name]


def weighted_names(text: str) -> tuple[tuple[str, float], ...]:
    """Split 'alt=1,synthetic=3' into names and their weights; a name without one weighs 1.

    Raises:
        UserError: an empty or repeated name, or a weight that is not a number above 0.
    """
    parts = [(name.strip(), equals, weight.strip()) for name, equals, weight in _partitions(text)]
    names = [name for name, _, _ in parts]
    if "" in names or len(set(names)) < len(names):
        raise UserError(f"caption_column '{text}' names a column twice, or not at all; write it as 'alt=1,synthetic=3'")
    weighted = []
    for name, equals, weight in parts:
        try:
            value = float(weight) if equals else 1.0
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise UserError(f"caption_column '{text}': the weight of '{name}' is '{weight}', not a number above 0")
        weighted.append((name, value))
    return tuple(weighted)


def _partitions(text: str) -> list[tuple[str, str, str]]:
    return [part.rpartition("=") if "=" in part else (part, "", "") for part in text.split(",")]


def find_columns(names: Sequence[str], asked: Columns, where: str) -> Columns:
    """Return the columns of `names` to read: those asked for, else the first of the usual names there is.

    Usual names are compared without regard to case. `where` names the table in messages.

    Raises:
        UserError: a column that was asked for is not there, no image column, or a name that is there twice.
    """
    twice = [name for index, name in enumerate(names) if name in names[:index]]
    if twice:
        raise UserError(f"{where}: column '{twice[0]}' is there twice; the columns are: {', '.join(names)}")
    weighted = _find_captions(names, asked.caption, where)
    found = Columns(
        image=_find(names, asked.image, IMAGE_COLUMNS, where),
        caption=weighted[0][0] if len(weighted) == 1 else asked.caption,
        label=_find(names, asked.label, LABEL_COLUMNS, where),
        weighted=weighted,
    )
    if found.image is None:
        hint = f"name it with image_column (it may be called {', '.join(IMAGE_COLUMNS)})"
        if any(name.lower() in _URL_COLUMNS for name in names):
            hint = "it has web addresses only: download the images first, as img2dataset does into .tar shards"
        raise UserError(f"{where}: no image column among the columns {', '.join(names)}; {hint}")
    return found


def _find_captions(names: Sequence[str], asked: str | None, where: str) -> tuple[tuple[str, float], ...]:
    if asked is None or asked in names:  # a name may hold ',' or '='
        found = asked or _find(names, None, CAPTION_COLUMNS, where)
        return ((found, 1.0),) if found else ()
    return tuple((_find(names, name, CAPTION_COLUMNS, where), weight) for name, weight in weighted_names(asked))


def _find(names: Sequence[str], asked: str | None, usual: Sequence[str], where: str) -> str | None:
    if asked is not None:
        if asked not in names:
            raise UserError(
                f"{where}: no column '{asked}'; the columns are: {', '.join(names)}.{did_you_mean(asked, names)}"
            )
        return asked
    by_lower = {name.lower(): name for name in reversed(names)}
    return next((by_lower[name] for name in usual if name in by_lower), None)
