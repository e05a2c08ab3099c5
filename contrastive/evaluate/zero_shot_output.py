"""What a zero-shot evaluation reads and leaves: class names, the table, zero_shot.json and confusion.png."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from contrastive.data.class_sets import load_class_names
from contrastive.errors import UserError
from contrastive.evaluate.confusion import save_confusion

NUM_WORST = 5


def read_class_names(name_or_file: str | Path, own_names: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return what `load_class_names` does; its UserError names the flag."""
    try:
        return load_class_names(name_or_file, own_names)
    except UserError as error:
        raise UserError(f"--classes {error}") from None


@dataclass(frozen=True)
class ZeroShotOutput:
    """The folder of one model's result on one data set."""

    folder: Path
    model: str
    data: str

    @classmethod
    def claim(cls, run: Path, data: str, folder: Path | None = None) -> "ZeroShotOutput":
        """Choose the folder, RUN/zero_shot/DATA by default, before any work is done.

        Raises:
            UserError: it cannot be written, or holds something else than an earlier result of the same model
                and data. Within RUN the model is taken to be the same, so that RUN can be moved.
        """
        output = cls(folder or run / "zero_shot" / folder_name(data), str(run), data)
        places = (output.folder, *output.folder.absolute().parents)
        nearest = next(place for place in places if place.exists())
        if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
            raise UserError(f"cannot write to {output.folder}; choose another --out DIR")
        output._check_own(same_model=folder is not None)
        return output

    def write(self, result: dict) -> None:
        """Write both files, each whole or not at all, and say where."""
        again = self.json_path.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {
            "model": self.model,
            "data": self.data,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **result,
        }
        partial = self.folder / ".zero_shot.json.partial"
        partial.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        picture = self.folder / ".confusion.partial.png"
        title = f"{self.data}: {result['acc1']:.1f} % of {result['num_images']} images right"
        save_confusion(np.array(result["confusion"]), result["class_names"], picture, title=title)
        os.replace(partial, self.json_path)
        os.replace(picture, self.picture_path)
        replaced = ", replacing the earlier result of this data" if again else ""
        print(f"wrote {self.json_path} and {self.picture_path.name}{replaced}")

    @property
    def json_path(self) -> Path:
        return self.folder / "zero_shot.json"

    @property
    def picture_path(self) -> Path:
        return self.folder / "confusion.png"

    def _check_own(self, same_model: bool) -> None:
        if not self.json_path.exists():
            if self.picture_path.exists():
                raise UserError(f"{self.picture_path} is there without a result; choose another --out DIR")
            return
        try:
            earlier = json.loads(self.json_path.read_text(encoding="utf-8"))
            found = (earlier["model"], earlier["data"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{self.json_path} is no zero-shot result; choose another --out DIR") from None
        if found[1] != self.data or (same_model and found[0] != self.model):
            whose = f"the result of {found[0]} on {found[1]}"
            raise UserError(f"{self.json_path} is {whose}; choose another --out DIR")


def print_result(result: dict, model: Path, data: str) -> None:
    """Print the figures, and the classes with the lowest recall when not all are right."""
    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, key in (
        ("acc@1", "acc1"),
        ("acc@5", "acc5"),
        ("mean per-class recall", "mean_per_class_recall"),
        ("acc@1, classes seen in training", "seen_acc1"),
        ("acc@1, held-out classes", "heldout_acc1"),
        ("chance level", "chance"),
    ):
        if key in result:
            table.add_row(name, f"{result[key]:.2f} %")
    table.add_section()
    table.add_row("images", f"{result['num_images']:,}")
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(result["skipped"].items()))
    table.add_row("images skipped", skipped or "0")
    table.add_row("classes", f"{result['num_classes']:,}")
    missing = result["missing_classes"]
    if missing:
        names = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        table.add_row("classes without images", escape(f"{len(missing):,} ({names})"))
    templates = result["templates"]
    table.add_row("prompt templates", escape(f"{len(templates):,} ({templates[0]!r})"))
    # Long paths stay on one line.
    console.print(f"Zero-shot: {escape(str(model))} on {escape(data)}", soft_wrap=True)
    console.print(table)
    if worst := _worst_classes(result):
        console.print("Classes with the lowest recall")
        console.print(_worst_table(worst))


def _worst_classes(result: dict) -> list[tuple[str, float, int, str]]:
    """(name, recall, images, what it is most often taken for) of the worst classes that err at all."""
    confusion = np.array(result["confusion"])
    names = result["class_names"]
    erring = [i for i, recall in enumerate(result["per_class_recall"]) if recall is not None and recall < 100]
    erring.sort(key=lambda i: result["per_class_recall"][i])
    worst = []
    for i in erring[:NUM_WORST]:
        wrong = confusion[i].copy()
        wrong[i] = 0
        share = 100 * wrong.max() / confusion[i].sum()
        taken_for = f"{names[wrong.argmax()]} ({share:.0f} %)"
        worst.append((names[i], result["per_class_recall"][i], int(confusion[i].sum()), taken_for))
    return worst


def _worst_table(worst: Sequence[tuple[str, float, int, str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("class")
    table.add_column("recall", justify="right")
    table.add_column("images", justify="right")
    table.add_column("most often taken for")
    for name, recall, images, taken_for in worst:
        table.add_row(escape(name), f"{recall:.1f} %", f"{images:,}", escape(taken_for))
    return table


def folder_name(data: str) -> str:
    """A folder name from a data spec: the last two parts of a path, anything unusual as '-'."""
    tail = "-".join(part for part in data.rstrip("/").split("/")[-2:] if part not in ("", ".", ".."))
    return re.sub(r"[^A-Za-z0-9._]+", "-", tail).strip("-.") or "data"
