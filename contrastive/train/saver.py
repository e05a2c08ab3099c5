"""A run's checkpoints: when they are written, which of them stay, which one is gone back to.

They are written beside training, by one thread, from a copy of the state in host memory.
"""

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch
import torch.distributed as dist
from rich.filesize import decimal
from torch import nn

from contrastive.distributed.collectives import gather_objects, rank
from contrastive.distributed.sharding import is_sharded
from contrastive.errors import UserError, reason_of
from contrastive.files import check_writable, problem
from contrastive.interop.bundle import checkpoints_in, step_of
from contrastive.log import warn
from contrastive.optim import ExponentialMovingAverage, Muon
from contrastive.train.checkpoint import (
    Optimizers,
    SaveModel,
    TrainingState,
    check_room,
    read_cursor,
    training_state,
    write_checkpoint,
)
from contrastive.train.health import TroubleError
from contrastive.train.options import CheckpointConfig

BESIDE_TENSORS = 2**24  # bytes at most of what else is in a checkpoint: the tokenizer, chiefly


class CheckpointSaver:
    """Saves a run's state; a context manager whose methods all ranks call alike.

    In the background `save` copies the state into host memory, into the same buffers every time, and returns; a thread
    writes it, flushes it, reads it back, and deletes what need not be kept. One save at a time: the next one waits. A
    failure is raised on all ranks alike, at the next `check` or `finish`, and nothing has been deleted then.

    Args:
        model: on its device, sharded or not. save_model: see `write_checkpoint`.
    """

    def __init__(
        self,
        checkpoints: Path,
        config: CheckpointConfig,
        model: nn.Module,
        optimizers: Optimizers,
        ema: ExponentialMovingAverage | None,
        save_model: SaveModel,
    ):
        from torch.distributed.checkpoint.staging import StateDictStager  # see write_checkpoint

        self._checkpoints, self._config, self._save_model = checkpoints, config, save_model
        self._parts = model, optimizers, ema
        sharded = any(map(is_sharded, model.parameters()))
        self._writes = sharded or rank() == 0
        # Of its own: the ranks' threads meet while training goes on over the others.
        self._group = dist.new_group(backend="gloo") if sharded else None
        self._on_gpu = any(parameter.is_cuda for parameter in model.parameters())
        self._buffers = StateDictStager(pin_memory=self._on_gpu)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future | None = None
        self._failure: BaseException | None = None
        self._whole: dict[Path, dict] = {}  # files of the folders that were read back whole, with size and time

    def begin(self, done: int, steps: int) -> None:
        """Raise UserError where the checkpoints of steps `done` to `steps` cannot be written, or have no room."""
        if rank() == 0:
            try:
                self._check_room_ahead(done, steps)
            except UserError as error:
                self._failure = error
        self.finish()

    def save(self, cursor: dict, in_background: bool) -> None:
        """Save the state as it is now; return when it is copied, or not `in_background` when it is written.

        Raises:
            UserError: see `finish`; not in the background of this save, else of the one before.
        """
        self.finish()
        in_background = in_background and self._config.background
        if self._writes:
            state, copied = training_state(*self._parts, cursor), None
            if in_background:
                shared = ("weights", "average", "optimizer") if self._group is None else ("optimizer",)
                copies = {name: self._buffers.stage(state[name], non_blocking=self._on_gpu) for name in shared}
                state = {**state, **copies}
                if self._on_gpu:
                    copied = torch.cuda.Event()
                    copied.record()
            self._pending = self._thread.submit(self._write, state, copied)
        if not in_background:
            self.finish()

    @property
    def failed(self) -> int:
        """1 where a save of this rank is known to have failed, else 0: for the ranks to sum, and give to `check`."""
        if self._pending is not None and self._pending.done():
            self._pending, self._failure = None, self._failure or self._pending.exception()
        return int(self._failure is not None)

    def check(self, failures: int) -> None:
        """Raise, where `failures` ranks could not save, on all of them: what it was, or that it was another's."""
        if failures:
            raise self._failure or UserError("another rank could not save a checkpoint; its message says why")

    def finish(self) -> None:
        """Wait until nothing is being written.

        Raises:
            UserError: the disk is full, cannot be written, or does not give back what was written.
        """
        if self._pending is not None:
            wait([self._pending])
        self.check(sum(gather_objects(self.failed)))

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Leave nothing half-written: whoever goes on in this folder finds no writer in it."""
        self._thread.shutdown()
        self._buffers.close()
        if error is None:
            self.finish()
        elif self.failed and self._failure is not error:
            warn(f"besides: {reason_of(self._failure)}")

    def _write(self, state: TrainingState, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        folder = self._checkpoints / f"step-{state['cursor']['step']:08d}"
        tensors = [*state["weights"].values(), *(state["average"] or {}).values(), *state["optimizer"].values()]
        write_checkpoint(folder, state, self._save_model, self._group, _bytes(tensors) + BESIDE_TENSORS)
        if rank() == 0:
            wrong = self._wrong(folder)
            if wrong is not None:
                raise UserError(f"{folder}, just written: {wrong}; earlier checkpoints are intact, look after the disk")
            # Newer ones than this are damaged: the run was resumed from before them. They count for nothing here.
            until_now = [path for path in checkpoints_in(self._checkpoints) if path.name <= folder.name]
            for old in expendable(until_now, self._config.keep, self._config.keep_every, self._wrong):
                shutil.rmtree(old, ignore_errors=True)

    def _wrong(self, folder: Path) -> str | None:
        """As `problem`; a folder that was whole is read again only when its files have another size or time."""
        found = {path: path.lstat() for path in folder.rglob("*")}
        seen = {path: (status.st_size, status.st_mtime_ns) for path, status in found.items()}
        if self._whole.get(folder) == seen:
            return None
        wrong = problem(folder)
        if wrong is None:
            self._whole[folder] = seen
        return wrong

    def _check_room_ahead(self, done: int, steps: int) -> None:
        check_writable(self._checkpoints, "name another folder with --out")
        config, (model, optimizers, ema) = self._config, self._parts
        weights = _bytes(model.state_dict().values())
        states = [tensor for optimizer in optimizers for found in optimizer.state.values() for tensor in found.values()]
        size = weights + (_bytes(states) if states else sum(map(_expected_bytes, optimizers))) + BESIDE_TENSORS
        size += 0 if ema is None else weights
        there = sum(step_of(path) <= done for path in checkpoints_in(self._checkpoints))
        to_come = steps // config.every - done // config.every + 1
        for_ever = 0 if config.keep_every is None else steps // config.keep_every - done // config.keep_every
        # The oldest goes when the newest is there, and whole.
        number = min(to_come, config.keep + 1 - min(there, config.keep)) + for_ever
        what = f"this run with {number} more checkpoints of {decimal(size)} at a time, and its final model,"
        check_room(self._checkpoints, number * size + weights, what, "make room, or keep fewer: --checkpoint.keep")


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _expected_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What it will keep when it has done a step: Muon one tensor for each it learns, AdamW two."""
    learning = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    return (1 if isinstance(optimizer, Muon) else 2) * _bytes(learning)


def is_milestone(checkpoint: Path, keep_every: int | None) -> bool:
    """Whether a checkpoint is kept for ever. That of step 0, with nothing learned, is not."""
    step = step_of(checkpoint)
    return keep_every is not None and step > 0 and step % keep_every == 0


def expendable(
    checkpoints: list[Path], keep: int, keep_every: int | None, wrong: Callable[[Path], str | None]
) -> list[Path]:
    """Return those that may be deleted: all that are older than the `keep` newest whole ones, but for milestones.

    Args:
        checkpoints: oldest first. wrong: what is wrong with one, None where it is whole. Damaged ones do not count.
    """
    kept = 0
    for place in reversed(range(len(checkpoints))):
        kept += wrong(checkpoints[place]) is None
        if kept == keep:
            return [path for path in checkpoints[:place] if not is_milestone(path, keep_every)]
    return []


def last_good(checkpoints: Path, trouble: TroubleError, max_roll_backs: int) -> Path:
    """Return the newest whole checkpoint from before the trouble, and delete those that are newer: no resume is to find
    them.

    Raises:
        UserError: there is none, or the run went back to it too often already.
    """
    folders = checkpoints_in(checkpoints)[::-1]
    before = [folder for folder in folders if step_of(folder) < trouble.first]
    good = next((folder for folder in before if problem(folder) is None), None)
    if good is None:
        raise UserError(
            f"step {trouble.last}: {trouble.what}, and no whole checkpoint from before step {trouble.first} is left to "
            "go back to; raise checkpoint.keep"
        )
    times = read_cursor(good).get("run", {}).get("rolled_back", 0)
    if times >= max_roll_backs:
        raise UserError(
            f"step {trouble.last}: {trouble.what}, after {times} times back to {good.name} (health.max_roll_backs); "
            "lower optimizer.lr, or look at the data"
        )
    for folder in folders[: folders.index(good)]:
        shutil.rmtree(folder)
    return good
