"""A run from the shell to the final model: options, run folder, processes, the loop, the report.

The run folder is the interface between a run and everything that reads it:

    config.yaml  metrics.jsonl  checkpoints/step-NNNNNNNN/  final/  report.html
"""

import os
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import yaml

from contrastive.command_line import DEVICE, chosen_device
from contrastive.config import flatten, parse, recipe, to_dict, written_options
from contrastive.data.order_choice import order_for
from contrastive.distributed.collectives import gather_objects
from contrastive.distributed.launching import is_orphan, launched
from contrastive.distributed.runtime import Runtime
from contrastive.errors import UserError
from contrastive.files import mend_folders, write_folder, write_whole
from contrastive.log import is_main_process, read_metrics, say, warn
from contrastive.named_sections import take_option
from contrastive.results import folder_name
from contrastive.train.bad_samples import merged
from contrastive.train.checkpoint import find_checkpoint, read_cursor
from contrastive.train.launches import (
    LOCK,
    STOPPED,
    RunLock,
    check_start,
    ending_at_once,
    goes_on,
    stop_requests,
    stopped_status,
)
from contrastive.train.loop import Trainer
from contrastive.train.options import LENGTHS, RunConfig, check_division
from contrastive.train.task import TrainingTask
from contrastive.words import flags_of

C = TypeVar("C", bound=RunConfig)


def command(
    cls: type[C],
    train: Callable[[C], bool],
    args: list[str],
    *,
    name: str,
    doc: str,
    default_recipe: str,
    shown: str,
) -> None:
    """Run `train` with the options that `args` and the configuration file give; exit with 128 + N after signal N.

    Args:
        name, doc, shown: of the command, for its help: see `parse`.
        default_recipe: the configuration where --config names none.
    """
    args, automatic = _take_resume(args)
    args, chosen = take_option(args, "config")
    args, device = take_option(args, "device")
    if device is not None:
        os.environ["ACCELERATE_USE_CPU"] = "true" if chosen_device(device) == "cpu" else "false"
    default_file = recipe(default_recipe)
    config_file = recipe(chosen) if chosen else default_file
    also = {"config": ("NAME", f"A recipe ('list' shows them) or a YAML file [{default_recipe}]"), "device": DEVICE}
    options = {"prog": name, "description": doc, "shown": shown, "also": also}
    options["either"] = (tuple(f"train.{n}" for n in LENGTHS),)
    config = parse(cls, args, config_file, **options)
    stem = config_file.stem if chosen else _stem(config, default_file)
    config = replace(config, run_folder=config.run_folder or f"runs/{stem}-{config.short_name()}")
    if automatic:
        config = replace(config, automatic=True, resume=goes_on(Path(config.run_folder)))
        args = [arg for arg in args if arg != "--resume" or config.resume]
    saved = Path(config.run_folder) / "config.yaml"
    if config.resume and saved.exists():  # the run's own options, with what --config and the flags say now
        from contrastive.train.given import check_preset

        again = parse(cls, args, config_file if chosen else None, base=saved, **options)
        check_preset(config, again)
        config = replace(again, run_folder=config.run_folder, automatic=automatic)
    elif not chosen:  # what the default file says nobody has asked for
        config = replace(config, given={name: True for name, by_flag in config.given.items() if by_flag})
        from contrastive.train.given import for_other_data

        config = for_other_data(config, default_file)
    if "batch_size" in {flag.name for flag in flags_of(args)} and launched():
        batch, ranks = config.train.global_batch_size, int(os.environ["WORLD_SIZE"])
        say(f"--batch_size is the global batch here: {batch} over {ranks} ranks, {batch // ranks} each")
    with ending_at_once():
        if not train(config):
            status = stopped_status(Path(config.run_folder))
            if is_orphan():  # nobody waits, and Python would take all of torch apart: seconds on a busy machine
                os._exit(status)
            sys.exit(status)


def _take_resume(args: list[str]) -> tuple[list[str], bool]:
    """Split the word after --resume off the flags; return the rest, and whether it is 'auto'."""
    args = [word for arg in args for word in (arg.split("=") if arg.startswith("--resume=") else [arg])]
    after = next((flag.value for flag in reversed(flags_of(args)) if flag.name == "resume"), "")
    if after in ("latest", "auto") and "--resume" in args:
        args = [arg for place, arg in enumerate(args) if place != args.index("--resume") + 1]
    elif after:
        raise UserError(
            "--resume goes on from the newest checkpoint of --out, or with auto starts where there is none; "
            + (f"add --out before '{after}'" if os.path.isdir(after) else f"leave out '{after}'")
        )
    return args, after == "auto"


def _stem(config: RunConfig, default_file: Path) -> str:
    """What a run is called after that named no recipe: the default one, or its data where they are others."""
    its = written_options(type(config), default_file).get("data.train")
    if its in (None, config.data.train):
        return default_file.stem
    return re.sub(r"-*\.(tar|csv|tsv|jsonl|json|parquet|gz)\b", "", folder_name(config.data.train))


def open_run(config: RunConfig) -> Path | None:
    """Check the run's folder, and return with --resume the checkpoint to go on from.

    Raises:
        UserError: the folder holds a run and should not, or the other way round, or no whole checkpoint.
    """
    folder = Path(config.run_folder)
    if is_main_process():
        check_start(folder, config.resume, config.automatic)
    if config.resume:  # first of all those by which other options come and go
        from contrastive.train.given import changes_on_resume

        before = written_options(type(config), folder / "config.yaml")
        chosen = re.compile(r".*\.name|objectives\..*")
        changes_on_resume(config, {name: value for name, value in before.items() if chosen.fullmatch(name)})
    return find_checkpoint(folder / "checkpoints") if config.resume else None


def run(task: TrainingTask, checkpoint: Path | None) -> bool:
    """Train a task, under `accelerate launch` or alone.

    Args:
        checkpoint: from `open_run`.

    Returns:
        Whether the run reached its last step; False when a signal stopped it after saving.

    Raises:
        UserError: what cannot work with these processes, or what happens on the way.
    """
    config = task.config
    train, data, folder = config.train, config.data, Path(config.run_folder)
    from contrastive.train.given import changes_on_resume, check_effect, check_steps_done

    check_effect(task)
    changes, done = "", 0
    if checkpoint is not None:
        before = written_options(type(config), folder / "config.yaml")
        changes, done = changes_on_resume(config, before), read_cursor(checkpoint)["step"]
        check_steps_done(task, before, done)
        if config.automatic and done == train.steps and _has_ended(folder):
            say(f"{folder} has reached its last step, {done}: nothing is left to do")
            return True
    options = {"window": data.window, "lanes": data.lanes, "replacement": data.replacement}
    order = order_for(task.source, train.global_batch_size, train.seed, **options)
    runtime = Runtime(train.precision, config.trackers, folder, config.health.patience)
    check_division(train, runtime.world_size)
    if done > train.steps:
        raise UserError(f"train.steps is {train.steps}, but the run has done {done} already; give more")
    if changes:
        say(changes)
    if runtime.is_main:
        from contrastive.train.first_look import first_look  # later than the options, which may be wrong

        first_look(task, order, runtime, resumed_at=done)
    if config.dry_run:
        say("a dry run: nothing was trained, nothing was written")
        runtime.close()
        return True
    with RunLock(folder) if runtime.is_main else nullcontext() as lock:
        if lock:
            _begin(lock, config, done)
        seen = gather_objects(checkpoint and checkpoint.name)
        if len(set(seen)) > 1:
            raise UserError(f"ranks see different checkpoints in {folder}/checkpoints: {', '.join(map(str, seen))}")
        trainer = Trainer(task, order, runtime, folder, checkpoint)
        trainer.before_save = lock.check if lock else trainer.before_save
        if runtime.is_main:
            own = yaml.safe_dump(to_dict(replace(config, resume=False, dry_run=False)), sort_keys=False, width=110)
            write_whole(folder / "config.yaml", own)
        runtime.start_trackers(folder.name, flatten(to_dict(config)), lock.identity if lock else "", done)
        finished = trainer.fit()
        if finished:
            with trainer.evaluated_model(), stop_requests():  # too late for them: a minute more, and it is done
                trainer.before_save()
                _finish(trainer)
        runtime.barrier()  # the others wait for the first rank's files
        runtime.close()
    return finished


def _has_ended(folder: Path) -> bool:
    """Whether nothing of a run is left to write: its last files are there, and no lock of one that was killed."""
    return all((folder / name).exists() for name in ("final", "report.html")) and not (folder / LOCK).exists()


def _begin(lock: RunLock, config: RunConfig, done: int) -> None:
    """Check the folder once more, now that nobody else can begin in it; note the start, clear what a kill left."""
    check_start(lock.folder, config.resume, config.automatic)
    lock.begin(done, config.max_restarts + 1 if config.automatic else None)
    (lock.folder / STOPPED).unlink(missing_ok=True)
    for place in (lock.folder, lock.folder / "checkpoints"):
        mend_folders(place)  # a kill may have cut a save short


def _finish(trainer: Trainer) -> None:
    """Write the final model, the averaged weights if there are any, and the report."""
    # Only a run that ends needs the report, and the pictures in it.
    from contrastive.evaluate.report import write_report

    task, folder = trainer.task, trainer.folder
    task.conclude(folder, trainer.runtime)
    if not trainer.runtime.is_main:
        return
    final, report = folder / "final", folder / "report.html"
    write_folder(final, lambda temporary: task.save(temporary, task.final_weights()))
    metrics = read_metrics(folder / "metrics.jsonl")
    bad_samples = merged(row for row in metrics if row["kind"] == "bad_samples")
    if bad_samples["counts"]:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(bad_samples["counts"].items()))
        warn(f"passed over in the data: {counts}")
    write_report(
        report,
        title=folder.name,
        config=to_dict(trainer.config),
        metrics=metrics,
        bad_samples=bad_samples["counts"],
        bad_keys=bad_samples["keys"],
        **task.report(trainer.runtime.device),
    )
    say(f"model: {final}   report: {report}")
