"""From one string to a source of data, and to the data held out for it."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from contrastive.data.class_sets import are_lemmas, bare_names, is_wordnet_id
from contrastive.data.prompts import default_templates, load_templates
from contrastive.data.record import Source, some_have
from contrastive.data.sources.derived import ClassPrompts, Mixture, split_mixture
from contrastive.data.sources.paths import (
    HELD_OUT,
    REMOTE,
    expand_paths,
    expand_urls,
    is_remote,
    splits_of,
    table_suffix,
)
from contrastive.data.sources.torchvision_sets import SETS, cifar_folders, open_cifar, open_named
from contrastive.errors import UserError, did_you_mean, needs
from contrastive.log import say
from contrastive.registry import Registry

if TYPE_CHECKING:
    from contrastive.data.sources.columns import Columns

# Each kind of source is imported where it is opened: a run on rendered scenes loads no reader of tables.

# A scheme, the part of a specification before ':', to the function that opens the part after it. Another
# package adds one with `@SOURCES.register("name")`.
SOURCES: Registry[Callable[[str, Columns], Source]] = Registry("data source")

FORMS = (
    "scenes[:SPLIT], digits[:SPLIT], a well-known set as cifar10[:SPLIT], mnist or food101, 'shards/{0000..0099}.tar', "
    "PAIRS.csv|tsv|jsonl|parquet, a folder of images, of MNIST's or CIFAR's files, or saved by datasets, "
    "hf:NAME[:SPLIT]"
)

_SETS_BY_NAME = {"digits": ("train", "test"), "scenes": ("train", "test"), **{name: SETS[name].splits for name in SETS}}
_TRAIN_FILES = re.compile(r"train(?![a-z])")  # 'train-00000', but not 'training'


def open_source(
    spec: str,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    classes: str | None = None,
    prompts: str = "auto",
) -> Source:
    """Open the source that `spec` names.

    Args:
        spec: 'scenes[:SPLIT]', 'digits[:SPLIT]', 'hf:NAME[:SPLIT]', a well-known set as 'mnist[:SPLIT]' (see
            torchvision_sets), or another registered scheme; a path, glob or brace range of .tar shards or of .csv,
            .tsv, .jsonl, .parquet tables; a URL or brace range of URLs of shards (s3://, gs://, https://, hf://); an
            index folder of shards; a folder saved by `datasets`, or of MNIST's idx files, of CIFAR's batches, or
            of images/ and masks/ (':SPLIT' after it where it has splits); a folder of images in class folders or with
            captions; a folder that `contrastive curate` wrote; several of these with weights, 'A=2,B=1' (see Mixture).
        image_column, caption_column: of tables and data sets; None looks for the usual names. Of shards
            and of captions beside images, `caption_column` is a field of KEY.json or the suffix of a text, as 'txt'.
            Sources without columns pass over both.
        classes: names for the classes of labelled data, a set as 'imagenet' or a file, joined to the data's own by name
            or number (see `join`). None: their own; WordNet ids are spoken as CLIP or WordNet says them.
        prompts: how class names become captions: a set of templates or a file (see `load_templates`). 'auto'
            keeps the captions a source has and takes the templates that fit for one without.

    Returns:
        The source. One with labels but neither captions nor class names is returned as it is: it can be
        scored against names from elsewhere, not trained on.

    Raises:
        UserError: nothing of that name, nothing in it, damage, or neither captions nor labels.
    """
    from contrastive.data.sources.columns import Columns

    spec = spec.strip()
    templates = None if prompts == "auto" else load_templates(prompts)
    if not spec:
        raise UserError(f"no data source is given; use one of: {FORMS}")
    columns = Columns(image=image_column, caption=caption_column)
    specs, weights = split_mixture(spec)
    parts = [_as_pairs(_open(part, columns), classes, templates) for part in specs]
    return parts[0] if len(parts) == 1 else Mixture(spec, parts, weights)


def announce(source: Source, role: str = "") -> None:
    """Say in one line for each part what a source was taken for, and what was left aside.

    role: the option that named it, where there are several.
    """
    for part in source.parts:
        said = f"; {part.reading}" if part.reading else ""
        say(f"{role} {part.name}: {len(part):,} samples{said}{_left_aside(part)}".lstrip())


def _left_aside(source: Source) -> str:
    said = ""
    for reason, found in source.left_aside.commonest_first().items():
        said += f"; left aside: {found['count']:,} {reason}"
        if found["keys"]:
            said += f", as '{found['keys'][0]}'"
    return said


def _open(spec: str, columns: Columns) -> Source:
    scheme, _, argument = spec.partition(":")
    if scheme in SOURCES.names() and not argument.startswith("//"):  # 'hf://' is a place of shards, 'hf:' a data set
        return SOURCES.get(scheme)(argument, columns)
    if "://" in spec or scheme == "pipe":
        return _open_remote(spec, columns)
    from contrastive.data.shards.shard_index import is_index, read_index

    if is_index(spec):
        from contrastive.data.shards.shard_source import Shards

        return Shards(spec, read_index(spec), columns.caption)
    from contrastive.data.sources.subset import is_kept, kept_subset, read_kept

    if is_kept(spec):
        said = read_kept(spec)
        own = replace(columns, image=columns.image or said.image_column, caption=columns.caption or said.caption_column)
        return kept_subset(spec, said, _open(said.data, own))
    folder, split = _folder_and_split(spec)
    if folder:
        return _open_folder(spec, os.path.expanduser(folder), split, columns)
    if not any(character in scheme for character in "/.*?[{~\\") and not os.path.exists(spec):
        hint = did_you_mean(scheme, (*SOURCES.names(), *os.listdir()))
        raise UserError(f"unknown data source '{scheme}'.{hint} Forms: {FORMS}")
    return _open_files(spec, expand_paths(spec), columns)


def absolute(spec: str) -> str:
    """Return the specification with a path in it as it is named from any folder."""
    scheme = spec.partition(":")[0]
    is_path = scheme not in SOURCES.names() and "://" not in spec
    return os.path.abspath(os.path.expanduser(spec)) if is_path else spec


def _open_remote(spec: str, columns: Columns) -> Source:
    from contrastive.data.shards.indexing import remote_shards
    from contrastive.data.shards.shard_source import Shards

    if not is_remote(spec):
        known = ", ".join(f"{scheme}://" for scheme in REMOTE)
        raise UserError(f"'{spec}': not read; use local files, or shards under {known}")
    urls = expand_urls(spec)
    if not all(url.partition("?")[0].endswith(".tar") for url in urls):
        raise UserError(f"{spec}: only .tar shards are read from afar; copy other data here, and give its path")
    return Shards(spec, remote_shards(spec, urls), columns.caption)


def _folder_and_split(spec: str) -> tuple[str, str | None]:
    """Return (folder, None) or (folder, split) where `spec` is 'FOLDER' or 'FOLDER:SPLIT', else ('', None)."""
    for folder, split in ((spec, None), spec.rpartition(":")[::2]):
        if os.path.exists(os.path.expanduser(folder)):
            return (folder, split) if os.path.isdir(os.path.expanduser(folder)) else ("", None)
    return "", None


def _open_folder(spec: str, folder: str, split: str | None, columns: Columns) -> Source:
    from contrastive.data.sources.arrays import idx_folder, open_idx
    from contrastive.data.sources.folder import open_folder
    from contrastive.data.sources.hugging_face import is_saved_dataset, open_saved
    from contrastive.data.sources.image_files import open_masks

    if is_saved_dataset(folder):
        return open_saved(spec, folder, split, columns)
    if idx_folder(folder):
        return open_idx(spec, folder, split or "train")
    if cifar_folders(folder):
        return open_cifar(spec, folder, split or "train")
    if (masked := open_masks(spec, folder, split)) is not None:
        return masked
    if split is not None:
        given = os.path.join(folder, split) if os.path.isdir(os.path.join(folder, split)) else folder
        raise UserError(f"{spec}: only a folder saved by datasets, or of MNIST or CIFAR, has splits; give '{given}'")
    return open_folder(spec, folder, columns)


def _open_files(spec: str, paths: list[str], columns: Columns) -> Source:
    suffixes = sorted({table_suffix(path) for path in paths})
    if len(suffixes) > 1:
        raise UserError(f"{spec} matches files of several kinds ({', '.join(suffixes)}); name one kind")
    if suffixes[0] == ".tar":
        from contrastive.data.shards.indexing import index_shards
        from contrastive.data.shards.shard_source import Shards

        source = Shards(spec, index_shards(paths, digest=False), columns.caption)
    else:
        from contrastive.data.sources.tables import READERS, open_table

        if suffixes[0] not in READERS:
            known = ", ".join(READERS)
            raise UserError(f"{spec}: files of kind '{suffixes[0]}' are not read; use .tar, {known} or a folder")
        source = open_table(spec, paths, columns)
    if len(splits := splits_of(paths)) > 1:
        source.reading += f"; {', '.join(splits)} are taken together"
    return source


def _as_pairs(source: Source, classes: str | None, templates: tuple[str, ...] | None) -> Source:
    if not len(source):
        raise UserError(f"{source.name} is empty")
    captioned, labelled = source.captioned, source.labelled
    if captioned is None:
        captioned = some_have(source, source.captions)
    if labelled is None:
        labelled = some_have(source, lambda index: source.label(index) is not None)
    if not captioned and not labelled and not source.masked:
        held = f" ({source.reading})" if source.reading else ""
        raise UserError(
            f"{source.name} has neither captions nor labels{held}; name the column of captions with caption_column, "
            f"or put KEY.txt, KEY.json or KEY.cls beside each image{_left_aside(source)}"
        )
    own = source.own_names or source.class_names or ()
    if labelled and (classes or any(map(is_wordnet_id, own)) or bare_names(own) or are_lemmas(own)):
        from contrastive.data.class_joining import named

        source = named(source, classes)
    if not labelled or not source.class_names or (captioned and templates is None):
        return source
    return ClassPrompts(source, templates or default_templates(source))


@SOURCES.register("scenes")
def _open_scenes(argument: str, columns: Columns) -> Source:
    from contrastive.data.sources.scenes import Scenes

    return Scenes(argument or "train")


@SOURCES.register("digits")
def _open_digits(argument: str, columns: Columns) -> Source:
    from contrastive.data.sources.arrays import Digits

    return Digits(argument or "train")


@SOURCES.register("hf")
def _open_hf(argument: str, columns: Columns) -> Source:
    from contrastive.data.sources.hugging_face import open_hub

    return open_hub(argument, columns)


for _dataset in SETS:
    SOURCES.register(_dataset)(lambda argument, columns, dataset=_dataset: open_named(dataset, argument))


def held_out_spec(spec: str) -> str | None:
    """Return the specification of the held-out split that belongs to `spec`, the training split; None without one.

        digits, mnist:train, imagenette digits:test, mnist:test, imagenette:val
        FOLDER, FOLDER:train            FOLDER:test, of MNIST's files, CIFAR's, or saved by datasets
        DIR/train                       DIR/test, where there is such a folder; else val, ...
        DIR/train-{00..09}.tar          DIR/test*.tar, where there are such files; else val*.tar, ...
        hf:NAME, hf:NAME:train          hf:NAME:test, where the hub has it

    Splits are looked for by the names of `HELD_OUT`, in that order. Of a mixture, and of data that are no training
    split themselves, there is none.
    """
    from contrastive.data.sources.subset import is_kept, read_kept

    spec = spec.strip()
    if not spec or "://" in spec or len(split_mixture(spec)[0]) > 1:
        return None
    if is_kept(spec):
        return held_out_spec(read_kept(spec).data)
    name, split = _name_and_split(spec)
    if split not in (None, "", "train") and not (split == "trainval" and name in SETS):
        return None
    splits = _splits_of(name)
    if splits is None:
        return _beside(name.rstrip(os.sep) or spec)
    return next((f"{name}:{held_out}" for held_out in HELD_OUT if held_out in splits), None)


def _name_and_split(spec: str) -> tuple[str, str | None]:
    """As `_folder_and_split`, of sets and of names on the hub too."""
    scheme, _, argument = spec.partition(":")
    if scheme == "hf":
        path, _, split = argument.partition(":")
        return f"hf:{path}", split
    return (scheme, argument) if scheme in _SETS_BY_NAME else _folder_and_split(spec)


def _splits_of(name: str) -> Collection[str] | None:
    """Return the splits of a set, of a name on the hub or of a folder; None for other folders, and for no folder."""
    if name in _SETS_BY_NAME:
        return _SETS_BY_NAME[name]
    if name.startswith("hf:"):
        needs(name, "datasets")
        from datasets import get_dataset_split_names

        try:
            return get_dataset_split_names(name.removeprefix("hf:"))
        except Exception:  # the network's and the hub's; training itself says what is wrong with the name
            return ()
    from contrastive.data.sources.arrays import idx_folder
    from contrastive.data.sources.hugging_face import is_saved_dataset, saved_splits

    folder = os.path.expanduser(name)
    if is_saved_dataset(folder):
        return saved_splits(folder)
    return ("train", "test") if idx_folder(folder) or cifar_folders(folder) else None


def _beside(spec: str) -> str | None:
    """What lies beside a folder 'train' or beside files 'train...', of the same kind and named for a held-out split."""
    place, name = os.path.split(spec)
    here = os.path.expanduser(place) or os.curdir
    if not _TRAIN_FILES.match(name) or not os.path.isdir(here):
        return None
    suffix = os.path.splitext(name)[1]
    for split in HELD_OUT:
        pattern = f"{split}*{suffix}" if suffix else split
        found = fnmatch.filter(os.listdir(here), pattern)
        if found:
            return os.path.join(place, found[0] if len(found) == 1 else pattern)
    return None
