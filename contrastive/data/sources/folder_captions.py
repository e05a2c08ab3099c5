"""Captions of a folder of images: texts beside them, as img2dataset has it, or metadata.csv, as `datasets` has it."""

import json
import os
import re
from collections import Counter
from dataclasses import dataclass

from contrastive.data.class_sets import CLASS_FILES
from contrastive.data.record import SAMPLES_ASKED, BadSample, FaultCounts, Source
from contrastive.data.sources.beside import (
    CAPTION_FIELDS,
    Beside,
    caption_lines,
    caption_names,
    count_aside,
    same_texts,
    spoken,
)
from contrastive.data.sources.columns import CAPTION_COLUMNS, IMAGE_COLUMNS, Columns
from contrastive.errors import UserError

FORMS = (
    "read are: KEY.txt or KEY.json ('caption') beside each image (others named by caption_column), "
    "metadata.csv|jsonl|parquet with file_name, class folders, a table by its own path"
)
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_COMPANIONS = ("txt", "json", "cls")


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


@dataclass(frozen=True)
class FolderCaptions:
    """Where the captions of a folder's images are.

    names, weights: as `Beside.captions` takes them. identity: what of it goes into the source's fingerprint. reading:
    the source's.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...] | None
    identity: tuple[str, ...]
    reading: str


@dataclass(frozen=True)
class FolderFiles:
    """The files of a folder, by paths relative to it, sorted.

    others: those that are no images. beside: by suffix, the images' stems that have such a file: 'txt' to {'a', 'b'}.
    left_aside: the others by suffix or reason, but for those that may be captions.
    """

    root: str
    images: list[str]
    others: list[str]
    beside: dict[str, set[str]]
    left_aside: FaultCounts

    def there(self) -> str:
        """Say what there is, the commonest suffix first: 'there are 3 .json, 1 .csv'."""
        found = Counter(os.path.splitext(path)[1].lower() or "without suffix" for path in (*self.images, *self.others))
        return f"there are {', '.join(f'{count:,} {suffix}' for suffix, count in found.most_common(8)) or 'no files'}"


def sort_files(root: str, images: list[str], others: list[str]) -> FolderFiles:
    stems, beside, left_aside = {os.path.splitext(path)[0] for path in images}, {}, FaultCounts()
    for path in others:
        stem = os.path.splitext(path)[0]
        while stem not in stems and (shorter := os.path.splitext(stem)[0]) != stem:
            stem = shorter
        suffix = path[len(stem) + 1 :].lower()
        if stem in stems:
            beside.setdefault(suffix, set()).add(stem)
            reason = "" if suffix in _COMPANIONS else f".{suffix}"
        else:
            suffix = os.path.splitext(path)[1].lower()
            reason = "hidden" if is_hidden(path) else f"{suffix} without image" if suffix[1:] in _COMPANIONS else suffix
            reason = reason or "without suffix"
        if reason and path not in CLASS_FILES:
            count_aside(left_aside, reason, path)
    return FolderFiles(root, images, others, beside, left_aside)


def find_captions(name: str, files: FolderFiles, asked: str | None) -> FolderCaptions | None:
    """Return where the captions of the images are, None where nothing says any.

    KEY.txt goes before KEY.json, which counts where one of 100 has a caption. UserError: none of what is asked for.
    """
    beside, (fields, several, unlike) = files.beside, _look(files)
    if asked and (beside.keys() & {*_COMPANIONS, asked.lower().lstrip(".")} or fields):
        names, weights = caption_names(asked, sorted(fields), sorted(beside), name)
        told, note = ", ".join(map(spoken, names)), ""
    else:
        usual = {".txt": "KEY.txt"} if "txt" in beside else {}
        in_json = [field for field in CAPTION_FIELDS if field in fields]
        if in_json and not beside["json"] <= beside.get("txt", set()):
            usual[".json"] = spoken(in_json[0])
        names, weights, told = tuple(usual), None, ", else ".join(usual.values())
        differ = f" (KEY.json says other in {unlike}, as far as was looked; caption_column json takes it)"
        note = differ if unlike else ""
    if not names:
        return None
    suffixes = {each[1:] if each[0] == "." else "json" for each in names}
    lines = ", one a line" if several and "txt" in suffixes else ""
    captioned = set().union(*(beside.get(suffix, ()) for suffix in suffixes))
    count = sum(os.path.splitext(path)[0] in captioned for path in files.images)
    share = f"; {len(files.images) - count:,} images have none" if count < len(files.images) else ""
    texts = [path for path in files.others if path.rpartition(".")[2].lower() in suffixes | {"txt"}]
    return FolderCaptions(
        names=names,
        weights=weights,
        identity=(*(path for path in texts if not is_hidden(path)), *filter(None, (asked, lines))),
        reading=f"captions: {told}{lines}{note}{share}",
    )


def _look(files: FolderFiles) -> tuple[set[str], bool, int]:
    """Look at 100 texts of each kind: fields of KEY.json, whether a KEY.txt has several lines, how many say other."""
    held, several, unlike, stems = set(), False, 0, []
    for suffix in ("txt", "json"):  # some JSON may lie beside a text, others beside none
        beside = sorted(files.beside.get(suffix, ()))
        stems += beside[:: max(1, len(beside) // SAMPLES_ASKED)]
    for stem in dict.fromkeys(stems):
        sample = FileBeside(os.path.join(files.root, stem), stem)
        try:
            fields, text = sample.fields, sample.text("txt")
        except BadSample:
            continue
        held |= {name for name, value in fields.items() if value or name not in CAPTION_FIELDS}
        stated, lines = next(filter(None, map(fields.get, CAPTION_FIELDS)), None), caption_lines(text or "")
        several |= len(lines) > 1
        unlike += bool(text and stated) and not same_texts(lines, stated)
    return held, several, unlike


def find_metadata(name: str, files: FolderFiles) -> str:
    """Return the metadata.csv of a folder of `datasets`, which has a column file_name.

    Empty where there is no such file, or KEY.txt beside the images as well.

    Raises:
        UserError: several of them, or one that lies further down.
    """
    found = [path for path in files.others if os.path.basename(path) in _METADATA]
    found = [path for path in found if "file_name" in columns_of(files.root, path)]
    if not found or "txt" in files.beside:
        return ""
    if len(found) > 1 or os.sep in found[0]:
        folders = "/*" * found[-1].count(os.sep)
        raise UserError(
            f"{name}: the captions lie in {', '.join(found[:3])}; give one, or those alike as "
            f"'{files.root}{folders}/{os.path.basename(found[-1])}'"
        )
    return found[0]


def open_inside(name: str, files: FolderFiles, table: str, columns: Columns) -> Source:
    """Open a table that lies in the folder, and count the images that it does not list."""
    from contrastive.data.sources.tables import open_table

    source = open_table(name, [os.path.join(files.root, table)], columns)
    source.reading = f"{table}: {source.reading}"
    listed = source.image_paths()
    for path in (path for path in files.images if path not in listed):
        source.left_aside.add("images in no row", path)
    return source


def is_hidden(path: str) -> bool:
    return path.startswith(".") or f"{os.sep}." in path  # no hidden folder is looked into


def captions_table(name: str, files: FolderFiles) -> str:
    """Return the table at the top of the folder with captions of images, '' for none.

    A table is any with an image and a caption column, 'results.csv' with 'image_name| comment' as Flickr30k's, or the
    JSON of COCO's or Karpathy's captions.

    Raises:
        UserError: several tables; COCO's JSON further down, where its paths would lead elsewhere.
    """
    coco = r"(annotations/)?captions[^/]*\.json|dataset(_coco|_flickr\w*)?\.json"
    found = []
    for path in files.others:
        known = set() if os.sep in path else {column.strip().lower() for column in columns_of(files.root, path)}
        if re.fullmatch(coco, path.lower()) or (known & {*IMAGE_COLUMNS} and known & {*CAPTION_COLUMNS, "comment"}):
            found.append(path)
    found = [path for path in found if os.sep not in path] or found[:1]  # those further down only where no other is
    if len(found) > 1:
        raise UserError(f"{name}: captions lie in {', '.join(found)}; give one, as '{files.root}/{found[0]}'")
    if found and os.sep in found[0]:
        raise UserError(
            f"{name}: no captions beside the images, but '{found[0]}'; copy it into the folder in which its paths "
            f"begin, and give that folder; {FORMS}"
        )
    return found[0] if found else ""


def columns_of(root: str, path: str) -> list[str]:
    """Return the names of the columns of a table, none where it cannot be read as one."""
    path, suffix = os.path.join(root, path), os.path.splitext(path)[1].lower()
    try:
        if suffix == ".parquet":
            from pyarrow.parquet import read_schema

            return read_schema(path).names
        if suffix not in (".csv", ".tsv", ".txt", ".jsonl", ".json"):
            return []
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            first = file.read(2**20) if suffix.startswith(".json") else file.readline(2**20)
        if suffix.startswith(".json"):  # a record a line, or a list of them
            return list(json.JSONDecoder().raw_decode(first.lstrip("[ \r\n\t"))[0])
        return re.split(r"[,\t;|]", first.replace('"', "").strip())
    except (OSError, ValueError, TypeError):  # Arrow's own errors are among them
        return []
