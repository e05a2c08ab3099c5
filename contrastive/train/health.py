"""How a run notices that it goes wrong: its options, the judge of its steps, norms of its blocks, a watch for hangs."""

import faulthandler
import math
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from contrastive.distributed.collectives import all_reduce_sum, world_size
from contrastive.distributed.sharding import is_sharded, local
from contrastive.errors import UserError
from contrastive.log import warn
from contrastive.models.transformer import Transformer
from contrastive.option_types import Positive

DEVIATION = 1.4826  # of a normal distribution, in median absolute deviations


@dataclass(frozen=True)
class HealthConfig:
    """How a run notices that it goes wrong, and what it does then."""

    hang_after: Positive[float] = 200.0
    """Seconds without the end of a step after which the stacks of all threads are written to stacks/ in the run folder;
    best below data.timeout. While it starts, evaluates or saves, it is health.patience."""
    patience: Positive[float] = 3600.0
    """Seconds that ranks wait for one another while the run starts, evaluates or saves; in a step data.timeout."""
    on_non_finite: Literal["stop", "roll_back"] = "stop"
    """After train.max_skipped steps in a row without a finite loss or gradient. roll_back: go on from the last
    checkpoint before them, without their batches."""
    on_spike: Literal["none", "warn", "roll_back"] = "warn"
    """What to do where the loss stays far above what it was. roll_back: as on_non_finite."""
    spike_window: Positive[int] = 100
    """Steps, after the warm-up too, whose losses say what is usual."""
    spike_threshold: Positive[float] = 10.0
    """Standard deviations above the median from which a loss is high, estimated so that outliers do not count; at least
    1 % of the median each."""
    spike_steps: Positive[int] = 5
    """Steps in a row with a high loss that make a spike, and whose batches are left out."""
    max_roll_backs: Positive[int] = 3
    """Times in a row that a run goes back to one checkpoint; then it stops."""

    norms_every: Positive[int | None] = None
    """Steps between rows of metrics.jsonl that also say how large the gradient and the output of each block are; none:
    none do."""

    @property
    def rolls_back(self) -> bool:
        return "roll_back" in (self.on_non_finite, self.on_spike)


class TroubleError(Exception):
    """Steps `first` to `last`, counted from 1, went wrong: `what`; a roll back is asked for."""

    def __init__(self, first: int, last: int, what: str):
        super().__init__(what)
        self.first, self.last, self.what = first, last, what


class Judge:
    """Looks at the outcomes of the steps in turn, the same on all ranks; says what is wrong, or raises it.

    Args:
        max_skipped: so many steps in a row without a finite loss or gradient are too many.
        warm_up: the first so many steps have no spikes.
    """

    def __init__(self, options: HealthConfig, max_skipped: int, warm_up: int = 0):
        self.options, self.max_skipped, self.warm_up = options, max_skipped, warm_up
        self._losses: deque[float] = deque(maxlen=options.spike_window)  # of steps that were as usual
        self._skipped = self._high = 0  # in a row

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to judge as this one would."""
        return {"losses": list(self._losses), "skipped": self._skipped, "high": self._high}

    def restore(self, state: dict[str, Any]) -> None:
        self._losses = deque(state.get("losses", ()), maxlen=self.options.spike_window)
        self._skipped, self._high = state.get("skipped", 0), state.get("high", 0)

    def consider(self, step: int, loss: float, grad_norm: float) -> None:
        """Judge a step, counted from 1.

        Raises:
            UserError: too many steps in a row were not finite. TroubleError: the same, or a spike, where to roll back.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            warn(f"step {step} skipped: loss {loss}, gradient norm {grad_norm}")
            self._skipped += 1
            if self._skipped >= self.max_skipped:
                self._not_finite(step)
            return
        self._skipped = 0
        if self.options.on_spike != "none":
            self._look_for_spike(step, loss)

    def _not_finite(self, step: int) -> None:
        what = f"{self._skipped} steps in a row had no finite loss or gradient"
        if self.options.on_non_finite == "roll_back":
            raise TroubleError(step - self._skipped + 1, step, what)
        raise UserError(
            f"{what}; lower optimizer.lr or use --train.precision fp32, and continue from the last checkpoint with "
            "--resume, or have that done with --health.on_non_finite roll_back"
        )

    def _look_for_spike(self, step: int, loss: float) -> None:
        full = len(self._losses) == self.options.spike_window and step > self.warm_up
        # Almost no loss is above all of the last ones: nothing more is computed then.
        if not full or loss <= max(self._losses) or loss <= self._limit():
            self._losses.append(loss)
            self._high = 0
            return
        self._high += 1
        if self._high < self.options.spike_steps:
            return
        usual = statistics.median(self._losses)
        what = f"the loss was {loss:.4g} after {self._high} high steps, where {usual:.4g} was usual"
        first = step - self._high + 1
        self._high = 0
        self._losses.clear()  # of a loss that stays where it is this is said once
        if self.options.on_spike == "roll_back":
            raise TroubleError(first, step, what)
        warn(f"step {step}: {what}; to leave such steps out: --health.on_spike roll_back")

    def _limit(self) -> float:
        median = statistics.median(self._losses)
        spread = DEVIATION * statistics.median(abs(loss - median) for loss in self._losses)
        return median + self.options.spike_threshold * max(spread, 0.01 * abs(median))


class BlockNorms:
    """Figures of a step, for each block of each transformer in `model` and each of its other parts.

    grad_norm/PART: the norm of the averaged gradient, before it is clipped. output_rms/BLOCK: the root mean square of
    what leaves the block, over all tokens of the global batch, padding included where it is computed.

    Args:
        every: steps between two that are looked at; None: none is.
    """

    def __init__(self, model: nn.Module, every: int | None):
        self.model, self.every = model, every
        self._transformers = {name: part for name, part in model.named_modules() if isinstance(part, Transformer)}

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Around the passes of a step, counted from 1. Nothing is computed in one that is not due."""
        due = self.every is not None and step % self.every == 0
        for transformer in self._transformers.values():
            transformer.mean_squares = [] if due else None
        yield

    @torch.no_grad()
    def figures(self) -> dict[str, torch.Tensor]:
        """Return the figures of the step that was watched last, detached scalars equal on all ranks, which must call.

        Call it before gradients are clipped. Of a step that was not due there are none.
        """
        found = {}
        if any(transformer.mean_squares is not None for transformer in self._transformers.values()):
            found = self._gradients() | self._outputs()
        for transformer in self._transformers.values():
            transformer.mean_squares = None
        return found

    def _gradients(self) -> dict[str, torch.Tensor]:
        with_gradient = [(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]
        squares: dict[str, list[torch.Tensor]] = {}  # by part: of what this rank has of it
        norms = torch._foreach_norm([local(gradient) for _, gradient in with_gradient], dtype=torch.float32)
        for (name, gradient), norm in zip(with_gradient, norms, strict=True):
            share = 1 if is_sharded(gradient) else 1 / world_size()  # every rank has the whole
            squares.setdefault(self._part(name), []).append(share * norm.square())
        if not squares:
            return {}
        sums = all_reduce_sum(torch.stack([sum(each) for each in squares.values()])).sqrt()
        return {f"grad_norm/{part}": norm for part, norm in zip(squares, sums, strict=True)}

    def _part(self, parameter: str) -> str:
        """'image_tower.blocks.3' of what is in a block, 'image_tower.patch_embed' of other parameters."""
        for name in self._transformers:
            if parameter.startswith(f"{name}.blocks."):
                return _block(name, int(parameter.removeprefix(f"{name}.blocks.").partition(".")[0]))
        return ".".join(parameter.split(".")[:2])

    def _outputs(self) -> dict[str, torch.Tensor]:
        sums, counts = {}, []
        for name, transformer in self._transformers.items():
            if transformer.mean_squares:  # a tower that is not trained may have been left out
                means, tokens = zip(*transformer.mean_squares, strict=True)
                depth = len(transformer.blocks)
                tokens = torch.tensor(tokens, dtype=torch.float32).to(means[0].device).view(-1, depth)
                squares = (torch.stack(means).view(-1, depth) * tokens).sum(0)
                sums |= {f"output_rms/{_block(name, number)}": square for number, square in enumerate(squares)}
                counts.append(tokens.sum(0))
        if not sums:
            return {}
        whole, count = all_reduce_sum(torch.stack([torch.stack(list(sums.values())), torch.cat(counts)]))
        return dict(zip(sums, (whole / count).sqrt(), strict=True))


def _block(transformer: str, number: int) -> str:
    return f"{transformer.removesuffix('transformer')}blocks.{number}"


class HangWatch:
    """Writes FOLDER/stacks/rank-N.txt when nothing has ended for too long, and goes on waiting; a context manager.

    The stacks are written by a thread of C that needs nothing of Python, whatever holds it up; a thread of Python says
    so, on the first rank, if it can. The file is gone at the end where nothing was written.

    Args:
        seconds: without the end of a step. patience: without the end of a start, an evaluation or a save.
    """

    def __init__(self, folder: Path, rank: int, seconds: float, patience: float):
        self.path = folder / "stacks" / f"rank-{rank}.txt"
        self.seconds, self.patience = seconds, max(seconds, patience)
        self._limit = self._armed = 0.0
        self._ended = threading.Event()

    def __enter__(self) -> "HangWatch":
        self.path.parent.mkdir(exist_ok=True)
        self._file = self.path.open("a")
        self._written = self._size()
        self._arm(self.patience)
        self._speaker = threading.Thread(target=self._speak, name="hang watch", daemon=True)
        self._speaker.start()
        return self

    def __exit__(self, *error) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._ended.set()
        self._speaker.join()
        if not self._size():
            self.path.unlink(missing_ok=True)
        self._file.close()
        with suppress(OSError):  # stacks of another rank are in it, or that rank has removed it
            self.path.parent.rmdir()

    def step_done(self) -> None:
        # Armed anew a tenth of a millisecond costs: not at every step of a small model.
        if self._limit != self.seconds or time.monotonic() - self._armed > min(1.0, self.seconds / 10):
            self._arm(self.seconds)

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Meanwhile something goes on that may take longer than a step."""
        before = self._limit
        self._arm(self.patience)
        yield
        self._arm(before)

    def _arm(self, seconds: float) -> None:
        self._limit, self._armed = seconds, time.monotonic()
        faulthandler.dump_traceback_later(seconds, file=self._file)

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _speak(self) -> None:
        before = self._written
        while not self._ended.wait(min(5.0, self.seconds / 4)):
            size = self._size()
            if before == size != self._written:  # nothing is being written any more
                self._written = size
                warn(
                    f"no step, evaluation or save has ended for {self._limit:g} seconds: see where each rank stands in "
                    f"{self.path.parent}; still waiting"
                )
            before = size
