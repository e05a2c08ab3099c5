"""From options to a trained model: set the parts up, train, write the final model and the report."""

from dataclasses import replace
from pathlib import Path

import torch
from rich.table import Table

from contrastive.config import flatten, to_dict
from contrastive.data.captions import sampled_captions
from contrastive.data.loader import train_loader
from contrastive.data.order import SampleOrder, check_cursor
from contrastive.data.order_choice import order_for
from contrastive.data.pairs import PairDataset
from contrastive.data.preprocess import Preprocess, PreprocessConfig
from contrastive.data.record import Source
from contrastive.data.sources import open_source
from contrastive.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from contrastive.distributed.collectives import gather_objects
from contrastive.distributed.runtime import Runtime
from contrastive.errors import UserError
from contrastive.evaluate.examples import collect_examples
from contrastive.evaluate.report import write_report
from contrastive.interop.manifest import write_folder
from contrastive.interop.native import save_model
from contrastive.log import MetricsLog, console, is_main_process, read_metrics, say, warn
from contrastive.models import DualEncoder
from contrastive.optim import ExponentialMovingAverage
from contrastive.train.bad_samples import BadSamples, merged
from contrastive.train.checkpoint import find_checkpoint, load_checkpoint, read_cursor
from contrastive.train.evaluation import Evaluated, open_held_out
from contrastive.train.loop import Trainer
from contrastive.train.run_folder import RunFolder
from contrastive.train.settings import PretrainConfig, check, check_division, num_workers, resolve

CLIP_VOCABULARY = 49_408


def pretrain(config: PretrainConfig) -> bool:
    """Train as configured, under `accelerate launch` or alone.

    Returns:
        Whether the run reached its last step; False when a signal stopped it after saving.

    Raises:
        UserError: anything in the options, the data or the run folder that cannot work, before training.
    """
    check(config)
    folder = RunFolder(Path(config.run_folder), config.resume)
    if is_main_process():
        folder.check()
    source = open_source(
        config.data.train,
        image_column=config.data.image_column,
        caption_column=config.data.caption_column,
        prompts=config.data.prompts,
    )
    held_out = open_held_out(config)
    checkpoint = find_checkpoint(folder.checkpoints) if config.resume else None
    tokenizer = _tokenizer(config, source, checkpoint)
    config = resolve(config, source, tokenizer)
    order = order_for(
        source,
        config.train.global_batch_size,
        config.train.seed,
        window=config.data.window,
        lanes=config.data.lanes,
        replacement=config.data.replacement,
    )
    runtime = Runtime(config.train.precision, config.trackers, folder.path)
    try:
        check_division(config.train, runtime.world_size)
        if runtime.is_main:
            folder.lock()
        seen = gather_objects(checkpoint and checkpoint.name)
        if len(set(seen)) > 1:
            raise UserError(f"ranks see different checkpoints in {folder.checkpoints}: {', '.join(map(str, seen))}")
        trainer = _trainer(config, runtime, folder, source, order, tokenizer, held_out, checkpoint)
        if runtime.is_main:
            folder.write_config(to_dict(replace(config, resume=False)))
            _show(trainer, source)
        runtime.start_trackers(folder.path.name, flatten(to_dict(config)))
        finished = _train(trainer, source)
        if finished:
            _finish(trainer, source)
        runtime.barrier()  # the others wait for the first rank's files
        runtime.close()
    finally:
        folder.unlock()
    return finished


def _tokenizer(config: PretrainConfig, source: Source, checkpoint: Path | None) -> Tokenizer:
    """The run's own tokenizer when it resumes; else the one asked for."""
    length = config.model.text.context_length
    if checkpoint is not None:
        return load_tokenizer(checkpoint / "tokenizer", length)
    name = config.data.tokenizer
    if name == "auto":
        name = "clip" if config.model.text.vocab_size == CLIP_VOCABULARY else "bpe"
    if name != "bpe":
        return load_tokenizer(name, length, None if config.data.clean == "none" else config.data.clean)
    return train_bpe(sampled_captions(source), config.data.vocab_size, length, config.data.clean)


def _trainer(
    config: PretrainConfig,
    runtime: Runtime,
    folder: RunFolder,
    source: Source,
    order: SampleOrder,
    tokenizer: Tokenizer,
    held_out: list[Source],
    checkpoint: Path | None,
) -> Trainer:
    """Build the model and optimizers, and bring them to where the run stands."""
    torch.manual_seed(config.train.seed)
    model = DualEncoder(config.model).to(runtime.device)
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
    preprocess = Preprocess(
        PreprocessConfig(config.model.image.image_size, config.data.resize, config.data.mean, config.data.std)
    )
    return Trainer(
        config=config,
        runtime=runtime,
        folder=folder,
        subject=Evaluated(model, preprocess, tokenizer),
        wrapped=runtime.wrap(model),
        loss=config.loss.build(),
        optimizers=optimizers,
        ema=ema,
        order=order,
        fingerprint=source.fingerprint,
        held_out=held_out,
        bad_samples=BadSamples(config.data.max_bad_share, config.data.bad_window),
        step=step,
    )


def _train(trainer: Trainer, source: Source) -> bool:
    config, runtime = trainer.config, trainer.runtime
    dataset = PairDataset(
        source,
        trainer.order,
        trainer.subject.tokenizer,
        config.model.image.image_size,
        config.data.augment,
        config.train.seed,
        config.data.caption_templates,
    )
    loader = train_loader(
        dataset,
        global_batch_size=config.train.global_batch_size,
        rank=runtime.rank,
        world_size=runtime.world_size,
        start_step=trainer.step,
        num_steps=max(0, config.train.steps - trainer.step),
        num_workers=num_workers(config.data, runtime.device.type == "cuda"),
        timeout=config.data.timeout,
        pin_memory=runtime.device.type == "cuda",
    )
    metrics = MetricsLog(trainer.folder.metrics, trainer.step) if runtime.is_main else None
    try:
        return trainer.fit(loader, metrics)
    finally:
        if metrics is not None:
            metrics.close()


def _finish(trainer: Trainer, source: Source) -> None:
    """Write the final model, the averaged weights if there are any, and the report."""
    if trainer.ema is not None:
        trainer.ema.swap(trainer.subject.model)
    if not trainer.runtime.is_main:
        return
    subject, folder = trainer.subject, trainer.folder
    write_folder(
        folder.final,
        lambda temporary: save_model(
            temporary,
            subject.model.state_dict(),
            subject.model.config,
            subject.preprocess.config,
            subject.tokenizer,
        ),
    )
    metrics = read_metrics(folder.metrics)
    bad_samples = merged(row for row in metrics if row["kind"] == "bad_samples")
    if bad_samples["counts"]:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(bad_samples["counts"].items()))
        warn(f"samples passed over and replaced: {counts}")
    shown = trainer.held_out[-1] if trainer.held_out else source
    examples = collect_examples(subject.model, shown, subject.preprocess, subject.tokenizer, trainer.runtime.device)
    write_report(
        folder.report,
        title=folder.path.name,
        config=to_dict(trainer.config),
        metrics=metrics,
        bad_samples=bad_samples["counts"],
        bad_keys=bad_samples["keys"],
        **examples,
    )
    say(f"model: {folder.final}   report: {folder.report}")


def _show(trainer: Trainer, source: Source) -> None:
    """Print what is about to be trained, on what, where."""
    if not is_main_process():
        return
    config, model, runtime = trainer.config, trainer.subject.model, trainer.runtime
    image, text = config.model.image, config.model.text

    def millions(module: torch.nn.Module) -> str:
        return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M"

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("run", str(trainer.folder.path))
    table.add_row("data", f"{source.name}: {len(source):,} samples")
    table.add_row(
        "image tower",
        f"{millions(model.image_tower)}: {image.image_size} px, patch {image.patch_size}, "
        f"width {image.width}, depth {image.depth}",
    )
    table.add_row(
        "text tower",
        f"{millions(model.text_tower)}: {text.vocab_size:,} tokens, length {text.context_length}, "
        f"width {text.width}, depth {text.depth}",
    )
    train = config.train
    table.add_row("training", f"{train.steps:,} steps of {train.global_batch_size:,} pairs")
    threads = f", {torch.get_num_threads()} threads each" if runtime.device.type == "cpu" else ""
    table.add_row("on", f"{runtime.world_size} x {runtime.device.type}, {runtime.precision}{threads}")
    console.print(table)
