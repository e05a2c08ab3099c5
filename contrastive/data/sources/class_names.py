"""Class names that lie beside the data."""

import json
from pathlib import Path

from contrastive.errors import UserError

CLASS_FILES = ("classes.json", "classnames.txt")


def class_names_beside(folder: Path) -> tuple[str, ...] | None:
    """Return the names in `folder`/classes.json (a list of strings) or classnames.txt (one a line), or None.

    Raises:
        UserError: the file is there but holds something else, or a name twice.
    """
    for path in (folder / name for name in CLASS_FILES):
        if path.is_file():
            return _checked(path, _read(path))
    return None


def _read(path: Path) -> object:
    try:
        text = path.read_text("utf-8-sig")
        return json.loads(text) if path.suffix == ".json" else [line.strip() for line in text.splitlines()]
    except (OSError, ValueError) as error:  # ValueError: bad UTF-8 or bad JSON
        raise UserError(f"{path}: cannot be read as class names ({error})") from None


def _checked(path: Path, names: object) -> tuple[str, ...]:
    good = isinstance(names, list) and names and all(isinstance(name, str) and name.strip() for name in names)
    if not good:
        raise UserError(f"{path}: class names must be a list of strings, one a class, in the order of the labels")
    twice = [name for index, name in enumerate(names) if name in names[:index]]
    if twice:
        raise UserError(f"{path}: class name '{twice[0]}' is there twice")
    return tuple(names)
