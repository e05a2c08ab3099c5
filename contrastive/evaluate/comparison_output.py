"""The folder of an evaluation: evaluation.json, evaluation.md and evaluation.html."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from contrastive.errors import UserError
from contrastive.evaluate.comparison import FORMAT, Comparison, ModelEntry
from contrastive.evaluate.comparison_page import comparison_page
from contrastive.evaluate.comparison_table import markdown
from contrastive.evaluate.embedding_files import write_json, write_text

JSON, MARKDOWN, PAGE = "evaluation.json", "evaluation.md", "evaluation.html"


def claim_output(folder: Path, models: Sequence[ModelEntry]) -> None:
    """Check that the evaluation of `models` may go to `folder`, before any work is done.

    Raises:
        UserError: it cannot be written, or holds something else than an earlier evaluation of the same models.
    """
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise UserError(f"cannot write to {folder}; choose another --out DIR")
    earlier = folder / JSON
    if not earlier.exists():
        taken = [name for name in (MARKDOWN, PAGE) if (folder / name).exists()]
        if taken:
            raise UserError(f"{folder / taken[0]} is there without {JSON}; choose another --out DIR")
        return
    try:
        content = json.loads(earlier.read_text(encoding="utf-8"))
        ours, paths = content["format"] == FORMAT, [model["path"] for model in content["models"]]
    except (OSError, ValueError, KeyError, TypeError):
        ours, paths = False, []
    if not ours:
        raise UserError(f"{earlier} is no evaluation of ours; choose another --out DIR")
    if sorted(paths) != sorted(model.path for model in models):
        raise UserError(f"{earlier} is the evaluation of {', '.join(paths)}; choose another --out DIR")


def write_output(folder: Path, comparison: Comparison) -> None:
    """Write the three files, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / JSON, comparison.to_json())
    write_text(folder / MARKDOWN, markdown(comparison))
    write_text(folder / PAGE, comparison_page(comparison))
