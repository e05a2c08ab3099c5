"""The folder of an evaluation: evaluation.json, evaluation.md, and evaluation.html with a bar for each figure."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from contrastive.errors import UserError
from contrastive.evaluate.comparison import NOTE, Comparison, ModelEntry, markdown
from contrastive.files import claim_folder, write_json, write_whole
from contrastive.page import PARTS, filled, html_page
from contrastive.results import EVALUATION_FILE, EVALUATION_FORMAT, is_rank

MARKDOWN, PAGE = "evaluation.md", "evaluation.html"
NUM_COLOURS = 6


def claim_output(folder: Path, models: Sequence[ModelEntry]) -> None:
    """Check that the evaluation of `models` may go to `folder`, before any work is done.

    Raises:
        UserError: it cannot be written, or holds something else than an earlier evaluation of the same models.
    """
    choose = "choose another --out DIR"
    earlier = claim_folder(folder, EVALUATION_FILE, "an evaluation of ours", choose, only=(MARKDOWN, PAGE))
    if earlier is None:
        return
    path = folder / EVALUATION_FILE
    if earlier.get("format") != EVALUATION_FORMAT:
        raise UserError(f"{path} is no evaluation of ours; {choose}")
    paths = [model["path"] for model in earlier["models"]]
    if sorted(paths) != sorted(model.path for model in models):
        raise UserError(f"{path} is the evaluation of {', '.join(paths)}; {choose}")


def write_output(folder: Path, comparison: Comparison) -> None:
    """Write the three files, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / EVALUATION_FILE, comparison.to_json())
    write_whole(folder / MARKDOWN, markdown(comparison))
    write_whole(folder / PAGE, comparison_page(comparison))


def comparison_page(comparison: Comparison) -> str:
    """Return evaluation.html: a card for each task with its headline figures as bars, then a table of all figures."""
    models = ", ".join(model.name for model in comparison.models)
    limited = "" if comparison.limit is None else f" · at most {comparison.limit:,} images of each data set"
    body = filled(
        PARTS / "evaluation.html.jinja",
        comparison=comparison,
        # The rows of a task stand together.
        cards=[(task, list(rows)) for task, rows in groupby(comparison.rows(), key=lambda row: row.task)],
        is_rank=is_rank,
        num_colours=NUM_COLOURS,
        note=NOTE,
    )
    remark = f"{models} · {comparison.date}{limited}"
    return html_page(f"Evaluation: {comparison.suite}", remark, body, "evaluation.css")
