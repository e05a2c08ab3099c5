"""Read files of choices between captions, laid out as SugarCrepe's or as Winoground's."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from contrastive.data.record import BadSample, Record
from contrastive.data.sources.image_file import IMAGE_SUFFIXES, read_image_file
from contrastive.errors import UserError, did_you_mean

ONE_IMAGE = ("filename", "caption", "negative_caption")
TWO_IMAGES = ("image_0", "image_1", "caption_0", "caption_1")


class Choice(NamedTuple):
    """One entry of the file.

    images: names of one file, or of two. captions: the right one first, then the wrong ones; or of two images the
    one that belongs to each.
    """

    key: str
    images: tuple[str, ...]
    captions: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether no caption is blank."""
        return all(caption.strip() for caption in self.captions)


@dataclass(frozen=True)
class ImageFiles:
    """Image files as a source: what `embed_images` asks of one."""

    name: str
    root: Path
    files: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        """Return the file's bytes. Winoground leaves the ending away: the first kind of image there is counts."""
        file = self.files[index]
        names = (file, *(f"{file}.{suffix}" for suffix in IMAGE_SUFFIXES))
        path = next((path for path in (self.root / name for name in names) if path.is_file()), None)
        if path is None:
            raise BadSample("missing_image", file)
        return Record(file, read_image_file(str(path), file))


def read_choices(path: Path) -> list[Choice]:
    """Read a JSON file, {id: entry, ...} or a list of entries, or JSON lines; all entries of one layout.

    An entry has the fields of ONE_IMAGE ('negative_caption' may be a list of several) or those of TWO_IMAGES. A
    caption that is null counts as blank.

    Raises:
        UserError: no such file, not JSON, no entries, an id that comes twice, a missing field, or one that is no text.
    """
    try:
        text = path.expanduser().read_text("utf-8-sig")
        entries = _entries_of_lines(text, path) if path.suffix == ".jsonl" else _entries(text, path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON text ({error})") from None
    if not entries:
        raise UserError(f"{path} has no entries")
    seen: set[str] = set()
    for key, _ in entries:
        if key in seen:
            raise UserError(f"{path}: id '{key}' is there twice")
        seen.add(key)
    layout = TWO_IMAGES if "image_0" in entries[0][1] else ONE_IMAGE
    return [_choice(entry, layout, f"{path}, entry '{key}'", key) for key, entry in entries]


def _entries(text: str, path: Path) -> list[tuple[str, dict]]:
    held = json.loads(text, object_pairs_hook=_Pairs)
    if isinstance(held, _Pairs):
        named = list(held)
    elif isinstance(held, list):
        named = [_with_id(entry, place) for place, entry in enumerate(held)]
    else:
        raise UserError(f"{path}: must be a JSON object of entries by id, or a list of entries")
    return [(key, _fields(entry, f"{path}, entry '{key}'")) for key, entry in named]


def _entries_of_lines(text: str, path: Path) -> list[tuple[str, dict]]:
    entries = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            key, entry = _with_id(json.loads(line, object_pairs_hook=_Pairs), len(entries))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
        entries.append((key, _fields(entry, f"{path}, line {number}")))
    return entries


class _Pairs(list):
    """The (name, value) pairs of a JSON object: a dict would keep the last of those with one name."""


def _with_id(entry: Any, place: int) -> tuple[str, Any]:
    fields = dict(entry) if isinstance(entry, _Pairs) else {}
    return str(fields.get("id", place)), entry


def _fields(entry: Any, where: str) -> dict:
    if not isinstance(entry, _Pairs):
        raise UserError(f"{where}: must be a JSON object with the fields {', '.join(ONE_IMAGE)}")
    return dict(entry)


def _choice(entry: dict, layout: Sequence[str], where: str, key: str) -> Choice:
    missing = [name for name in layout if name not in entry]
    if missing:
        hint = did_you_mean(missing[0], entry)
        raise UserError(f"{where}: no field '{missing[0]}'; it needs {', '.join(layout)}.{hint}")
    num_images = 1 if layout is ONE_IMAGE else 2
    images = tuple(entry[name] for name in layout[:num_images])
    captions: list = []
    for name in layout[num_images:]:
        captions += entry[name] if name == "negative_caption" and isinstance(entry[name], list) else [entry[name]]
    captions = ["" if caption is None else caption for caption in captions]
    if len(captions) < 2:
        raise UserError(f"{where}: 'negative_caption' is an empty list; there is nothing to choose from")
    if not all(isinstance(text, str) for text in (*images, *captions)):
        raise UserError(f"{where}: {', '.join(layout)} have to be texts")
    return Choice(key, images, tuple(captions))
