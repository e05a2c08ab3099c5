"""Many models on many tasks: the results, told on the terminal, in Markdown, as JSON and as a page of bars."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from contrastive.errors import UserError
from contrastive.evaluate.tasks import LEVEL, RESAMPLES, TASKS, EvaluationTask, Figure, Outcome
from contrastive.files import claim_folder, write_json, write_whole
from contrastive.page import PARTS, filled, html_page
from contrastive.results import EVALUATION_FILE, EVALUATION_FORMAT, figure_title, figure_written, is_rank

MARKDOWN, PAGE = "evaluation.md", "evaluation.html"
NUM_COLOURS = 6
NOTE = (
    f"[low, high]: {LEVEL} % bootstrap interval over the test samples, {RESAMPLES:,} resamples; it says nothing of "
    "other training seeds. Chance: what guessing scores."
)


@dataclass
class ModelEntry:
    """A model of the comparison."""

    name: str
    path: str
    key: str | None = None
    """Its `model_key`; None where it could not be loaded."""


@dataclass(frozen=True)
class TaskResult:
    """One model on one task: an outcome, or the message of what failed."""

    model: str
    task: int
    """Its place in the suite."""
    outcome: Outcome | None
    error: str | None
    seconds: float

    def to_json(self) -> dict:
        told = {"model": self.model, "task": self.task, "seconds": round(self.seconds, 3)}
        if self.outcome is None:
            return {**told, "error": self.error}
        figures = {}
        for name, figure in self.outcome.figures.items():
            low, high = figure.interval or (None, None)
            figures[name] = {"value": figure.value, "low": low, "high": high, "chance": figure.chance}
        return {**told, "headline": list(self.outcome.headline), "figures": figures, "details": self.outcome.details}


@dataclass(frozen=True)
class Row:
    """A figure of a task, for all models."""

    task: EvaluationTask
    name: str
    """Of the figure; empty for a task that failed on every model."""
    cells: tuple[Figure | str, ...]
    """In the order of the models: a figure, or 'failed', or '' where the model has no such figure."""

    @property
    def label(self) -> str:
        return figure_title(self.name)

    @property
    def chance(self) -> str:
        """What guessing scores, the same for every model; '–' where nothing is known of it."""
        known = (cell.chance for cell in self.cells if isinstance(cell, Figure) and cell.chance is not None)
        return next((self.written(chance) for chance in known), "–")

    def written(self, value: float) -> str:
        return figure_written(self.name, value)

    def value_and_interval(self, cell: Figure | str) -> tuple[str, str]:
        """Both as text; '' for what there is not."""
        if isinstance(cell, str):
            return cell, ""
        return self.written(cell.value), "[{:.1f}, {:.1f}]".format(*cell.interval) if cell.interval else ""


@dataclass(frozen=True)
class Comparison:
    """Everything that an evaluation found."""

    suite: str
    tasks: Sequence[EvaluationTask]
    models: Sequence[ModelEntry]
    results: Sequence[TaskResult]
    limit: int | None = None
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def failures(self) -> list[str]:
        """One line for each result that is a failure; one for a model that failed on all tasks alike."""
        lines = []
        for model in self.models:
            failed = [result for result in self.results if result.model == model.name and result.error]
            if len(failed) == len(self.tasks) > 1 and len({result.error for result in failed}) == 1:
                lines.append(f"{model.name}, all tasks: {failed[0].error}")
                continue
            for result in failed:
                task = self.tasks[result.task]
                lines.append(f"{model.name}, {task.title} on {task.subtitle}: {result.error}")
        return lines

    def rows(self, headline: bool = True) -> list[Row]:
        """The figures of each task in turn; `headline`: only those to show first."""
        rows = []
        for number, task in enumerate(self.tasks):
            found = {result.model: result for result in self.results if result.task == number}
            outcomes = [result.outcome for result in found.values() if result.outcome is not None]
            chosen = [outcome.headline if headline else outcome.figures for outcome in outcomes]
            names = dict.fromkeys(name for chosen_names in chosen for name in chosen_names)
            for name in names or ("",):  # a task that failed on every model has a row too
                rows.append(Row(task, name, tuple(_cell(found[model.name], name) for model in self.models)))
        return rows

    def to_json(self) -> dict:
        """What evaluation.json holds; contrastive/results.py reads it."""
        return {
            "format": EVALUATION_FORMAT,
            "suite": self.suite,
            "date": self.date,
            "limit": self.limit,
            "interval": {"level": LEVEL, "resamples": RESAMPLES, "over": "test samples"},
            "models": [asdict(model) for model in self.models],
            "tasks": [_task_json(task) for task in self.tasks],
            "results": [result.to_json() for result in self.results],
        }


def _cell(result: TaskResult, name: str) -> Figure | str:
    return "failed" if result.outcome is None else result.outcome.figures.get(name, "")


def _task_json(task: EvaluationTask) -> dict:
    return {
        "task": TASKS.name_of(type(task)),
        "title": task.title,
        "data": task.data_title,
        "features": task.features_title,
        "options": {option.name: getattr(task, option.name) for option in fields(task)},
    }


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print the headline figures: models side by side where they fit, else below each other."""
    console = console or Console(highlight=False)
    table: Table | Group = _side_by_side(comparison)
    unbound = console.options.update(max_width=100_000)
    if Measurement.get(console, unbound, table).minimum > console.width:
        table = _below_each_other(comparison)
    console.print(table)
    for line in comparison.failures:
        console.print(Text(f"failed: {line}", style="red"), soft_wrap=True)
    console.print(Text(f"{NOTE}{_limited(comparison)}", style="dim"))


def _side_by_side(comparison: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("task", overflow="fold", min_width=20)
    table.add_column("figure", no_wrap=True)
    table.add_column("chance", justify="right", no_wrap=True)
    for place, model in enumerate(comparison.models):
        told = [part for row in comparison.rows() for part in row.value_and_interval(row.cells[place])]
        least = max(12, *map(len, told))  # names are folded, figures are not
        table.add_column(Text(model.name), justify="right", overflow="fold", min_width=least)
    for task, rows in groupby(comparison.rows(), key=lambda row: row.task):
        told = Text.assemble(task.title, ("\n" + task.subtitle.replace(", ", "\n"), "dim"))
        for row in rows:
            table.add_row(
                told, row.label, row.chance, *(_two_lines(*row.value_and_interval(cell)) for cell in row.cells)
            )
            told = Text()  # in the first of a task's rows
    return table


def _two_lines(value: str, interval: str) -> Text:
    return Text.assemble(value, (f"\n{interval}", "dim")) if interval else Text(value)


def _below_each_other(comparison: Comparison) -> Group:
    parts: list[Text | Table] = []
    for row in comparison.rows():
        parts.append(Text.assemble("\n", (row.task.title, "bold"), f" on {row.task.subtitle}"))
        parts.append(Text(f"{row.label}, chance {row.chance}" if row.label else "", style="dim"))
        table = Table.grid(padding=(0, 2))
        table.add_column(overflow="fold")
        table.add_column(justify="right", no_wrap=True)
        table.add_column(no_wrap=True)
        for model, cell in zip(comparison.models, row.cells, strict=True):
            table.add_row(Text(f"  {model.name}"), *map(Text, row.value_and_interval(cell)))
        parts.append(table)
    return Group(*parts, Text())


def markdown(comparison: Comparison) -> str:
    """Return evaluation.md: the headline figures, every model a column."""
    names = [_escaped(model.name) for model in comparison.models]
    head = ["task", "data", "features", "figure", "chance", *names]
    lines = [f"# {_escaped(comparison.suite)}", "", _row(head), _row(["---"] * 4 + ["--:"] * (1 + len(names)))]
    for row in comparison.rows():
        cells = [" ".join(row.value_and_interval(cell)).strip() for cell in row.cells]
        told = (row.task.title, row.task.data_title, row.task.features_title, row.label, row.chance)
        lines.append(_row([*map(_escaped, told), *cells]))
    lines += ["", f"{NOTE}{_limited(comparison)} {comparison.date}"]
    if comparison.failures:
        lines += ["", *(f"- failed: {_escaped(line)}" for line in comparison.failures)]
    return "\n".join(lines) + "\n"


def _limited(comparison: Comparison) -> str:
    return "" if comparison.limit is None else f" At most {comparison.limit:,} images of each data set."


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    for character in "\\|*_`<[":
        text = text.replace(character, f"\\{character}")
    return text.replace("\n", " ")


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
