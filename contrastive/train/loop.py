"""The training loop: data in, one loss over the global batch, an update, now and then a look and a save."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from contrastive.data.loader import train_loader
from contrastive.data.order import SampleOrder, check_cursor
from contrastive.distributed.collectives import all_reduce_sum, gather_objects, together
from contrastive.distributed.runtime import Runtime
from contrastive.distributed.sharding import average_whole_gradients, clip_gradients, reshard, unsharded
from contrastive.log import MetricsLog, say, warn
from contrastive.losses import NonFiniteFeatures
from contrastive.models.transformer import Transformer
from contrastive.optim import ExponentialMovingAverage, set_learning_rates, step_unless
from contrastive.results import figure_told, key_parts
from contrastive.train.bad_samples import BadSamples
from contrastive.train.checkpoint import load_model, load_training_state, read_cursor, reload_weights
from contrastive.train.health import BlockNorms, HangWatch, Judge, TroubleError
from contrastive.train.launches import record_stop, stop_requests
from contrastive.train.options import num_workers
from contrastive.train.progress import Advice, Epochs, LateFigures, ProgressBar, StepTimer
from contrastive.train.saver import CheckpointSaver, last_good
from contrastive.train.task import TrainingTask


class Trainer:
    """A run in progress: its parts, and the step it stands at.

    Args:
        order: of the task's training data.
        folder: the run's, for checkpoints/ and metrics.jsonl.
        checkpoint: where the run goes on from; None: at the start.
    """

    def __init__(self, task: TrainingTask, order: SampleOrder, runtime: Runtime, folder: Path, checkpoint: Path | None):
        self.config = config = task.config
        self.task, self.order, self.runtime, self.folder = task, order, runtime, folder
        self._plain = copy.deepcopy(task.model).to("meta") if runtime.shards else None
        self.model = task.model.to(runtime.device)
        if checkpoint is not None:
            load_model(checkpoint, self.model)
        transformers = [part for part in self.model.modules() if isinstance(part, Transformer)]
        compiles = runtime.compiles(config.train.compile)
        for transformer in transformers:
            transformer.gradient_checkpointing = config.train.gradient_checkpointing
            if compiles:
                transformer.compile_blocks()
        self.wrapped = runtime.wrap(self.model, [block for part in transformers for block in part.blocks])
        self.optimizers = config.optimizer.build(self.model)
        decay = config.train.ema_decay
        self.ema = None if decay is None else ExponentialMovingAverage(self.model, decay)
        self.bad_samples = BadSamples(config.data.max_bad_share, config.data.bad_window, config.train.global_batch_size)
        parts = self.model, self.optimizers, self.ema
        self.saver = CheckpointSaver(folder / "checkpoints", config.checkpoint, *parts, task.save)
        self.step = 0  # steps done
        self.before_save: Callable[[], None] = lambda: None  # raises where the folder is another launch's by now
        self.norms = BlockNorms(self.model, config.health.norms_every)
        self.judge = Judge(config.health, config.train.max_skipped, config.schedule.warmup_steps or 0)
        self.rolled_back = 0  # times in a row, to where it stands
        self._told: dict | None = None  # of the last time, not yet in the log
        self._settled = runtime.shards or runtime.world_size < 3
        self.metrics: MetricsLog | None = None  # on the first rank, while it trains
        self.figures: LateFigures | None = None  # while it trains
        if checkpoint is not None:
            self._go_on_from(checkpoint)
            say(f"resuming {folder} from {checkpoint.name}")

    def _go_on_from(self, checkpoint: Path) -> None:
        """Take all but the weights from a checkpoint."""
        cursor = read_cursor(checkpoint)
        self.bad_samples.go_on_from(cursor.pop("bad_samples", ""))
        own = cursor.pop("run", {})
        self.step, self.rolled_back = cursor["step"], own.get("rolled_back", 0)
        self.judge.restore(own.get("judge", {}))
        self.order = replace(self.order, skipped=tuple(cursor.get("skipped", ())))
        check_cursor(cursor, self._place())
        load_training_state(checkpoint, self.model, self.optimizers, self.ema)

    def fit(self) -> bool:
        """Train until the last step or a request to stop; return whether the last step was reached.

        Raises:
            UserError: the loss is not finite for several steps, too many samples are bad, or a checkpoint cannot be
                written.
        """
        with stop_requests() as stops, self.saver:
            self.saver.begin(self.step, self.config.train.steps)
            while True:
                try:
                    return self._fit(stops)
                except TroubleError as error:
                    trouble = error.with_traceback(None)  # whose frames hold the loader's workers
                self._roll_back(trouble)

    def _roll_back(self, trouble: TroubleError) -> None:
        """Go back to the last good checkpoint, and leave the batches of the trouble out from there on."""
        self.saver.finish()
        self.before_save()
        checkpoints, most = self.folder / "checkpoints", self.config.health.max_roll_backs
        name = together(lambda: last_good(checkpoints, trouble, most).name if self.runtime.is_main else None)
        checkpoint = checkpoints / gather_objects(name)[0]
        num_steps = trouble.last - trouble.first + 1
        skipped = {*self.order.skipped, *self.order.batches(trouble.first - 1, num_steps).tolist()}
        reload_weights(self.model, checkpoint)
        self._go_on_from(checkpoint)
        self.order = replace(self.order, skipped=tuple(sorted(skipped)))
        self.rolled_back += 1
        self._told = {"step": self.step, "first": trouble.first, "last": trouble.last, "why": trouble.what}
        told = f"back to {checkpoint.name}, and on without the batches of steps {trouble.first} to {trouble.last}"
        warn(f"{trouble.what}: {told}")

    def _fit(self, stops: list[int]) -> bool:
        """As `fit`; TroubleError where to roll back."""
        config, total = self.config, self.config.train.steps
        batches = self.runtime.on_device(self._loader(), self.task.inputs)
        self.epochs = Epochs(self.order.num_samples, config.train.global_batch_size, total)
        timer, bar = StepTimer(config.train.global_batch_size), ProgressBar(self.step, self.epochs)
        advice = Advice(self.task.chance_loss, self.task.advice, total)
        log = MetricsLog(self.folder / "metrics.jsonl", self.step) if self.runtime.is_main else nullcontext()

        def write(row: dict) -> None:
            self._log("train", row)
            bar.show(row)
            advice.consider(row)

        self.figures = LateFigures(self.judge.consider, write)
        self.watch = HangWatch(self.folder, self.runtime.rank, config.health.hang_after, config.health.patience)
        with log as self.metrics, bar, self.figures, self.watch:
            if self._told:
                self._log("roll_back", self._told)
                self._told = None
            if self.step == 0 or self.rolled_back:
                self._save(in_background=False)  # so that --resume works from the first step on, and from a roll back
            if self.step and not gather_objects(self.metrics is not None and self.metrics.has("eval", self.step))[0]:
                self._evaluate_if_due()  # a kill came between the save and the evaluation
            first = self.step
            for batch, inputs in timer.waiting_for(batches):
                # The first step compiles; data.timeout is for those that are alike.
                limit = config.health.patience if self.step == first else config.data.timeout
                with self.runtime.reaching(f"the end of step {self.step + 1}", limit):
                    row, stopping = self._one_step(batch, inputs, stops, limit)
                timer.step_done()
                self.watch.step_done()
                if self.step % config.train.log_every == 0 or self.step == total:
                    row |= {"samples_per_second": timer.samples_per_second, "data_wait": timer.data_wait}
                    self.figures.put(row)
                ends = self.step == total or stopping
                if ends or config.checkpoint.due(self.step):
                    self.rolled_back = 0
                    self._save(in_background=not ends)
                if stopping and self.step < total:
                    record_stop(self.folder, self.step, stops)
                    return False
                evaluated = self._evaluate_if_due()
                if epoch := self.epochs.ended(self.step):
                    self.figures.flush()
                    bar.epoch_ended(self.step, epoch, evaluated)
        return True

    def _one_step(self, batch: dict, inputs: dict, stops: list[int], limit: float) -> tuple[dict, bool]:
        """Queue one optimizer step; return its row for the log, with tensors, and whether any rank was asked to stop.

        The host waits for the other hosts, `limit` seconds at most, but not for the device: it computes this step while
        the next is prepared.
        """
        config, runtime = self.config, self.runtime
        factor = config.schedule.factor(self.step, config.train.steps)
        set_learning_rates(self.optimizers, factor)
        self.bad_samples.note(batch["bad"])
        # A rank that never comes is named here, instead of being waited for in silence inside the loss.
        own = [len(stops), int(batch["replaced"].numpy().sum()), self.saver.failed]
        requests, replaced, not_saved = runtime.summed(own, self.step, limit)
        self.saver.check(not_saved)
        if self.task.begins(self.step):
            self.judge.restore({})  # what was usual says nothing of the loss to come
        with torch.no_grad():
            self.task.before_step(self.step)
        try:
            if not self._settled:
                self._settle(inputs)
            with self.norms.watching(self.step + 1):
                losses = self.task.forward_backward(self.wrapped, inputs, self.step, runtime)
        except NonFiniteFeatures as error:  # raised on all ranks alike, which skip this step
            warn(f"step {self.step + 1}: {error}")
            losses = {"loss": torch.tensor(math.nan, device=runtime.device)}
            if runtime.shards:
                reshard(self.model)
        if runtime.shards:
            average_whole_gradients(self.model.parameters())
        norms = self.norms.figures()
        norm = clip_gradients(self.model.parameters(), config.train.max_grad_norm)
        means = all_reduce_sum(torch.stack([loss.double() for loss in losses.values()])) / runtime.world_size
        self._update(means[0], norm)
        self.step += 1
        self.figures.step_done(self.step, means[0], norm)
        if self.bad_samples.too_many(replaced):  # on all ranks alike
            raise self.bad_samples.error(self.step, self._log_bad_samples())
        told, *others = zip(losses, means.unbind(), strict=True)
        row = {"step": self.step, **dict([told]), "grad_norm": norm, "lr": config.optimizer.lr * factor, **dict(others)}
        return row | self.task.figures() | norms, requests > 0

    def _settle(self, inputs: dict) -> None:
        """Let DDP see one backward pass before the first that counts, where that shows in the sums.

        After its first one it lays the gradients out anew, and a sum over three or more ranks rounds by where a number
        lies: the first step of a run that goes on would not be the same to the bit as in the middle of one.
        """
        self.task.forward_backward(self.wrapped, inputs, 0, self.runtime)  # as the first of all, whatever began since
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self._settled = True

    @torch.no_grad()
    def _update(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Move the weights, unless the loss or gradient, equal on all ranks, is not finite: the device sees to that."""
        skipped = ~(loss.isfinite() & grad_norm.isfinite())
        for optimizer in self.optimizers:
            step_unless(skipped, optimizer)
            optimizer.zero_grad()
        self.task.after_update(self.step, skipped)
        if self.ema is not None:
            self.ema.update(self.model, self.step, skipped)

    def _evaluate_if_due(self) -> dict[str, float]:
        """Return the figures, of none where it is not due."""
        every = self.config.evaluation.every
        due = self.epochs.ended(self.step) is not None if every is None else self.step % every == 0
        if not due and self.step != self.config.train.steps:
            return {}
        self.figures.flush()
        with self._patiently("evaluation"), self.evaluated_model():
            figures = self.task.evaluate(self.runtime)
        if figures:
            self._log("eval", {"step": self.step, **figures})
            by_source: dict[str, list[str]] = {}
            for key, value in figures.items():
                _, source, name = key_parts(key)
                if "median" not in name:
                    by_source.setdefault(source, []).append(figure_told(name, value))
            for source, shown in by_source.items():
                say(f"step {self.step}  {source}: {'  '.join(shown)}")
        return figures

    @contextmanager
    def evaluated_model(self) -> Iterator[None]:
        """Meanwhile the task's model is what a run gives: averaged, where it keeps averages, and not sharded."""
        if self.ema is not None:
            self.ema.swap(self.model)
        if self._plain is not None:
            self.task.model = unsharded(self.model, self._plain, self.runtime.device)
        yield
        self.task.model = self.model
        if self.ema is not None:
            self.ema.swap(self.model)

    def _save(self, in_background: bool) -> None:
        """Save a checkpoint; all ranks wait until nothing is being written, so that none runs ahead of a failure."""
        self.before_save()
        self._log_bad_samples()
        with self._patiently("save"):
            own = {"rolled_back": self.rolled_back, "judge": self.judge.state()}
            cursor = {**self._place(), "bad_samples": self.bad_samples.window_seen(), "run": own}
            self.saver.save(cursor, in_background)

    @contextmanager
    def _patiently(self, doing: str) -> Iterator[None]:
        """Meanwhile ranks wait long for one another, and are named only then: an evaluation or a save."""
        what, patience = f"the end of the {doing} at step {self.step}", self.config.health.patience
        with self.watch.patient(), self.runtime.reaching(what, patience):
            yield

    def _place(self) -> dict:
        return self.order.cursor(self.step, self.task.source.fingerprint)

    def _loader(self) -> DataLoader:
        """This rank's batches from the present step on."""
        config, runtime = self.config, self.runtime
        on_gpu = runtime.device.type == "cuda"
        return train_loader(
            self.task.dataset(self.order),
            rank=runtime.rank,
            world_size=runtime.world_size,
            start_step=self.step,
            num_steps=max(0, config.train.steps - self.step),
            num_workers=num_workers(config.data, on_gpu),
            timeout=config.data.timeout,
            pin_memory=on_gpu,
        )

    def _log(self, kind: str, row: dict) -> None:
        if self.metrics is not None:
            self.metrics.write({"kind": kind, **row})
        numbers = {f"{kind}/{k}": v for k, v in row.items() if isinstance(v, float)}
        self.runtime.track(numbers, row["step"])

    def _log_bad_samples(self) -> dict:
        """Log and return what all ranks passed over since the last time, after the figures until now."""
        self.figures.flush()
        taken = self.bad_samples.take()
        if taken["counts"] and self.metrics is not None:
            self.metrics.write({"kind": "bad_samples", "step": self.step, **taken})
        return taken
