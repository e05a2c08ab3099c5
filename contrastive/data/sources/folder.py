"""A folder of image files: in class folders, with captions beside the images, or with a table of them."""

import fnmatch
import os
import re
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from contrastive.data.class_sets import CLASS_FILES, class_set_beside
from contrastive.data.record import SAMPLES_ASKED, BadSample, FaultCounts, Source, fingerprint_of
from contrastive.data.sources.beside import (
    CAPTION_FIELDS,
    FileBeside,
    caption_lines,
    caption_names,
    count_aside,
    same_texts,
    spoken,
)
from contrastive.data.sources.columns import CAPTION_COLUMNS, IMAGE_COLUMNS, Columns
from contrastive.data.sources.image_files import JUNK, FolderCaptions, ImageFiles, files_below, is_hidden
from contrastive.data.sources.paths import IMAGE_SUFFIXES, SPLIT_NAMES, are_splits, splits_of
from contrastive.data.sources.tables import columns_of, open_table
from contrastive.errors import UserError

FORMS = (
    "read are: KEY.txt or KEY.json ('caption') beside each image (others named by caption_column), "
    "metadata.csv|jsonl|parquet with file_name, class folders, a table by its own path"
)
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_COMPANIONS = ("txt", "json", "cls")


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


def sort_files(root: str) -> FolderFiles:
    images, others = files_below(root)
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


def open_folder(name: str, root: str, columns: Columns) -> Source:
    """Open images with captions beside them, a folder with metadata.csv, or ROOT/class_name/*.jpg (at any depth below).

    One .txt beside an image, or one .json with a caption, is enough to make it a captioned folder; images without one
    have no caption. Class names are the sorted names of the first-level folders that hold images, in the order of their
    numbers where all are whole numbers. Hidden files and folders are left out.

    Raises:
        UserError: no images; neither captions nor class folders; splits or a single folder for classes.
    """
    files = sort_files(root)
    images = files.images
    if not images:
        raise UserError(f"{name}: {_nothing_found(files)}; {files.there()}; {FORMS}")
    if table := find_metadata(name, files):
        return open_inside(name, files, table, replace(columns, image=columns.image or "file_name"))
    captions = find_captions(name, files, columns.caption)
    if captions is None and (table := captions_table(name, files)):
        return open_inside(name, files, table, columns)
    source: Source = ImageFiles(name, root, images, captions=captions) if captions else _in_classes(name, files)
    if not captions and (known := class_set_beside(root)):
        from contrastive.data.class_joining import named

        source = named(source, known.name)
    source.left_aside = files.left_aside
    for suffix in captions.names if captions else ():
        source.left_aside.pop(suffix, None)
    tops = sorted({path.split(os.sep, 1)[0] for path in images}) if captions else []
    if len(tops) > 1 and are_splits(tops):
        source.reading += f"; {', '.join(tops)} are taken together"
    return source


def _in_classes(name: str, files: FolderFiles) -> ImageFiles:
    root, images = files.root, files.images
    class_names = _class_names(name, files)
    number = {folder: label for label, folder in enumerate(class_names)}
    labels = np.array([number[path.split(os.sep, 1)[0]] for path in images], dtype=np.int64)
    source = ImageFiles(name, root, images, labels, class_names)
    source.reading += _numbering(class_names)
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if class_names != tuple(folder for folder in folders if not folder.startswith(".")):
        # Labels are not what the paths alone would make them: by the place of each folder among all.
        source.fingerprint = fingerprint_of(os.fsencode("\0".join((*images, "", *class_names))))
    for folder in set(folders) - number.keys():
        of_system = folder in JUNK or folder[0] == "."
        files.left_aside.add("system folders" if of_system else "folders without images", folder)
    return source


def _class_names(name: str, files: FolderFiles) -> tuple[str, ...]:
    images = files.images
    loose = [path for path in images if os.sep not in path]
    if loose:
        raise UserError(
            f"{name}: the images have neither captions (a .txt of the same name beside each) nor class folders: "
            f"{len(loose)} of {len(images)} lie in no sub-folder, as '{loose[0]}'; {files.there()}; {FORMS}"
        )
    folders = sorted({path.split(os.sep, 1)[0] for path in images})
    if are_splits(folders):
        raise UserError(f"{name}: its folders are splits ({', '.join(folders)}); give one, as '{name}/{folders[0]}'")
    if len(folders) == 1:
        raise UserError(
            f"{name}: one class folder only ('{folders[0]}'); give images a caption each (a .txt of the same name "
            f"beside each), or one folder a class; {files.there()}; {FORMS}"
        )
    _check_levels(name, files, folders)
    if not all(map(_is_number, folders)):
        return tuple(folders)
    by_number = {int(folder): folder for folder in folders}
    if len(by_number) < len(folders):
        other = next(folder for folder in folders if by_number[int(folder)] != folder)
        raise UserError(f"{name}: class folders '{other}' and '{by_number[int(other)]}' are the same number")
    return tuple(by_number[number] for number in sorted(by_number))


def _is_number(folder: str) -> bool:
    return folder.isascii() and folder.isdecimal()


def _numbering(class_names: tuple[str, ...]) -> str:
    if not all(map(_is_number, class_names)):
        return ""
    first, last = int(class_names[0]), int(class_names[-1])
    told = "the number is the label" if first == 0 else f"label 0 is '{class_names[0]}'"
    gaps = last - first >= len(class_names)
    return f", numbered {first} to {last}{' with gaps, which labels have not' if gaps else f': {told}'}"


def _check_levels(name: str, files: FolderFiles, folders: list[str]) -> None:
    """Raise UserError where first-level folders are no classes: shards of img2dataset; domains of the same classes."""
    told = "json" in files.beside or any(path.endswith("_stats.json") for path in files.others)
    numbered = all(re.fullmatch(r"(\d{5,})/\1\d{4}\.\w+", path) for path in files.images[:100])
    if (told or numbered) and all(re.fullmatch(r"\d{5,}", folder) for folder in folders):
        raise UserError(
            f"{name}: folders of img2dataset ('{folders[0]}', ...), but no KEY.txt nor a caption in KEY.json beside "
            f"the images; {files.there()}"
        )
    below: dict[str, set[str]] = {folder: set() for folder in folders}
    for path in files.images:
        first, second, *more = path.split(os.sep, 2)
        below[first].add(second if more else "")
    shared = {each for each in set.intersection(*below.values()) if not each.isdecimal()} - SPLIT_NAMES
    if len(shared) > 1 and not any("" in each for each in below.values()):
        one, other = sorted(shared)[:2]
        raise UserError(
            f"{name}: the same folders ('{one}', '{other}', ...) lie in '{folders[0]}', '{folders[1]}', ...; class "
            f"folders have to be the first level: give one, as '{name}/{folders[0]}'"
        )


def _nothing_found(files: FolderFiles) -> str:
    for suffix in ("tar", "parquet", "csv", "tsv", "jsonl"):
        for path in sorted(files.others, key=lambda path: path.count(os.sep)):
            if path.endswith(f".{suffix}"):
                folder, ending = os.path.dirname(path), f"*.{suffix}"
                alike = [other for other in files.others if fnmatch.fnmatch(other, os.path.join(folder, ending))]
                those = [os.path.join(files.root, folder, split + ending) for split in splits_of(alike) or [""]]
                return f"no images in this folder, but .{suffix} files; give {' or '.join(map(repr, those))}"
    return f"no images in this folder ({', '.join(IMAGE_SUFFIXES)})"


# Captions of a folder


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
    found = [path for path in found if "file_name" in columns_of(os.path.join(files.root, path))]
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
    source = open_table(name, [os.path.join(files.root, table)], columns)
    source.reading = f"{table}: {source.reading}"
    listed = source.image_paths()
    for path in (path for path in files.images if path not in listed):
        source.left_aside.add("images in no row", path)
    return source


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
        columns = [] if os.sep in path else columns_of(os.path.join(files.root, path))
        known = {column.strip().lower() for column in columns}
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
