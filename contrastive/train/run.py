"""From a task to a finished run: processes, lock, optimizers, the loop, the final model and the report."""

from dataclasses import replace
from pathlib import Path

import torch
from rich.table import Table

from contrastive.config import flatten, to_dict
from contrastive.data.loader import train_loader
from contrastive.data.order import SampleOrder, check_cursor
from contrastive.data.order_choice import order_for
from contrastive.data.record import Source
from contrastive.data.settings import ImageDataConfig
from contrastive.distributed.collectives import gather_objects
from contrastive.distributed.runtime import Runtime
from contrastive.errors import UserError
from contrastive.evaluate.report import write_report
from contrastive.files import write_folder
from contrastive.log import MetricsLog, console, is_main_process, read_metrics, say, warn
from contrastive.optim import ExponentialMovingAverage
from contrastive.train.bad_samples import BadSamples, merged
from contrastive.train.checkpoint import find_checkpoint, load_checkpoint, read_cursor
from contrastive.train.loop import Trainer
from contrastive.train.options import RunConfig, check_division, num_workers
from contrastive.train.run_folder import RunFolder
from contrastive.train.task import Task


def open_run(config: RunConfig) -> tuple[RunFolder, Path | None]:
    """Return the run's folder, and with --resume the checkpoint to go on from.

    Raises:
        UserError: the folder holds a run and should not, or the other way round, or no whole checkpoint.
    """
    folder = RunFolder(Path(config.run_folder), config.resume)
    if is_main_process():
        folder.check()
    return folder, find_checkpoint(folder.checkpoints) if config.resume else None


def run(
    config: RunConfig, data: ImageDataConfig, folder: RunFolder, checkpoint: Path | None, source: Source, task: Task
) -> bool:
    """Train a task, under `accelerate launch` or alone.

    Args:
        config: resolved. data: its options of the data.
        folder, checkpoint: from `open_run`.

    Returns:
        Whether the run reached its last step; False when a signal stopped it after saving.

    Raises:
        UserError: what cannot work with these processes, or what happens on the way.
    """
    order = order_for(
        source,
        config.train.global_batch_size,
        config.train.seed,
        window=data.window,
        lanes=data.lanes,
        replacement=data.replacement,
    )
    runtime = Runtime(config.train.precision, config.trackers, folder.path)
    try:
        check_division(config.train, runtime.world_size)
        if runtime.is_main:
            folder.lock()
        seen = gather_objects(checkpoint and checkpoint.name)
        if len(set(seen)) > 1:
            raise UserError(f"ranks see different checkpoints in {folder.checkpoints}: {', '.join(map(str, seen))}")
        trainer = _trainer(config, data, runtime, folder, source, order, task, checkpoint)
        if runtime.is_main:
            folder.write_config(to_dict(replace(config, resume=False)))
            _show(trainer, source)
        runtime.start_trackers(folder.path.name, flatten(to_dict(config)))
        finished = _train(trainer, data)
        if finished:
            _finish(trainer)
        runtime.barrier()  # the others wait for the first rank's files
        runtime.close()
    finally:
        folder.unlock()
    return finished


def _trainer(
    config: RunConfig,
    data: ImageDataConfig,
    runtime: Runtime,
    folder: RunFolder,
    source: Source,
    order: SampleOrder,
    task: Task,
    checkpoint: Path | None,
) -> Trainer:
    """Build the optimizers, and bring all to where the run stands."""
    model = task.model.to(runtime.device)
    optimizers = config.optimizer.build(model)
    decay = config.train.ema_decay
    ema = None if decay is None else ExponentialMovingAverage(model, decay)
    step = 0
    if checkpoint is not None:
        cursor = read_cursor(checkpoint)
        step = cursor["step"]
        check_cursor(cursor, order.cursor(step, source.fingerprint))
        load_checkpoint(checkpoint, model, optimizers, ema)
        say(f"resuming {folder.path} from {checkpoint.name}")
    return Trainer(
        config=config,
        runtime=runtime,
        folder=folder,
        task=task,
        wrapped=runtime.wrap(model),
        optimizers=optimizers,
        ema=ema,
        order=order,
        fingerprint=source.fingerprint,
        bad_samples=BadSamples(data.max_bad_share, data.bad_window),
        timeout=data.timeout,
        step=step,
    )


def _train(trainer: Trainer, data: ImageDataConfig) -> bool:
    config, runtime = trainer.config, trainer.runtime
    loader = train_loader(
        trainer.task.dataset(trainer.order),
        global_batch_size=config.train.global_batch_size,
        rank=runtime.rank,
        world_size=runtime.world_size,
        start_step=trainer.step,
        num_steps=max(0, config.train.steps - trainer.step),
        num_workers=num_workers(data, runtime.device.type == "cuda"),
        timeout=data.timeout,
        pin_memory=runtime.device.type == "cuda",
    )
    metrics = MetricsLog(trainer.folder.metrics, trainer.step) if runtime.is_main else None
    try:
        return trainer.fit(loader, metrics)
    finally:
        if metrics is not None:
            metrics.close()


def _finish(trainer: Trainer) -> None:
    """Write the final model, the averaged weights if there are any, and the report."""
    task, folder = trainer.task, trainer.folder
    if trainer.ema is not None:
        trainer.ema.swap(task.model)
    task.conclude(folder, trainer.runtime)
    if not trainer.runtime.is_main:
        return
    write_folder(folder.final, lambda temporary: task.save(temporary, task.model.state_dict()))
    metrics = read_metrics(folder.metrics)
    bad_samples = merged(row for row in metrics if row["kind"] == "bad_samples")
    if bad_samples["counts"]:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(bad_samples["counts"].items()))
        warn(f"samples passed over and replaced: {counts}")
    write_report(
        folder.report,
        title=folder.path.name,
        config=to_dict(trainer.config),
        metrics=metrics,
        bad_samples=bad_samples["counts"],
        bad_keys=bad_samples["keys"],
        **task.report(trainer.runtime.device),
    )
    say(f"model: {folder.final}   report: {folder.report}")


def _show(trainer: Trainer, source: Source) -> None:
    """Print what is about to be trained, on what, where."""
    train, runtime = trainer.config.train, trainer.runtime
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("run", str(trainer.folder.path))
    table.add_row("data", f"{source.name}: {len(source):,} samples")
    for name, text in trainer.task.describe():
        table.add_row(name, text)
    table.add_row("training", f"{train.steps:,} steps of {train.global_batch_size:,} samples")
    threads = f", {torch.get_num_threads()} threads each" if runtime.device.type == "cpu" else ""
    table.add_row("on", f"{runtime.world_size} x {runtime.device.type}, {runtime.precision}{threads}")
    console.print(table)
