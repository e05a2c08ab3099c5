"""Many models on many tasks: the results, and the same table of them for the terminal, Markdown and the page."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime

from contrastive.evaluate.bootstrap import LEVEL, RESAMPLES
from contrastive.evaluate.outcome import Figure, Outcome
from contrastive.evaluate.report_figures import Score
from contrastive.evaluate.tasks import TASKS, Task

FORMAT = "contrastive-evaluation-1"
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
class Result:
    """One model on one task: an outcome, or the message of what failed."""

    model: str
    task: int
    outcome: Outcome | None
    error: str | None
    seconds: float


@dataclass(frozen=True)
class TaskEntry:
    """A task as it is told of."""

    task: str
    title: str
    data: str
    features: str
    options: dict

    @property
    def subtitle(self) -> str:
        """The data, and the features where they are not the usual ones."""
        before = ", before the projection" if self.features.startswith("before") else ""
        return f"{self.data}{before}"


@dataclass(frozen=True)
class Row:
    """A figure of a task, for all models."""

    task: TaskEntry
    name: str
    chance: float | None
    cells: tuple[Figure | str, ...]
    """In the order of the models: a figure, or 'failed', or '' where the model has no such figure."""

    @property
    def is_percent(self) -> bool:
        return not self.name.endswith("median_rank")

    @property
    def label(self) -> str:
        """In words: 'acc@1', '5-shot acc@1', 'image → text R@10'."""
        head, _, tail = self.name.partition("_")
        if head.startswith("shot") and head[4:].isdigit():
            return f"{head[4:]}-shot {_words(tail)}"
        if head.startswith("k") and head[1:].isdigit():
            return f"k={head[1:]} {_words(tail)}"
        return _words(self.name)

    def written(self, value: float) -> str:
        return f"{value:.1f} %" if self.is_percent else f"{value:,.1f}"


@dataclass(frozen=True)
class Comparison:
    """Everything that an evaluation found."""

    suite: str
    date: str
    limit: int | None
    models: list[ModelEntry]
    tasks: list[TaskEntry]
    results: list[Result]

    @classmethod
    def of(
        cls,
        suite: str,
        tasks: Sequence[Task],
        models: list[ModelEntry],
        results: list[Result],
        limit: int | None,
    ) -> "Comparison":
        entries = [
            TaskEntry(
                TASKS.name_of(type(task)),
                task.title,
                task.data_title,
                task.features_title,
                {field.name: getattr(task, field.name) for field in fields(task)},
            )
            for task in tasks
        ]
        return cls(suite, datetime.now(UTC).isoformat(timespec="seconds"), limit, models, entries, results)

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
                cells = [_cell(found[model.name], name) for model in self.models]
                chances = [cell.chance for cell in cells if isinstance(cell, Figure) and cell.chance is not None]
                rows.append(Row(task, name, chances[0] if chances else None, tuple(cells)))
        return rows

    def to_json(self) -> dict:
        """What evaluation.json holds."""
        return {
            "format": FORMAT,
            "suite": self.suite,
            "date": self.date,
            "limit": self.limit,
            "interval": {"level": LEVEL, "resamples": RESAMPLES, "over": "test samples"},
            "models": [asdict(model) for model in self.models],
            "tasks": [asdict(task) for task in self.tasks],
            "results": [_result_json(result) for result in self.results],
        }


def _cell(result: Result, name: str) -> Figure | str:
    if result.outcome is None:
        return "failed"
    return result.outcome.figures.get(name, "")


def _result_json(result: Result) -> dict:
    told = {"model": result.model, "task": result.task, "seconds": round(result.seconds, 3)}
    if result.outcome is None:
        return {**told, "error": result.error}
    figures = {
        name: {
            "value": figure.value,
            "low": figure.interval and figure.interval[0],
            "high": figure.interval and figure.interval[1],
            "chance": figure.chance,
        }
        for name, figure in result.outcome.figures.items()
    }
    return {**told, "headline": list(result.outcome.headline), "figures": figures, "details": result.outcome.details}


def _words(name: str) -> str:
    return Score(f"task/{name}").name.replace("mean per class", "mean per-class")
