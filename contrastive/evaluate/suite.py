"""Suites: lists of tasks in a YAML file, and running them over models."""

import dataclasses
import time
import traceback
import typing
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from contrastive.errors import UserError, did_you_mean
from contrastive.evaluate import (  # noqa: F401 - they register their tasks
    captioning,
    compositional,
    feature_probes,
    linear_probe,
    localisation,
    segmentation,
)
from contrastive.evaluate.comparison import Comparison, ModelEntry, TaskResult
from contrastive.evaluate.evaluated_model import EvaluatedModel
from contrastive.evaluate.tasks import TASKS, EvaluationTask
from contrastive.files import read_yaml
from contrastive.log import console, say
from contrastive.option_types import as_option


@dataclass(frozen=True)
class Suite:
    """Tasks under a name."""

    name: str
    tasks: tuple[EvaluationTask, ...]


def read_suite(path: Path) -> Suite:
    """Read `tasks: [{task: NAME, ...}, ...]`.

    Raises:
        UserError: an unreadable file, an unknown task or key (with a suggestion), a value of the wrong type.
    """
    content = read_yaml(path, "the suite")
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), list) or not content["tasks"]:
        raise UserError(
            f"{path}: expected `tasks:` and a list of tasks, each as {{task: zero_shot, data: digits:test}}"
        )
    for key in content:
        if key != "tasks":
            raise UserError(f"{path}: unknown key '{key}'.{did_you_mean(str(key), ['tasks'])}")
    tasks = [task_from(values, f"{path}, task {n}") for n, values in enumerate(content["tasks"], start=1)]
    for number, task in enumerate(tasks):
        if task in tasks[:number]:
            raise UserError(f"{path}: task {number + 1} is task {tasks.index(task) + 1} again; remove one")
    return Suite(path.stem, tuple(tasks))


def task_from(values: object, where: str) -> EvaluationTask:
    """Build a task from {'task': NAME, key: value}; `where` begins each message.

    Raises:
        UserError: as `read_suite`, or a key that is missing.
    """
    if not isinstance(values, dict) or not isinstance(values.get("task"), str):
        raise UserError(f"{where}: expected {{task: NAME, ...}}, one of {', '.join(TASKS.names())}")
    try:
        kind = TASKS.get(values["task"])
        task = kind(**_arguments(kind, {k: v for k, v in values.items() if k != "task"}))
        task.check()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return task


def _arguments(kind: type[EvaluationTask], values: dict) -> dict:
    types = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            raise UserError(f"unknown key '{key}'.{did_you_mean(str(key), fields)} Known: {', '.join(fields)}")
        arguments[key] = as_option(key, types[key], value)
    for name, field in fields.items():
        absent = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if absent and name not in arguments:
            raise UserError(f"'{name}' is missing")
    return arguments


def embed_suite(models: Sequence[Callable[[], EvaluatedModel]], tasks: Sequence[EvaluationTask]) -> None:
    """Embed what the tasks need, all ranks together: call it on all of them before the first one alone evaluates.

    What cannot be embedded is left for `run_suite` to tell.
    """
    for load in models:
        with suppress(UserError):
            subject = load()
            has_texts = subject.bundle.tokenizer is not None
            for need in dict.fromkeys(need for task in tasks for need in task.needs() if has_texts or not need.texts):
                with suppress(UserError):
                    subject.embed(*need)


def run_suite(
    entries: Sequence[ModelEntry],
    models: Sequence[Callable[[], EvaluatedModel]],
    suite: Suite,
    *,
    limit: int | None = None,
) -> Comparison:
    """Evaluate models, each loaded in its turn, on the tasks of a suite.

    A model or a task that fails does not end the others: its result holds the message. One that is alone is left for
    the caller to tell of.
    """
    results = []
    for entry, load in zip(entries, models, strict=True):
        subject, failure = _attempt(load)
        if failure and len(entries) > 1:
            say(f"{entry.name}: {failure}")
        for number, task in enumerate(suite.tasks):
            begun = time.monotonic()
            outcome, error = (None, failure) if subject is None else _attempt(lambda t=task, s=subject: t.run(s))
            seconds = time.monotonic() - begun
            results.append(TaskResult(entry.name, number, outcome, error, seconds))
            what = f"{entry.name}: {task.title} on {task.data_title}"
            if not error:
                say(f"{what}: {seconds:.1f} s")
            elif subject is not None and len(entries) * len(suite.tasks) > 1:
                say(f"{what}: {error}")
        if subject is not None:
            entry.key = subject.key
        del subject  # before the next one is loaded
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return Comparison(suite.name, suite.tasks, entries, results, limit)


def _attempt(call: Callable):
    """(what `call` returns, None) or (None, the message of its failure)."""
    try:
        return call(), None
    except (UserError, OSError) as error:
        return None, str(error)
    except Exception as error:
        # A fault of ours or of the machine: the others may still be evaluated, and the trace is worth having.
        console.print(traceback.format_exc(), markup=False, style="dim")
        return None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
