"""Which columns of a table, of whichever kind, hold image, captions and label, and whether they can."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from contrastive.data.record import Source
from contrastive.data.sources.paths import IMAGE_SUFFIXES
from contrastive.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_COLUMNS = (
    "image", "img", "image_path", "filepath", "file_path", "path", "file_name", "filename", "jpg", "png", "webp",
    "image_name", "image_file", "img_path", "pixel_values",
)  # fmt: skip
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentence", "sentences")
CAPTION_KEYS = ("raw", *CAPTION_COLUMNS)  # of the dicts that COCO's captions come in
_RARE_CAPTIONS = re.compile(r"(?:caption|text|sentence|title)s?[ _]?\d+|raw|comment|prompt|description")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "fine_label", "category")
MASK_COLUMNS = ("mask", "mask_path", "segmentation_mask", "annotation")
_URL_COLUMNS = ("url", "image_url", "img_url")
_PICTURES = ("struct<bytes", "binary", "large_binary")  # types as Arrow prints them
_NUMBERS = ("int", "uint", "float", "half", "double", "decimal", "bool", "numbers", "null")
_LIST_CELL = re.compile(r"\[.*\]")
_NO_NUMBER = ("nan", "na", "n/a", "null", "none")


@dataclass(frozen=True)
class Columns:
    """The names of the columns. None: to be found by its usual names, or there is none.

    caption: a name, or several with weights, as `weighted_names` takes them. weighted: what `find_columns` made
    of that: names and weights. passed_over: what was taken and another column that might have been, ('caption',
    'title'). split: a column that tells splits apart. Image, caption and label go into the fingerprints of tables as
    `repr` prints them; the others do not.
    """

    image: str | None = None
    caption: str | None = None
    label: str | None = None
    weighted: tuple[tuple[str, float], ...] = field(default=(), repr=False)
    passed_over: tuple[tuple[str, str], ...] = field(default=(), repr=False, compare=False)
    split: str = field(default="", repr=False, compare=False)
    mask: str | None = field(default=None, repr=False)

    def names(self) -> list[str]:
        """The names there are."""
        return [name for name in (self.image, *dict(self.weighted), self.label, self.mask) if name]

    def __str__(self) -> str:
        """What was taken for what, and instead of what."""
        said = []
        kinds = ("image", self.image), ("caption", self.caption), ("label", self.label), ("mask", self.mask)
        for what, name in kinds:
            others = ", ".join(f"'{other}'" for taken, other in self.passed_over if taken == name)
            if name:
                said.append(f"{what}: column '{name}'" + (f" (not {others})" if others else ""))
        return ", ".join(said) + (f"; rows of every '{self.split}' are taken" if self.split else "")


def find_columns(held: Sequence[tuple[str, str]], asked: Columns, where: str) -> Columns:
    """Return the columns to read: those asked for, else the first of the usual names there is.

    Usual names are compared without regard to case; images and captions are not looked for in numbers or nulls where
    another column of a usual name holds something else. Where there are neither captions nor labels, captions are also
    looked for in 'caption_0', 'caption_1', ... and a few other names.

    Args:
        held: name and type of every column, a type as Arrow prints it, or 'text' and 'numbers' where it has none.
        where: names the table in messages.

    Raises:
        UserError: a column that was asked for is not there, no image column, neither captions nor labels, or a name
            that is there twice.
    """
    names, there = [name for name, _ in held], ", ".join(f"{name} ({kind})" for name, kind in held)
    twice = [name for index, name in enumerate(names) if name and name in names[:index]]
    if twice:
        raise UserError(f"{where}: column '{twice[0]}' is there twice; the columns are: {', '.join(names)}")
    images, captions = _usual(held, IMAGE_COLUMNS), _usual(held, CAPTION_COLUMNS)
    labels = _usual(held, LABEL_COLUMNS, numbers_too=True)
    rare = [] if captions or labels else [name for name in names if _RARE_CAPTIONS.fullmatch(name.lower())]
    weighted = tuple((name, 1.0) for name in captions[:1] or rare)
    if asked.caption is not None:
        weighted = weighted_names(asked.caption, names)
    for name in (*dict(weighted), asked.image):
        if name is not None and name not in names:
            hint = did_you_mean(name, names)
            raise UserError(f"{where}: no column '{name}'; the columns are: {', '.join(names)}.{hint}")
    found = Columns(
        image=asked.image or next(iter(images), None),
        caption=weighted[0][0] if len(weighted) == 1 else asked.caption or ", ".join(rare) or None,
        label=next(iter(labels), None),
        weighted=weighted,
        passed_over=tuple(
            (usual[0], other)
            for usual, chosen in ((images, asked.image), (captions, asked.caption), (labels, None))
            if not chosen
            for other in usual[1:]
        ),
        split=next((name for name in names if name.lower() == "split"), ""),
        mask=_mask_column(held, {*dict(weighted), asked.image}),
    )
    if found.image is None:
        hint = f"name it with image_column (it may be called {', '.join(IMAGE_COLUMNS)})"
        if any(f".{suffix}" in name.lower() for name in names for suffix in IMAGE_SUFFIXES):
            hint = "the first line has to name the columns, as 'image,caption'"
        if any(name.lower() in _URL_COLUMNS for name in names):
            hint = "it has web addresses only: download the images first, as img2dataset does into .tar shards"
        raise UserError(f"{where}: no image column among the columns {', '.join(names)}; {hint}")
    if not weighted and not found.label and not found.mask:
        raise UserError(
            f"{where} has neither captions nor labels: its columns are {there}; name that of the captions with "
            f"caption_column (it may be called {', '.join(CAPTION_COLUMNS)}), or call that of the labels one of "
            f"{', '.join(LABEL_COLUMNS)}"
        )
    return found


def _usual(held: Sequence[tuple[str, str]], usual: Sequence[str], numbers_too: bool = False) -> list[str]:
    """Return the columns of usual names, the one to take first."""
    by_lower = {name.lower(): (name, kind) for name, kind in reversed(held)}
    found = [by_lower[name] for name in usual if name in by_lower]
    if not numbers_too:
        found.sort(key=lambda column: column[1].startswith(_NUMBERS))
    return [name for name, _ in found]


def _mask_column(held: Sequence[tuple[str, str]], taken: Collection[str | None]) -> str | None:
    """Return the column of masks: pictures, or by its name paths. A text called 'annotation' may say anything."""
    for name in _usual(held, MASK_COLUMNS):
        kind = dict(held)[name]
        paths = name.lower() != "annotation" and kind in ("text", "string", "large_string")
        if name not in taken and (paths or kind.startswith(_PICTURES)):
            return name
    return None


def texts_in(value: object) -> list:
    """Return the captions in a cell or a JSON field: a text, a dict of one ({"raw": "a dog"}), or a list of either.

    Nulls are left out. What is no text stays, for the caller to refuse.
    """
    if isinstance(value, list):
        return [text for part in value for text in texts_in(part)]
    known = [name for name in CAPTION_KEYS if name in value] if isinstance(value, dict) else []
    if known:
        return texts_in(value[known[0]])
    return [] if value is None else [value]


def listed(text: str) -> Any:
    """The list that `text` is, else something that is no caption."""
    try:
        return json.loads(text)
    except ValueError:
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [False]
        # What numpy prints has no commas, and its texts would run together.
        return value if repr(value) == text.strip() else [False]


def shared_out(
    captions: Iterable[Sequence[str]], weights: Iterable[float]
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Return the captions of several names in one row, each with its even share of its name's weight.

    [("a",), ("b", "c")] and weights 1, 4 are ("a", "b", "c") and 1, 2, 2.
    """
    shares = [(text, weight / len(texts)) for texts, weight in zip(captions, weights, strict=True) for text in texts]
    return tuple(text for text, _ in shares), tuple(share for _, share in shares)


def weighted_names(text: str, held: Collection[str]) -> tuple[tuple[str, float], ...]:
    """Split 'alt=1,synthetic=3' into names and their weights; a name without one weighs 1.

    held: names that there are: one of them is taken as it stands, for it may hold ',' or '='.

    Raises:
        UserError: an empty or repeated name, or a weight that is not a number above 0.
    """
    if text in held:
        return ((text, 1.0),)
    weighted: dict[str, float] = {}
    for part in text.split(","):
        name, weight = (side.strip() for side in (part.rpartition("=")[::2] if "=" in part else (part, "1")))
        if not name or name in weighted:
            raise UserError(
                f"caption_column '{text}' names a column twice, or not at all; write it as 'alt=1,synthetic=3'"
            )
        try:
            weighted[name] = float(weight)
        except ValueError:
            weighted[name] = math.nan
        if not 0 < weighted[name] < math.inf:
            raise UserError(f"caption_column '{text}': the weight of '{name}' is '{weight}', not a number above 0")
    return tuple(weighted.items())


def check_columns(sources: Sequence[Source], asked: Mapping[str, str | None]) -> None:
    """Raise UserError for an image_column or caption_column where none of the sources has what it chooses from.

    asked: what the two were given, by the names of the options, None where one was not.
    """
    read = {name for source in sources for part in source.parts for name in part.columns_read}
    lacking = {"image_column": "columns", "caption_column": "texts to choose from"}
    for option, column in asked.items():
        name = option.rpartition(".")[2]
        if column is not None and name not in read:
            raise UserError(f"{option} has no effect: {sources[0].name} has no {lacking[name]}; leave it out")


# What a column holds


def is_text(column_type: pa.DataType) -> bool:
    from pyarrow import types

    return types.is_string(column_type) or types.is_large_string(column_type) or types.is_string_view(column_type)


def check_types(columns: Columns, types: Mapping[str, pa.DataType], where: str) -> None:
    """Raise UserError where the image column holds no images, or a caption column no texts."""
    from pyarrow import types as kinds

    held = types[columns.image]
    # The image format of `datasets` is a struct of bytes and path.
    packed = kinds.is_struct(held) and any(field.name == "bytes" and not is_text(field.type) for field in held)
    if not (packed or is_text(held) or kinds.is_binary(held) or kinds.is_large_binary(held)):
        raise UserError(
            f"{where}: column '{columns.image}' holds {held}; images must be paths, bytes or an Image feature"
        )
    for caption, _ in columns.weighted:
        inner = held = types[caption]
        while inner is not None and kinds.is_nested(inner):
            known = [name for name in CAPTION_KEYS if kinds.is_struct(inner) and inner.get_field_index(name) >= 0]
            inner = inner.field(known[0]).type if known else getattr(inner, "value_type", None)
        if inner is None or not (is_text(inner) or kinds.is_null(inner)):
            raise UserError(
                f"{where}: column '{caption}' holds {held}; captions must be texts or lists of texts; of a dict "
                f"{' or '.join(CAPTION_KEYS)} is read; name another column with caption_column"
            )


def read_labels(
    column: pa.ChunkedArray, class_names: tuple[str, ...] | None, where: str
) -> tuple[np.ndarray | None, tuple[str, ...] | None, str]:
    """Return (labels int64, -1 for none; class names; ''), or (None, None, what the column holds instead of labels).

    Whole numbers are labels, as 1, 1.0, '1' or True; null, NaN and what is below 0 is none. Other texts are class
    names, of `class_names` or else of the sorted distinct texts.

    Raises:
        UserError: a label outside `class_names`, or bad UTF-8.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_binary(column.type) or is_text(column.type):
        try:
            column = pc.utf8_trim_whitespace(column.cast(pa.string()))
            present = sorted(name for name in pc.unique(column).to_pylist() if name)
            if several := next(filter(partial(_says_several, known=set(present)), present), ""):
                return None, None, f"several labels in a cell, as '{several}'; a label is one whole number or one text"
            column, class_names = _numbered(column, present, class_names, where)
        except (pa.ArrowInvalid, UnicodeDecodeError):
            raise UserError(f"{where}: the labels are not UTF-8 text") from None
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_null(column.type)):
        return None, None, f"{column.type}; a label is one whole number or one text"
    try:
        labels = pc.fill_null(column.cast(pa.int64()), -1).to_numpy()
    except pa.ArrowInvalid:
        return None, None, f"{column.type}s that are no whole numbers"
    if labels.max(initial=-1) < 0:
        return None, None, "not a single label"
    if class_names and labels.max() >= len(class_names):
        raise UserError(f"{where}: label {labels.max()}, but there are {len(class_names)} class names")
    return np.maximum(labels, -1), class_names, ""


def _says_several(label: str, known: Collection[str]) -> bool:
    """Whether a label is a list: in brackets, of others that occur, or with bars between any that does."""
    parts = [part.strip() in known for part in re.split(r"[|;,]", label)]
    return bool(_LIST_CELL.fullmatch(label)) or (len(parts) > 1 and (all(parts) or ("|" in label and any(parts))))


def _numbered(
    column: pa.ChunkedArray, present: Sequence[str], class_names: tuple[str, ...] | None, where: str
) -> tuple[pa.ChunkedArray, tuple[str, ...] | None]:
    """Return texts, all those `present`, as numbers: what they say, where all say numbers or 'true' and 'false'; else
    their place among the class names."""
    import pyarrow as pa
    import pyarrow.compute as pc

    unknown = [name for name in present if name not in (class_names or ())]
    said = [name for name in present if name.lower() not in _NO_NUMBER]
    if unknown and said:
        numbers = pc.if_else(pc.is_in(column, pa.array(said, pa.string())), column, None)
        if {name.lower() for name in said} <= {"true", "false"}:
            return pc.equal(pc.utf8_lower(numbers), "true"), class_names
        try:
            return numbers.cast(pa.float64()), class_names
        except pa.ArrowInvalid:
            pass  # names of classes
    if class_names and unknown:
        raise UserError(
            f"{where}: label '{unknown[0]}' is not among the {len(class_names)} class names."
            f"{did_you_mean(unknown[0], class_names)}"
        )
    class_names = class_names or tuple(present)
    return pc.index_in(column, value_set=pa.array(class_names, pa.string())), class_names
