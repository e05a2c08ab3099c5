"""Prompt templates: how a class name becomes a caption."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from contrastive.data.record import Source
from contrastive.errors import UserError, did_you_mean

# The class names that CLIP's CIFAR prompts are for; other spellings fall back to the photo prompts.
_CIFAR10 = {"airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"}


def template_sets() -> tuple[str, ...]:
    """Return the names of the sets that come with the package."""
    folder = files("contrastive.data") / "templates"
    return tuple(sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".txt")))


def load_templates(name_or_file: str) -> tuple[str, ...]:
    """Return the templates of a set ('photo', 'cifar', 'digits', 'scenes', 'plain') or of a text file.

    A file has one template a line, each with '{}' where the class name goes; blank lines and lines that
    start with '#' are passed over. 'a(n) {}' takes the article that the name asks for.

    Raises:
        UserError: no such set or file, no template in it, or a line without '{}'.
    """
    if name_or_file in template_sets():
        text = (files("contrastive.data") / "templates" / f"{name_or_file}.txt").read_text("utf-8")
    else:
        text = _read_file(name_or_file)
    templates = []
    for number, line in enumerate(text.splitlines(), start=1):
        template = line.strip()
        if not template or template.startswith("#"):
            continue
        if "{}" not in template:
            raise UserError(f"{name_or_file}, line {number}: '{template}' has no '{{}}' for the class name")
        templates.append(template)
    if not templates:
        raise UserError(f"{name_or_file} holds no prompt template; write one a line, as 'a photo of a {{}}.'")
    return tuple(templates)


def default_templates(source: Source) -> tuple[str, ...]:
    """Return the templates that fit a labelled source: its own `templates`, or a set by name and classes."""
    own = getattr(source, "templates", None)
    if own:
        return tuple(own)
    scheme = source.name.partition(":")[0]
    if scheme in ("digits", "scenes"):
        return load_templates(scheme)
    return load_templates("cifar" if set(source.class_names or ()) == _CIFAR10 else "photo")


def fill(templates: Sequence[str], class_name: str) -> tuple[str, ...]:
    """Return every template with the class name in it; underscores of folder names become spaces."""
    words = class_name.replace("_", " ")
    article = "an" if words[:1].lower() in tuple("aeiou") else "a"
    return tuple(template.replace("a(n) {}", f"{article} {words}").replace("{}", words) for template in templates)


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
