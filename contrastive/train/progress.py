"""What a person sees of a running loop: figures, read when it is their time, a bar, a line now and then."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from contrastive.log import console, is_main_process, say, warn
from contrastive.results import figure_told, key_parts

T = TypeVar("T")
WINDOW = 20  # steps that speed and waiting are averaged over
SECONDS_BETWEEN_LINES = 15
# Columns of a row that every kind of run has; the others are the task's own.
COMMON = ("step", "loss", "grad_norm", "lr", "samples_per_second", "data_wait")
MEANS = ("loss", "accuracy")  # told of an epoch, where a row has them
STARVED = 0.3  # share of the time waiting for data from which it is worth a warning


class StepTimer:
    """Samples per second and the share of time spent waiting for data, over the last WINDOW steps."""

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self._steps: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._started = self._arrived = 0.0

    def waiting_for(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches; a step begins when its batch is asked for, and what comes after `step_done` is no part."""
        self._started = time.perf_counter()
        for batch in batches:
            self._arrived = time.perf_counter()
            yield batch
            self._started = time.perf_counter()

    def step_done(self) -> None:
        self._steps.append((time.perf_counter() - self._started, self._arrived - self._started))

    @property
    def samples_per_second(self) -> float:
        return self.batch_size * len(self._steps) / sum(total for total, _ in self._steps)

    @property
    def data_wait(self) -> float:
        return sum(waited for _, waited in self._steps) / sum(total for total, _ in self._steps)


class LateFigures:
    """The figures of steps, left on the device until it has long computed them: nobody waits for it meanwhile.

    A row is copied to host memory when it is put, and written when the next one is, on `flush`, or on the way out of
    an error. The outcomes of all steps, with a row of their own or not, are judged then too.

    Args:
        judge: called with each step's number, loss and gradient norm in turn; what it raises goes through.
        write: called with each row in turn, its tensors as numbers.
    """

    def __init__(self, judge: Callable[[int, float, float], None], write: Callable[[dict], None]):
        self._judge, self._write = judge, write
        self._outcomes: dict[int, torch.Tensor] = {}  # by step: loss and gradient norm
        # What is being copied: steps, row, all numbers in host memory, and the event after which they are there.
        self._copied: tuple[list[int], dict, torch.Tensor, torch.cuda.Event | None] | None = None

    def step_done(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Keep the outcome of a step, counted from 1: scalars of all ranks together."""
        self._outcomes[step] = torch.stack([loss.double(), grad_norm.double()])

    def put(self, row: dict) -> None:
        """Write the row that was put before; begin to copy this one, of the last step, with its scalar tensors."""
        self._read()
        tensors = [value.double().view(1) for value in row.values() if isinstance(value, torch.Tensor)]
        numbers = torch.cat([*self._outcomes.values(), *tensors])
        host = numbers.to("cpu", non_blocking=True)  # from a GPU, pinned memory
        event = torch.cuda.current_stream(numbers.device).record_event() if numbers.is_cuda else None
        self._copied = list(self._outcomes), row, host, event
        self._outcomes = {}

    def flush(self) -> None:
        """Write the row that was put last, and have all steps until now judged."""
        self._read()
        if self._outcomes:
            self.put({})
            self._read()

    def _read(self) -> None:
        if self._copied is None:
            return
        (steps, row, host, event), self._copied = self._copied, None
        if event is not None:
            event.synchronize()
        numbers = iter(host.tolist())
        for step in steps:
            self._judge(step, next(numbers), next(numbers))
        if row:
            self._write({k: next(numbers) if isinstance(v, torch.Tensor) else v for k, v in row.items()})

    def __enter__(self) -> "LateFigures":
        return self

    def __exit__(self, *error) -> None:
        if self._copied is not None and (self._copied[-1] is None or self._copied[-1].query()):
            self._read()


@dataclass(frozen=True)
class Epochs:
    """A run's passes over its data. They end between two steps where a batch holds samples of both."""

    num_samples: int
    global_batch_size: int
    steps: int

    def __str__(self) -> str:
        """How many there are: '10', '0.25'."""
        total = self.done(self.steps)
        return f"{self.ended(self.steps) or round(total, 2) or round(total, 4):g}"

    def done(self, step: int) -> float:
        return step * self.global_batch_size / self.num_samples

    def ended(self, step: int) -> int | None:
        """Return which epoch, counted from 1, ends nearest to a step's end; None for a step amid one."""
        number = round(self.done(step))
        # Rounded as the length of a run of so many epochs is, so that the last of them ends with the run.
        return number if number and round(number * self.num_samples / self.global_batch_size) == step else None


class ProgressBar:
    """Shows the training rows, and each epoch's end; use as a context manager. Silent on all ranks but the first."""

    def __init__(self, start_step: int, epochs: Epochs):
        self._bar = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            # Where the terminal is narrow this one gives way, and neither the steps nor the time left.
            TextColumn("{task.fields[figures]}", table_column=Column(ratio=1, no_wrap=True)),
            expand=True,
            console=console,
            disable=not (console.is_terminal and is_main_process()),
        )
        self._task = self._bar.add_task("training", total=epochs.steps, completed=start_step, figures="")
        self._epochs = epochs
        self._last_line = 0.0
        self._first: tuple[int, float] | None = None  # step and time of the first row: its step may have compiled
        self._in_epoch: list[dict] = []  # rows

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()

    def show(self, row: dict) -> None:
        """Show a row of metrics.jsonl."""
        step, now = row["step"], time.monotonic()
        self._first = self._first or (step, now)
        self._in_epoch.append(row)
        own = {name: row[name] for name in row if name not in COMMON and "/" not in name and row[name] is not None}
        figures = f"epoch {self._epochs.done(step):.2f}/{self._epochs}  loss {row['loss']:.4f}"
        figures += "".join(f"  {_told(name, value)}" for name, value in own.items())
        figures += f"  lr {row['lr']:.2g}  {row['samples_per_second']:.0f} samples/s  data wait {row['data_wait']:.0%}"
        self._bar.update(self._task, completed=step, figures=figures)
        if self._bar.disable and (now - self._last_line > SECONDS_BETWEEN_LINES or step == self._epochs.steps):
            self._last_line = now
            say(f"step {step}/{self._epochs.steps}  {figures}{self._time_left(step)}")

    def epoch_ended(self, step: int, number: int, evaluated: dict[str, float]) -> None:
        """Print a line: the means of the epoch's rows, of what was evaluated the first figure of each data set."""
        rows, self._in_epoch = self._in_epoch, []
        means = {name: [row[name] for row in rows] for name in MEANS if rows and name in rows[0]}
        figures = [_told(name, sum(values) / len(values), digits=4) for name, values in means.items()]
        firsts: dict[str, str] = {}
        for _, source, name, value in ((*key_parts(key), value) for key, value in evaluated.items()):
            firsts.setdefault(source, f"{source} {figure_told(name, value)}")
        told = "  ".join([f"Epoch [{number}/{self._epochs}]", *figures, *firsts.values()])
        say(told + self._time_left(step))

    def _time_left(self, step: int) -> str:
        """At the pace since the first row, with all evaluations and saves."""
        first, since = self._first or (step, 0.0)
        if step in (first, self._epochs.steps):
            return ""
        seconds = (time.monotonic() - since) / (step - first) * (self._epochs.steps - step)
        return f"  {timedelta(seconds=round(seconds))} left"


def _told(name: str, value: float, digits: int = 2) -> str:
    """Return a figure of a row: 'scale 9.99', 'accuracy 93.8 %'."""
    return f"accuracy {value:.1f} %" if name == "accuracy" else f"{name.removeprefix('logit_')} {value:.{digits}f}"


class Advice:
    """Warns once each when a run does not learn or its data loader starves the device.

    Args:
        chance_loss: of a model that tells nothing apart.
        hint: what to do when the loss stays there.
    """

    def __init__(self, chance_loss: float, hint: str, total_steps: int):
        self._chance_loss = chance_loss
        self._hint = hint
        self._patience = max(200, total_steps // 10)
        self._losses: deque[float] = deque(maxlen=50)
        self._given: set[str] = set()

    def consider(self, row: dict) -> None:
        """Look at a row of metrics.jsonl and warn when it says that something is wrong."""
        self._losses.append(row.get("contrastive_loss", row["loss"]))  # of the rest chance is not known
        if row["step"] >= self._patience and sum(self._losses) / len(self._losses) > 0.97 * self._chance_loss:
            self._once(
                "no learning",
                f"after {row['step']} steps the loss is still {row['loss']:.2f}, where a model that tells nothing "
                f"apart sits ({self._chance_loss:.2f}): {self._hint}",
            )
        if row["step"] >= WINDOW and row["data_wait"] > STARVED:
            self._once(
                "starving",
                f"the device waits for data {row['data_wait']:.0%} of the time: raise --data.num_workers, or store "
                "smaller images",
            )

    def _once(self, kind: str, message: str) -> None:
        if kind not in self._given:
            self._given.add(kind)
            warn(message)
