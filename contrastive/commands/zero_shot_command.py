"""Score a trained model on labelled images without training on them.

    contrastive zero-shot runs/mine --data scenes:test
    contrastive zero-shot runs/mine --data val/ --classes imagenet

MODEL is a run, checkpoint or model folder, ours or another library's. Prints a table; writes zero_shot.json and
confusion.png. A second evaluation of the same data replaces the first.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, BinaryIO

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tyro.conf import Positional, arg

import contrastive
from contrastive.command_line import LoadingOptions, chosen_device, print_json
from contrastive.config import parse
from contrastive.data.class_joining import warn_of_ids
from contrastive.data.class_sets import name_key
from contrastive.data.prompts import load_templates
from contrastive.data.sources import announce, open_source
from contrastive.errors import UserError
from contrastive.evaluate.classification import names_to_use, zero_shot
from contrastive.files import claim_folder, write_json, write_whole
from contrastive.interop.loading import is_hub_name, results_folder
from contrastive.log import say
from contrastive.option_types import Positive
from contrastive.results import ZERO_SHOT_FIGURES, ZERO_SHOT_FILE, figure_title, folder_name

PICTURE = "confusion.png"
MAX_NAMED_CLASSES = 64
MAX_WRITTEN_CLASSES = 20
NUM_WORST = 5
NUMBERS = ("value", "recall", "images")


@dataclass(frozen=True, kw_only=True)
class ZeroShotOptions(LoadingOptions):
    """What to score, and how."""

    model: Annotated[Positional[Path], arg(metavar="MODEL")]
    """Folder of a run, checkpoint or model, or hf-hub:ORG/NAME."""
    data: Annotated[str, arg(metavar="SPEC")]
    """Labelled images, such as scenes:test."""
    classes: Annotated[str | None, arg(metavar="NAME|FILE")] = None
    """Class names: a set (cifar10, imagenet, ...), one a line, or JSON."""
    templates: Annotated[str | None, arg(metavar="NAME|FILE")] = None
    """Prompts: a set (imagenet, photo, ...), or one a line; none: those that fit."""
    out: Annotated[Path | None, arg(metavar="DIR")] = None
    """Where to write; none: MODEL/zero_shot/DATA."""
    limit: Positive[int | None] = None
    """Score a fixed random subset of N images."""
    json: bool = False
    """Print zero_shot.json instead of a table."""


def evaluate(options: ZeroShotOptions) -> None:
    device = chosen_device(options.device)
    templates = load_templates(options.templates) if options.templates else None
    source = open_source(options.data, classes=options.classes)
    bundle = contrastive.load(options.model, device=device)
    home = results_folder(options.model) if is_hub_name(options.model) else options.model
    out = claim_zero_shot(home, options.data, options.out, options.limit)
    names_to_use(source)
    announce(source)
    warn_of_ids(source)
    asked = {"device": device, "templates": templates, "limit": options.limit}
    result = zero_shot(bundle, source, **asked, **options.loading())
    if not options.json:
        print_result(result, options.model, options.data)
    record = write_zero_shot(out, options.model, options.data, result)
    if options.json:
        print_json(record)


def claim_zero_shot(run: Path, data: str, folder: Path | None = None, limit: int | None = None) -> Path:
    """Choose the folder of a result, RUN/zero_shot/DATA where `folder` is None, before any work is done.

    limit: of the images; a result of some of them has a folder of its own, DATA-limit-N.

    Raises:
        UserError: it cannot be written, or holds something else than an earlier result of the same model and data.
            Within RUN the model is taken to be the same, so that RUN can be moved.
    """
    choose = "choose another --out DIR"
    out = folder or run / "zero_shot" / (folder_name(data) + (f"-limit-{limit}" if limit else ""))
    earlier = claim_folder(out, ZERO_SHOT_FILE, "a zero-shot evaluation", choose, only=(PICTURE,))
    if earlier is not None:
        model, of = earlier.get("model"), earlier.get("data")
        if of != data or (folder is not None and model != str(run)):
            raise UserError(f"{out / ZERO_SHOT_FILE} is the result of {model} on {of}; {choose}")
    return out


def write_zero_shot(folder: Path, run: Path, data: str, result: dict) -> dict:
    """Write zero_shot.json and confusion.png, each whole or not at all, and say where; return what the first holds."""
    path = folder / ZERO_SHOT_FILE
    replaced = ", replacing the earlier result of this data" if path.exists() else ""
    title = f"{data}: {result['acc1']:.1f} % of {result['num_images']} images right"
    picture = io.BytesIO()
    own_names = result.get("own_names", ())
    save_confusion(np.array(result["confusion"]), result["class_names"], picture, title=title, own_names=own_names)
    folder.mkdir(parents=True, exist_ok=True)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    record = {"model": str(run), "data": data, "date": date, **result}
    write_json(path, record)
    write_whole(folder / PICTURE, picture.getvalue())
    say(f"wrote {path} and {PICTURE}{replaced}")
    return record


def print_result(result: dict, model: Path, data: str) -> None:
    """Print the figures, and the classes with the lowest recall when not all are right."""
    longer = {"seen_acc1": "acc@1, classes seen in training", "heldout_acc1": "acc@1, held-out classes"}
    shown = [name for name in ZERO_SHOT_FIGURES if name in result]
    figures = [(longer.get(name, figure_title(name)), f"{result[name]:.2f} %") for name in shown]
    figures.append(("chance level", f"{result['chance']:.2f} %"))
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(result["skipped"].items()))
    counts = [("images", f"{result['num_images']:,}"), ("images skipped", skipped or "0")]
    counts.append(("classes", f"{result['num_classes']:,}"))
    missing, templates = result["missing_classes"], result["templates"]
    if missing:
        names = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        counts.append(("classes without images", f"{len(missing):,} ({names})"))
    counts.append(("prompt templates", f"{len(templates):,} ({templates[0]!r})"))
    console = Console(highlight=False)
    # Long paths stay on one line.
    console.print(f"Zero-shot: {escape(str(model))} on {escape(data)}", soft_wrap=True)
    console.print(_table(("figure", "value"), figures, counts))
    if worst := _worst_classes(result):
        console.print("Classes with the lowest recall")
        console.print(_table(("class", "recall", "images", "most often taken for"), worst))


def _table(columns: Sequence[str], *sections: Sequence[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in columns:
        table.add_column(name, justify="right" if name in NUMBERS else "left")
    for rows in sections:
        for cells in rows:
            table.add_row(*map(escape, cells))
        table.add_section()
    return table


def _worst_classes(result: dict) -> list[tuple[str, str, str, str]]:
    """Name, recall, images, and what it is most often taken for, of the worst classes that err at all."""
    confusion = np.array(result["confusion"])
    names, recalls = result["class_names"], result["per_class_recall"]
    erring = [i for i, recall in enumerate(recalls) if recall is not None and recall < 100]
    worst = []
    for i in sorted(erring, key=lambda i: recalls[i])[:NUM_WORST]:
        wrong, images = confusion[i].copy(), confusion[i].sum()
        wrong[i] = 0
        taken_for = f"{names[wrong.argmax()]} ({100 * wrong.max() / images:.0f} %)"
        worst.append((names[i], f"{recalls[i]:.1f} %", f"{images:,}", taken_for))
    return worst


def save_confusion(
    confusion: np.ndarray, class_names: Sequence[str], file: Path | BinaryIO, *, title: str, own_names: Sequence = ()
) -> None:
    """Draw (C, C) counts, true by predicted class, each row as shares of its images, to a PNG.

    own_names: what the data call the classes; a row says both where they differ. Up to 64 classes every one is
    named, beyond that some; up to 20 the share stands in each cell. The row of a class without images stays blank.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = np.asarray(confusion, dtype=np.float64)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)
    num_classes = len(counts)
    side = float(np.clip(0.2 * num_classes, 4.0, 13.0))
    figure = Figure(figsize=(side + 2.6, side + 1.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set_facecolor("#f0f0f0")
    step = -(-num_classes // MAX_NAMED_CLASSES)
    ticks = np.arange(0, num_classes, step)
    names = [_short(class_names[i]) for i in ticks]
    size = 9 if num_classes <= MAX_WRITTEN_CLASSES else 7
    axes.set_xticks(ticks, names, rotation=90, fontsize=size)
    if own_names:
        pairs = ((own_names[i], class_names[i]) for i in ticks)
        names = [_short(b) if name_key(a) == name_key(b) else f"{_short(a)} → {_short(b)}" for a, b in pairs]
    axes.set_yticks(ticks, names, fontsize=size)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title, fontsize=11)
    axes.spines[:].set_visible(False)
    if num_classes <= MAX_WRITTEN_CLASSES:
        for row, column in zip(*np.nonzero(shares >= 0.005), strict=True):
            share = shares[row, column]
            colour = "white" if share > 0.55 else "black"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, format=lambda at, _: f"{100 * at:.0f} %")
    bar.set_label("share of the true class's images")
    bar.outline.set_visible(False)
    figure.savefig(file, format="png", dpi=120)


def _short(name: str, length: int = 24) -> str:
    # Matplotlib reads text between two dollar signs as mathematics.
    name = name.replace("$", r"\$")
    return name if len(name) <= length else name[: length - 1] + "…"


def main(arguments: list[str]) -> None:
    evaluate(parse(ZeroShotOptions, arguments, prog="zero-shot", description=__doc__))
