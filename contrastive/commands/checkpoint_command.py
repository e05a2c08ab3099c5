"""See to the checkpoints of a run.

    contrastive checkpoint list runs/mine
    contrastive checkpoint verify runs/mine
    contrastive checkpoint prune runs/mine --keep 2 --keep_every 10000 --dry_run
    contrastive checkpoint average runs/mine --last 5 --out averaged

list reads them all and says which are whole. verify says the same, and its exit status is 1 where one is damaged.

prune deletes those that are older than the newest whole ones, but for milestones, and says what that frees; not while
the run goes on, which prunes by itself.

average writes a model folder with the mean of their weights, computed in float64, that `contrastive.load` takes. It is
the mean of the weights themselves, not of the averages that train.ema_decay keeps beside them.
"""

import datetime
import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from tyro.conf import Positional, arg

from contrastive.command_line import print_json
from contrastive.config import from_dict, parse
from contrastive.errors import UserError
from contrastive.files import MANIFEST, mend_folders, problem, read_yaml
from contrastive.interop.bundle import checkpoints_in, step_of
from contrastive.log import warn
from contrastive.option_types import Positive, check_bounds
from contrastive.train.averaging import write_average
from contrastive.train.launches import RunLock
from contrastive.train.options import CheckpointConfig
from contrastive.train.saver import expendable, is_milestone

FOR = {"prune": ("keep", "keep_every", "dry_run"), "average": ("last", "steps", "out")}


@dataclass(frozen=True)
class CheckpointOptions:
    """What to do with which checkpoints."""

    action: Annotated[Positional[Literal["list", "verify", "prune", "average"]], arg(metavar="ACTION")]
    """list, verify, prune or average."""
    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run's folder."""
    keep: Positive[int | None] = None
    """prune: how many of the newest whole ones stay; none: as the run says."""
    keep_every: Positive[int | None] = None
    """prune: steps between those that stay for ever; none: as the run says."""
    dry_run: bool = False
    """prune: show what would go, and delete nothing."""
    last: Positive[int | None] = None
    """average: so many of the newest whole ones."""
    steps: tuple[int, ...] = ()
    """average: those of these steps."""
    out: Path | None = None
    """average: the model folder to write."""
    json: bool = False
    """list and verify: print an object a line, instead of a table."""

    def __post_init__(self):
        check_bounds(self)
        for action, names in FOR.items():
            given = [
                field.name
                for field in fields(self)
                if field.name in names and getattr(self, field.name) != field.default
            ]
            if given and action != self.action:
                raise UserError(f"--{given[0]} is for {action}, and has no effect on {self.action}; leave it out")
        if self.json and self.action not in ("list", "verify"):
            raise UserError(f"--json is for list and verify, and has no effect on {self.action}; leave it out")
        if self.action == "average" and (self.out is None or (self.last is None) == (not self.steps)):
            raise UserError("average needs --out FOLDER, and which checkpoints: --last N, or --steps N N ...")


def main(arguments: list[str]) -> None:
    options = parse(CheckpointOptions, arguments, prog="checkpoint", description=__doc__)
    checkpoints = checkpoints_in(options.run / "checkpoints")
    if not checkpoints:
        raise UserError(f"{options.run} has no checkpoints; give the folder of a run, its --out")
    how = _retention(options)
    wrong = {path: problem(path) for path in checkpoints}
    if options.action == "prune":
        with nullcontext() if options.dry_run else RunLock(options.run):
            _prune(options, how, wrong)
    elif options.action == "average":
        _average(options, wrong)
    else:
        _print_json(wrong, how) if options.json else _print(wrong, how)
        if options.action == "verify" and any(wrong.values()):
            sys.exit(1)


def _retention(options: CheckpointOptions) -> CheckpointConfig:
    """Return what the run's config.yaml says, where the flags say nothing."""
    file = options.run / "config.yaml"
    content = read_yaml(file, "the run's options") if file.exists() else {}
    said = content.get("checkpoint") if isinstance(content, dict) else None
    config = from_dict(CheckpointConfig, said if isinstance(said, dict) else {}, str(file))
    given = {name: getattr(options, name) for name in ("keep", "keep_every") if getattr(options, name) is not None}
    return replace(config, **given)


def _print(wrong: dict[Path, str | None], how: CheckpointConfig, going: tuple[Path, ...] = ()) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("step", "size", "date", "state"):
        table.add_column(name, justify="right" if name in ("step", "size") else "left")
    for path, problem_of_it in wrong.items():
        manifest = path / MANIFEST
        written = datetime.datetime.fromtimestamp((manifest if manifest.exists() else path).stat().st_mtime)
        note = ", goes" if path in going else ", a milestone" if is_milestone(path, how.keep_every) else ""
        state, size = f"{problem_of_it or 'whole'}{note}", decimal(_size(path))
        table.add_row(f"{step_of(path):,}", size, f"{written:%Y-%m-%d %H:%M}", state)
    Console().print(table)


def _print_json(wrong: dict[Path, str | None], how: CheckpointConfig) -> None:
    for path, problem_of_it in wrong.items():
        told = {"step": step_of(path), "path": str(path), "bytes": _size(path), "problem": problem_of_it}
        print_json(told | {"milestone": is_milestone(path, how.keep_every)})


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _prune(options: CheckpointOptions, how: CheckpointConfig, wrong: dict[Path, str | None]) -> None:
    going = tuple(expendable(list(wrong), how.keep, how.keep_every, wrong.get))
    _print(wrong, how, going)
    freed = decimal(sum(map(_size, going)))
    if not options.dry_run:
        for path in going:
            shutil.rmtree(path)
        mend_folders(options.run / "checkpoints")
    print(f"{len(going)} {'would go' if options.dry_run else 'deleted'}, {freed}")


def _average(options: CheckpointOptions, wrong: dict[Path, str | None]) -> None:
    if options.steps:
        by_step = {step_of(path): path for path in wrong}
        for step in options.steps:
            if step not in by_step:
                raise UserError(
                    f"{options.run} has no checkpoint of step {step}; it has {', '.join(map(str, by_step))}"
                )
            if wrong[by_step[step]]:
                raise UserError(f"{by_step[step]} is not whole: {wrong[by_step[step]]}; leave it out")
        chosen = [by_step[step] for step in sorted(set(options.steps))]
    else:
        whole = [path for path, problem_of_it in wrong.items() if problem_of_it is None]
        if len(whole) < options.last:
            raise UserError(f"{options.run} has {len(whole)} whole checkpoints; --last {options.last} asks for more")
        chosen = whole[-options.last :]
        for path in wrong:
            if wrong[path] and path > chosen[0]:
                warn(f"checkpoint passed over: {path.name}: {wrong[path]}")
    write_average(chosen, options.out)
    print(f"mean of {len(chosen)}, steps {', '.join(str(step_of(path)) for path in chosen)}: {options.out}")
