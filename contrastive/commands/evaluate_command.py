"""Score models on a list of tasks, or on one, and compare them in one table.

    contrastive evaluate runs/mine --suite small
    contrastive evaluate runs/mine runs/other --suite small --out evaluations/both
    contrastive evaluate runs/mine --task retrieval --data 'test-*.tar'

MODEL is a run folder, a checkpoint folder or a model folder. Prints a table; writes evaluation.json, evaluation.md and
evaluation.html. Embeddings are made once for all tasks and kept in MODEL/embeddings by the hash of the weights, under
`accelerate launch` by all processes together. Data may be a folder that `contrastive embed` wrote. When a task fails
the others go on, and the exit status is 1; when all fail nothing is written, and it is 2.
"""

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import yaml
from tyro.conf import Positional, arg

import contrastive
from contrastive.command_line import LoadingOptions, print_json
from contrastive.config import parse, recipe
from contrastive.distributed.launching import launched, prepare_process
from contrastive.distributed.runtime import joined_ranks
from contrastive.errors import UserError
from contrastive.evaluate.comparison import ModelEntry, claim_output, print_comparison, write_output
from contrastive.evaluate.evaluated_model import EvaluatedModel
from contrastive.evaluate.suite import Suite, embed_suite, read_suite, run_suite, task_from
from contrastive.evaluate.tasks import TASKS
from contrastive.interop.loading import is_hub_name, results_folder
from contrastive.log import is_main_process, say
from contrastive.option_types import Positive
from contrastive.results import folder_name


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(LoadingOptions):
    """Which models, and which tasks."""

    models: Annotated[Positional[tuple[Path, ...]], arg(metavar="MODEL ...")]
    """Folders of runs or models, or hf-hub:ORG/NAME."""
    suite: Annotated[str | None, arg(metavar="NAME|FILE")] = None
    """Tasks in YAML, or one of ours ('list' shows them): tasks: [{task: NAME, data: SPEC}, ...]."""
    task: Annotated[str | None, arg(metavar="NAME")] = None
    """One task in place of a suite; 'list' shows them."""
    data: Annotated[str | None, arg(metavar="SPEC")] = None
    """Of --task: what is scored."""
    train: Annotated[str | None, arg(metavar="SPEC")] = None
    """Of --task: what is fitted on, where something is."""
    option: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE ...")] = ()
    """Of --task: any of its keys, as YAML."""
    out: Annotated[Path | None, arg(metavar="DIR")] = None
    """Where to write; none: MODEL/evaluation/SUITE, of several models evaluations/."""
    limit: Positive[int | None] = None
    """Use a fixed random subset of N of each data set."""
    cache: Annotated[Path | None, arg(metavar="DIR")] = None
    """Keep embeddings there; none: in MODEL/embeddings."""
    no_cache: bool = False
    """Neither read nor keep embeddings."""
    json: bool = False
    """Print evaluation.json instead of a table."""

    def __post_init__(self):
        super().__post_init__()
        if not self.models and "list" not in (self.suite, self.task):
            raise UserError("which models? give their folders: contrastive evaluate runs/mine --suite small")


def chosen_suite(options: EvaluateOptions) -> Suite:
    """The suite's file, or the one task that the flags say."""
    single = {name: getattr(options, name) for name in ("data", "train") if getattr(options, name) is not None}
    if options.suite is not None:
        if options.task or single or options.option:
            raise UserError("--suite names all tasks; leave out --task, --data, --train and --option")
        return read_suite(recipe(options.suite, "suites"))
    if options.task == "list":
        print("\n".join(TASKS.names()))
        sys.exit(0)
    if options.task is None:
        raise UserError("give --suite FILE, or --task NAME with --data SPEC")
    values = {"task": options.task, **single}
    if "data" in single and "test" in {key.name for key in dataclasses.fields(TASKS.get(options.task))}:
        values["test"] = values.pop("data")
    for option in options.option:
        key, equals, value = option.partition("=")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals:
            raise UserError(f"--option '{option}': expected KEY=VALUE, as k=[5, 20]")
    needed = {key.name for key in dataclasses.fields(TASKS.get(options.task)) if key.default is dataclasses.MISSING}
    for key, flag in (("train", "--train"), ("test", "--data"), ("data", "--data")):
        if key in needed and key not in values:
            raise UserError(f"--task {options.task}: '{key}' is missing; give {flag} SPEC")
    # What was asked for is in the name, so that another question does not replace the answer.
    said = [options.task, *options.option, options.data or ""]
    said += [f"train={options.train}"] if options.train else []
    said += [f"limit={options.limit}"] if options.limit else []
    return Suite("-".join(map(folder_name, said)), (task_from(values, f"--task {options.task}"),))


def named(runs: Sequence[Path]) -> list[ModelEntry]:
    """The models by short names, as much of their paths as tells them apart."""
    for run in runs:
        if not is_hub_name(run) and not run.exists():
            raise UserError(f"no model at {run}: no such file or folder")
    parts = [run.resolve().parts for run in runs]
    parts = [found[:-1] if found[-1] == "final" and len(found) > 2 else found for found in parts]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(found[-length:]) for found in parts]
        if len(set(names)) == len(names):
            return [ModelEntry(name, str(run)) for name, run in zip(names, runs, strict=True)]
    raise UserError("the same model is given twice; give each once")


def evaluate(options: EvaluateOptions) -> bool:
    """Evaluate as asked for; returns whether every task could be done."""
    suite, entries = chosen_suite(options), named(options.models)
    alone = len(entries) == 1
    out = (
        options.out or (results_folder(options.models[0]) / "evaluation" if alone else Path("evaluations")) / suite.name
    )
    claim_output(out, entries)
    passing = out / ".embeddings"
    if is_main_process():
        shutil.rmtree(passing, ignore_errors=True)
    sources: dict = {}

    def subject(entry: ModelEntry, device) -> EvaluatedModel:
        cache = passing if options.no_cache else options.cache or results_folder(Path(entry.path)) / "embeddings"
        bundle = contrastive.load(entry.path, device=device)
        known = {"sources": sources, "limit": options.limit, "device": device}
        return EvaluatedModel(entry.name, bundle, cache, **known, **options.loading())

    try:
        with joined_ranks(options.device) as device:
            models = [partial(subject, entry, device) for entry in entries]
            if launched():
                embed_suite(models, suite.tasks)
        if not is_main_process():  # embeddings were all that the ranks share
            return True
        comparison = run_suite(entries, models, suite, limit=options.limit)
    finally:
        if is_main_process():
            shutil.rmtree(passing, ignore_errors=True)
    failures = comparison.failures
    if not any(result.outcome for result in comparison.results):  # an earlier evaluation stays as it is
        told = f"none of the {len(suite.tasks)} tasks could be done"
        raise UserError(failures[0] if len(failures) == 1 else told)
    write_output(out, comparison)
    if options.json:
        print_json(comparison.to_json())
    else:
        print_comparison(comparison)
    say(f"wrote {out / 'evaluation.html'}, .md and .json")
    return not failures


def main(arguments: list[str]) -> None:
    prepare_process()
    if not evaluate(parse(EvaluateOptions, arguments, prog="evaluate", description=__doc__)):
        sys.exit(1)
