"""Prompt templates: how a class name becomes a caption."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from contrastive.data.class_sets import class_set, class_set_of, class_sets, imagenet_metadata, shipped
from contrastive.data.record import Source
from contrastive.errors import UserError, did_you_mean

# CLIP's prompts for ImageNet, by the name of the list in open_clip's metadata.
_OF_OPEN_CLIP = {"imagenet": "OPENAI_IMAGENET_TEMPLATES", "imagenet_simple": "SIMPLE_IMAGENET_TEMPLATES"}
_PYTHON = re.compile(r"""(['"]).*\1,?|lambda\b.*""")
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
"""Templates beside class names, as clip_benchmark writes them."""


def template_sets() -> tuple[str, ...]:
    """Return the names of the sets: those that come with the package, and CLIP's for ImageNet out of open_clip's."""
    return tuple(sorted((*shipped("templates"), *_OF_OPEN_CLIP)))


def load_templates(name_or_file: str) -> tuple[str, ...]:
    """Return the templates of a set, of those that suit a set of class names, or of a text file.

    Sets are named after kinds of data ('photo', 'cifar', 'digits', 'food', 'satellite', ...: see `template_sets`).
    'imagenet' are the 80 of the CLIP paper, 'imagenet_simple' the seven of its authors' notebook. A file has one
    template a line, or a JSON list of them, each with '{}' where the class name goes; blank lines and lines that start
    with '#' are passed over. 'a(n) {}' takes the article that the name asks for.

    Raises:
        UserError: no such set or file, no template in it, or a line without '{}'.
    """
    if name_or_file not in template_sets() and name_or_file in class_sets():
        name_or_file = class_set(name_or_file).templates
    if name_or_file in _OF_OPEN_CLIP:
        return tuple(template("{}") for template in getattr(imagenet_metadata(), _OF_OPEN_CLIP[name_or_file]))
    if name_or_file in template_sets():
        text = shipped("templates")[name_or_file].read_text("utf-8")
    else:
        text = _read_file(name_or_file)
    lines = _json_list(text, name_or_file) if re.match(r"""\s*(\[|\{\s*")""", text) else text.splitlines()
    check_no_code(name_or_file, lines)
    templates = []
    for number, line in enumerate(lines, start=1):
        template = line.strip().replace("{c}", "{}")  # as clip_benchmark writes them
        if not template or template.startswith("#"):
            continue
        if "{}" not in template:
            raise UserError(f"{name_or_file}, line {number}: '{template}' has no '{{}}' for the class name")
        templates.append(template)
    if not templates:
        raise UserError(f"{name_or_file} holds no prompt template; write one a line, as 'a photo of a {{}}.'")
    return tuple(templates)


def templates_beside(folder: str | Path) -> tuple[str, ...] | None:
    """Return the templates that lie in `TEMPLATES_FILE` in a folder; None without one. UserError as above."""
    path = Path(folder, TEMPLATES_FILE)
    return load_templates(str(path)) if path.is_file() else None


def default_templates(source: Source, class_names: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the templates that fit a labelled source: its own `templates`, or a set by its name or its classes.

    `class_names` are those it is scored with, its own when None. Classes that are those of no set (see `class_sets`)
    get the prompts for photographs.
    """
    if source.templates:
        return source.templates
    scheme = source.name.partition(":")[0]
    if scheme in ("digits", "scenes"):
        return load_templates(scheme)
    known = class_set_of(class_names or source.class_names or ())
    return load_templates(known.templates if known else "photo")


def fill(templates: Sequence[str], class_name: str) -> tuple[str, ...]:
    """Return every template with the class name in it; underscores of folder names become spaces."""
    words = class_name.replace("_", " ")
    article = "an" if words[:1].lower() in tuple("aeiou") else "a"
    return tuple(template.replace("a(n) {}", f"{article} {words}").replace("{}", words) for template in templates)


def check_no_code(where: str, lines: Sequence[str]) -> None:
    """Raise UserError for texts that stand in a file as in a Python list, with quotes or as functions."""
    found = next(filter(_PYTHON.fullmatch, map(str.strip, lines)), None)
    if found:
        raise UserError(f"{where}: {found} is Python code; write the text alone, one a line, or a JSON list of texts")


def _json_list(text: str, where: str) -> list[str]:
    try:
        held = json.loads(text)
    except (ValueError, RecursionError):
        held = None
    if not isinstance(held, list) or not all(isinstance(line, str) for line in held):
        raise UserError(
            f"{where}: templates are one a line or a JSON list of texts; of an object, as those of many data sets or "
            "of each class, write out the list that is meant"
        )
    return held


def _read_file(path: str) -> str:
    try:
        return Path(path).expanduser().read_text("utf-8-sig")
    except OSError:
        sets = template_sets()
        raise UserError(
            f"no prompt templates '{path}': neither a set ({', '.join(sets)}) nor a text file that can be read."
            f"{did_you_mean(path, sets)}"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"prompt templates {path}: not UTF-8 text") from None
