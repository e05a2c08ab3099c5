"""Which columns of a table hold the image, the captions and the label."""

from collections.abc import Sequence
from dataclasses import dataclass

from contrastive.errors import UserError, did_you_mean

IMAGE_COLUMNS = (
    "image", "img", "image_path", "filepath", "file_path", "path", "file_name", "filename", "jpg", "png", "webp",
)  # fmt: skip
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentence", "sentences")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "fine_label", "category")
_URL_COLUMNS = ("url", "image_url", "img_url")


@dataclass(frozen=True)
class Columns:
    """The names of the columns. None: to be found by its usual names, or there is none."""

    image: str | None = None
    caption: str | None = None
    label: str | None = None

    def names(self) -> list[str]:
        """The names there are."""
        return [name for name in (self.image, self.caption, self.label) if name]


def find_columns(names: Sequence[str], asked: Columns, where: str) -> Columns:
    """Return the columns of `names` to read: those asked for, else the first of the usual names there is.

    Usual names are compared without regard to case. `where` names the table in messages.

    Raises:
        UserError: a column that was asked for is not there, no image column, or a name that is there twice.
    """
    twice = [name for index, name in enumerate(names) if name in names[:index]]
    if twice:
        raise UserError(f"{where}: column '{twice[0]}' is there twice; the columns are: {', '.join(names)}")
    found = Columns(
        image=_find(names, asked.image, IMAGE_COLUMNS, where),
        caption=_find(names, asked.caption, CAPTION_COLUMNS, where),
        label=_find(names, asked.label, LABEL_COLUMNS, where),
    )
    if found.image is None:
        hint = f"name it with image_column (it may be called {', '.join(IMAGE_COLUMNS)})"
        if any(name.lower() in _URL_COLUMNS for name in names):
            hint = "it has web addresses only: download the images first, as img2dataset does into .tar shards"
        raise UserError(f"{where}: no image column among the columns {', '.join(names)}; {hint}")
    return found


def _find(names: Sequence[str], asked: str | None, usual: Sequence[str], where: str) -> str | None:
    if asked is not None:
        if asked not in names:
            raise UserError(
                f"{where}: no column '{asked}'; the columns are: {', '.join(names)}.{did_you_mean(asked, names)}"
            )
        return asked
    by_lower = {name.lower(): name for name in reversed(names)}
    return next((by_lower[name] for name in usual if name in by_lower), None)
