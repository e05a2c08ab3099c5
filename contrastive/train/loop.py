"""The training loop: data in, one loss over the global batch, an update, now and then a look and a save."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import DataLoader

from contrastive.data.order import SampleOrder
from contrastive.distributed.collectives import all_reduce_sum, gather_objects
from contrastive.distributed.runtime import Runtime
from contrastive.errors import UserError
from contrastive.log import MetricsLog, say, warn
from contrastive.losses import NonFiniteFeatures
from contrastive.optim import ExponentialMovingAverage
from contrastive.optim.base import set_learning_rates
from contrastive.train.bad_samples import BadSamples
from contrastive.train.checkpoint import save_checkpoint
from contrastive.train.interrupt import StopRequest
from contrastive.train.options import RunConfig
from contrastive.train.progress import Advice, ProgressBar, StepTimer
from contrastive.train.run_folder import RunFolder
from contrastive.train.task import Task


@dataclass
class Trainer:
    """A run in progress: its parts, and the step it stands at."""

    config: RunConfig
    runtime: Runtime
    folder: RunFolder
    task: Task
    wrapped: nn.Module
    """The model as the runtime wraps it; `task.model` is the same weights bare."""
    optimizers: list[torch.optim.Optimizer]
    ema: ExponentialMovingAverage | None
    order: SampleOrder
    fingerprint: str
    bad_samples: BadSamples
    """What the loaders passed over."""
    timeout: float
    """Seconds that ranks wait for each other."""
    step: int = 0
    """Steps done."""
    _skipped_in_a_row: int = 0

    def fit(self, loader: DataLoader, metrics: MetricsLog | None) -> bool:
        """Train until the last step or a request to stop; return whether the last step was reached.

        Args:
            loader: this rank's batches from `step` on.
            metrics: where rows go; None on all ranks but the first.

        Raises:
            UserError: the loss is not finite for several steps, or a checkpoint cannot be written.
        """
        config, total = self.config, self.config.train.steps
        timer = StepTimer(config.train.global_batch_size)
        advice = Advice(self.task.chance_loss, self.task.advice, total)
        with StopRequest() as stop, ProgressBar(self.step, total) as bar:
            if self.step == 0:
                self._save()  # so that --resume works from the first step on
            elif not gather_objects(metrics is not None and metrics.has("eval", self.step))[0]:
                self._evaluate_if_due(metrics)  # a kill came between the save and the evaluation
            for batch in loader:
                timer.data_arrived()
                row, stopping = self._one_step(batch, stop, metrics)
                timer.step_done()
                if self.step % config.train.log_every == 0 or self.step == total:
                    row |= {"samples_per_second": timer.samples_per_second, "data_wait": timer.data_wait}
                    self._log("train", row, metrics)
                    bar.show(row)
                    advice.consider(row)
                if self.step % config.checkpoint.every == 0 or self.step == total or stopping:
                    self._count_bad_samples(metrics)
                    self._save()
                if stopping and self.step < total:
                    say(f"stopped at step {self.step} and saved; continue with --resume")
                    return False
                self._evaluate_if_due(metrics)
                timer.pause_over()
        return True

    def _one_step(self, batch: dict, stop: StopRequest, metrics: MetricsLog | None) -> tuple[dict, bool]:
        """Do one optimizer step; return its row for the log and whether any rank was asked to stop."""
        config = self.config
        factor = config.schedule.factor(self.step, config.train.steps)
        set_learning_rates(self.optimizers, factor)
        self.bad_samples.note(batch["bad"])
        replaced = int(batch["replaced"].sum())
        self.runtime.meet(self.step, self.timeout)
        try:
            loss = self.task.forward_backward(self.wrapped, batch, self.step, self.runtime)
        except NonFiniteFeatures as error:  # raised on all ranks alike, which skip this step
            warn(f"step {self.step + 1}: {error}")
            loss = torch.tensor(math.nan, device=self.runtime.device)
        norm = nn.utils.clip_grad_norm_(self.task.model.parameters(), config.train.max_grad_norm)
        # One small sum tells every rank the same: the global loss, whether anyone was asked to stop, bad samples.
        shared = all_reduce_sum(torch.stack([loss.double(), *loss.new_tensor([stop.as_number(), replaced]).double()]))
        loss_sum, requests, replaced = shared.tolist()
        mean_loss = loss_sum / self.runtime.world_size
        self._update(mean_loss, norm.item())
        self.step += 1
        self._stop_if_too_many_are_bad(int(replaced), metrics)
        return {
            "step": self.step,
            "loss": mean_loss,
            "grad_norm": norm.item(),
            "lr": config.optimizer.lr * factor,
            **self.task.figures(),
        }, requests > 0

    @torch.no_grad()
    def _update(self, loss: float, grad_norm: float) -> None:
        """Move the weights, unless the loss or gradient is not finite; those are equal on all ranks."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._skipped_in_a_row = 0
            for optimizer in self.optimizers:
                optimizer.step()
            self.task.after_update()
            if self.ema is not None:
                self.ema.update(self.task.model, self.step)
        else:
            self._skipped_in_a_row += 1
            warn(f"step {self.step + 1} skipped: loss {loss}, gradient norm {grad_norm}")
            if self._skipped_in_a_row >= self.config.train.max_skipped:
                raise UserError(
                    f"{self._skipped_in_a_row} steps in a row had no finite loss or gradient; lower optimizer.lr or "
                    "use --train.precision fp32, and continue from the last checkpoint with --resume"
                )
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def _evaluate_if_due(self, metrics: MetricsLog | None) -> None:
        if self.step % self.config.evaluation.every and self.step != self.config.train.steps:
            return
        if self.ema is not None:
            self.ema.swap(self.task.model)
        figures = self.task.evaluate(self.runtime)
        if self.ema is not None:
            self.ema.swap(self.task.model)
        if figures:
            self._log("eval", {"step": self.step, **figures}, metrics)
            by_source: dict[str, list[str]] = {}
            for key, value in figures.items():
                source, _, name = key.partition("/")[2].rpartition("/")
                if "median" not in name:
                    by_source.setdefault(source, []).append(f"{name} {value:.1f}")
            for source, shown in by_source.items():
                say(f"step {self.step}  {source}: {'  '.join(shown)}")

    def _save(self) -> None:
        """Write a checkpoint from the first rank; the others wait, so that none runs ahead of a failure."""
        model = self.task.model
        if self.runtime.is_main:
            save_checkpoint(
                self.folder.checkpoints,
                model=model,
                optimizers=self.optimizers,
                ema=self.ema,
                cursor=self.order.cursor(self.step, self.fingerprint),
                keep=self.config.checkpoint.keep,
                save_model=lambda folder, average: self.task.save(folder, model.state_dict(), average),
            )
        self.runtime.barrier()

    def _count_bad_samples(self, metrics: MetricsLog | None) -> dict:
        """Log and return what all ranks passed over since the last time."""
        taken = self.bad_samples.take()
        if taken["counts"] and metrics is not None:
            metrics.write({"kind": "bad_samples", "step": self.step, **taken})
        return taken

    def _stop_if_too_many_are_bad(self, bad: int, metrics: MetricsLog | None) -> None:
        """Raise UserError, on all ranks at the same step."""
        if self.bad_samples.too_many(self.config.train.global_batch_size, bad):
            raise self.bad_samples.error(self.step, self._count_bad_samples(metrics))

    def _log(self, kind: str, row: dict, metrics: MetricsLog | None) -> None:
        if metrics is not None:
            metrics.write({"kind": kind, **row})
        numbers = {f"{kind}/{k}": v for k, v in row.items() if isinstance(v, float)}
        self.runtime.track(numbers, self.step)
