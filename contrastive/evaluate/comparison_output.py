"""The folder of an evaluation: evaluation.json, evaluation.md, and evaluation.html with a bar for each figure."""

from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from contrastive.errors import UserError
from contrastive.evaluate.comparison import NOTE, Comparison, ModelEntry, Row, markdown
from contrastive.evaluate.tasks import EvaluationTask, Figure
from contrastive.files import claim_folder, write_json, write_whole
from contrastive.page import html_page, html_table
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
    # The rows of a task stand together.
    by_task = groupby(comparison.rows(), key=lambda row: row.task)
    cards = "\n".join(_card(comparison, task, list(rows)) for task, rows in by_task)
    key = (
        '<p><span class="key whisker"></span> 95 % interval over the test samples '
        '<span class="key chance"></span> chance</p>'
    )
    body = f"{key}\n{cards}\n{_all_figures(comparison)}\n{_models(comparison)}\n<footer>{escape(NOTE)}</footer>"
    remark = f"{models} · {comparison.date}{limited}"
    return html_page(f"Evaluation: {comparison.suite}", remark, body, "evaluation.css")


def _card(comparison: Comparison, task: EvaluationTask, rows: list[Row]) -> str:
    head = f"{escape(task.title)} <span>{escape(task.data_title)} · {escape(task.features_title)}</span>"
    failed = [
        result for result in comparison.results if result.error is not None and comparison.tasks[result.task] is task
    ]
    lines = "".join(f'<p class="failed">{escape(f"{result.model}: {result.error}")}</p>' for result in failed)
    figures = "".join(_figure(comparison, row) for row in rows if any(isinstance(cell, Figure) for cell in row.cells))
    return f'<section class="card task"><h3>{head}</h3>{figures}{lines}</section>'


def _figure(comparison: Comparison, row: Row) -> str:
    chance = "" if row.chance == "–" else f", chance {row.chance}"
    bars = [
        _bar(row, model.name, cell, place)
        for place, (model, cell) in enumerate(zip(comparison.models, row.cells, strict=True))
        if isinstance(cell, Figure)
    ]
    return f'<div class="figure"><h4>{escape(row.label)}{chance}</h4>{"".join(bars)}</div>'


def _bar(row: Row, name: str, figure: Figure, place: int) -> str:
    track = "<span></span>"
    if not is_rank(row.name):
        low, high = figure.interval or (figure.value, figure.value)
        whisker = f'<b style="left:{low:.2f}%;width:{high - low:.2f}%"></b>' if figure.interval else ""
        chance = "" if figure.chance is None else f'<u style="left:{figure.chance:.2f}%"></u>'
        fill = f'<i style="width:{figure.value:.2f}%;background:var(--c{place % NUM_COLOURS + 1})"></i>'
        track = f'<div class="track">{fill}{chance}{whisker}</div>'
    value, interval = row.value_and_interval(figure)
    return (
        f'<div class="bar"><span class="name">{escape(name)}</span>{track}'
        f'<span class="value">{escape(value)} <small>{interval}</small></span></div>'
    )


def _all_figures(comparison: Comparison) -> str:
    head = ["task", "features", "figure", "chance", *(escape(model.name) for model in comparison.models)]
    rows = []
    for row in comparison.rows(headline=False):
        told = (f"{row.task.title}, {row.task.data_title}", row.task.features_title, row.label, row.chance)
        cells = [row.value_and_interval(cell) for cell in row.cells]
        shown = [
            f"{escape(value)}<br><small>{interval}</small>" if interval else escape(value) for value, interval in cells
        ]
        rows.append([*map(escape, told), *shown])
    table = html_table(head, rows, numbers=range(3, len(head)))
    return f'<h2>All figures</h2><div class="card scroll">{table}</div>'


def _two_lines(value: str, interval: str) -> str:
    return f"{escape(value)}<br><small>{interval}</small>" if interval else escape(value)


def _models(comparison: Comparison) -> str:
    rows = [
        (escape(model.name), escape(model.path), f"<code>{escape((model.key or 'not loaded')[:16])}</code>")
        for model in comparison.models
    ]
    return f'<h2>Models</h2><div class="card scroll">{html_table(("name", "folder", "key"), rows)}</div>'
