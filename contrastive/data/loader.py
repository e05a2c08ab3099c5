"""Batches for training and evaluation: plain torch DataLoaders, told exactly which samples to fetch."""

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from contrastive.data.preprocess import Preprocess
from contrastive.data.record import BadSample, Record, Source
from contrastive.data.samples import SampleDataset
from contrastive.distributed import end_with_parent
from contrastive.errors import UserError

if TYPE_CHECKING:
    from contrastive.data.stored_views import Views

_SAMPLES_AHEAD = 2**18  # samples of a rank whose shards are asked for ahead of time
_KILLED = "was killed, perhaps for want of memory; use fewer (--data.num_workers)"


# The death of a worker becomes an error where a batch is waited for. torch raises it from a signal handler, wherever
# the program happens to be: most often in the middle of a step, out of reach of whoever could say what happened.
_torchs_handler: Callable[[int, FrameType | None], None] | None = None
_waiting = False


@contextlib.contextmanager
def waiting_for_batch() -> Iterator[None]:
    """Let torch raise for a worker that dies now, or has died since the last time, and at no other time.

    Use it around each `next` of a DataLoader's iterator. Outside the main thread it changes nothing.
    """
    global _waiting
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _hold_back()
    _waiting = True
    try:
        if _torchs_handler is not None:
            _torchs_handler(signal.SIGCHLD, None)
        yield
    finally:
        _waiting = False


def _hold_back() -> None:
    """Put our handler before torch's, which torch sets once in a process, with its first workers."""
    global _torchs_handler
    theirs = signal.getsignal(signal.SIGCHLD)
    if _torchs_handler is None and getattr(theirs, "__module__", "").startswith("torch.utils.data"):
        _torchs_handler = theirs
        signal.signal(signal.SIGCHLD, _on_child)


def _on_child(number: int, frame: FrameType | None) -> None:
    if _waiting:
        _torchs_handler(number, frame)


class _Loader(DataLoader):
    """A DataLoader whose workers' UserErrors arrive as the one line they were, and their deaths as one line too."""

    def __iter__(self):
        try:
            batches = super().__iter__()  # starts the workers
            while True:
                with waiting_for_batch():
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch
        except UserError as error:
            # torch sends a worker's error as its whole traceback, which ends with 'module.UserError: text', a line.
            message = str(error).rpartition("UserError: ")[2].removesuffix(r"\n")
            # Its frames hold the workers; let go of them now, not whenever garbage is next collected.
            traceback.clear_frames(error.__traceback__)
            raise UserError(message) from error
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            if "timed out" in str(error):
                what = f"hangs: no batch within {self.timeout:g} seconds (--data.timeout); look at the data's storage"
            else:
                what = _KILLED
            raise UserError(f"a loader worker {what}") from error
        except (ConnectionError, EOFError) as error:
            # So ends the way of a batch whose worker dies while it is sent. "Caught ..." is an error from within one.
            if self.num_workers == 0 or str(error).startswith("Caught"):
                raise
            raise UserError(f"a loader worker {_KILLED}") from error
        finally:
            batches = None  # an error's traceback would keep it, and so the workers


class _Steps:
    """For each step, the positions of this rank's slice of the global batch; fetches shards that lie far away."""

    def __init__(self, dataset: SampleDataset, rank: int, world_size: int, steps: range):
        self.source, self.order, self.rank, self.world_size = dataset.source, dataset.order, rank, world_size
        self.steps = steps

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        ahead = max(1, _SAMPLES_AHEAD * self.world_size // self.order.global_batch_size)
        for step in self.steps:
            # Asked for long before it is used up; what an earlier call asked for and was not begun, this one repeats.
            if self.source.remote and (step - self.steps.start) % max(1, ahead // 8) == 0:
                num_steps = min(ahead, self.steps.stop - step)
                self.source.prefetch(self.order.shards_ahead(step, num_steps, self.rank, self.world_size))
            yield self.order.share(step, 1, self.rank, self.world_size).tolist()


def train_loader(
    dataset: SampleDataset,
    *,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    num_steps: int,
    num_workers: int = 0,
    timeout: float = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """Return a loader of one local batch for each step from `start_step` on.

    A batch is image uint8 (b, 3, S, S), or Patches, tokens int64 (b, L), caption_id, index and replaced int64 (b,),
    and bad, the list of (reason, key) met while making it; b = the order's batch / world_size. The batches of all ranks
    in rank order are the global batch, whatever the number of ranks and workers. No global random state is
    read or changed.

    Args:
        timeout: seconds to wait for a batch from the workers before an error; 0 waits for ever.

    Raises:
        UserError: the batch does not divide among the ranks.
    """
    global_batch_size = dataset.order.global_batch_size
    if global_batch_size % world_size:
        raise UserError(
            f"global batch size {global_batch_size} does not divide among {world_size} processes; "
            f"use a multiple of {world_size}"
        )
    steps = _Steps(dataset, rank, world_size, range(start_step, start_step + num_steps))
    return _Loader(
        dataset,
        batch_sampler=steps,
        collate_fn=_collate,
        pin_memory=pin_memory,
        **_worker_options(num_workers, timeout),
    )


def eval_loader(
    source: Source,
    preprocess: Preprocess,
    indices: Sequence[int],
    batch_size: int,
    num_workers: int = 0,
    views: "Views | None" = None,
    more: Callable[[Record, Preprocess], dict[str, Any]] | None = None,
) -> DataLoader:
    """Return a loader over `indices` of the source, in their order.

    A batch is image uint8 (b, 3, S, S), or Patches of native images, index int64 (b,), key, the list of their keys,
    and bad, the list of (reason, key) of images that could not be read. Those are left out, so b may be below
    `batch_size`, or 0.

    views: to load these variations of each image, (b, K, 3, S, S), instead of all of it.
    more: what it makes of each record, for workers to pickle, is in the batch too, but for one of no images.
    """
    size = preprocess.config.size
    image = torch.empty(0, views.count, 3, *size, dtype=torch.uint8) if views else preprocess.collate([])
    empty = {"image": image, "index": torch.empty(0, dtype=torch.int64), "key": []}
    return _Loader(
        _Images(source, preprocess, np.asarray(indices, np.int64), views, more),
        batch_size=batch_size,
        collate_fn=functools.partial(_collate, empty=empty),
        **_worker_options(num_workers, timeout=0),
    )


class _Images(Dataset):
    """Preprocessed images, or what was wrong with them."""

    def __init__(self, source: Source, preprocess: Preprocess, indices: np.ndarray, views: "Views | None", more):
        self.source, self.preprocess, self.indices, self.views, self.more = source, preprocess, indices, views, more

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> dict[str, Any]:
        index, key = int(self.indices[place]), ""
        try:
            record = self.source[index]
            key = record.key
            if self.views:
                image = self.views.of(record.image, index, self.preprocess.config.size[0])
            else:
                image = self.preprocess.pixels(record.image)
            more = self.more(record, self.preprocess) if self.more else {}
            return {"image": image, "index": index, "key": key, "bad": [], **more}
        except BadSample as fault:
            return {"bad": [(fault.reason, fault.key or key)]}


def _collate(samples: list[dict[str, Any]], empty: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a batch of the samples that hold more than what was "bad"; `empty` is one of no samples at all."""
    bad = [fault for sample in samples for fault in sample.pop("bad")]
    good = [sample for sample in samples if sample]
    return {**(default_collate(good) if good else empty), "bad": bad}


def _worker_options(num_workers: int, timeout: float) -> dict[str, Any]:
    # torch seeds workers from a generator; with one of its own the global one is left alone.
    options = {"num_workers": num_workers, "generator": torch.Generator()}
    if num_workers:
        fork = "fork" if sys.platform == "linux" else None
        options |= {"timeout": timeout, "multiprocessing_context": fork, "worker_init_fn": _start_worker}
    return options


def _start_worker(worker: int) -> None:
    """Keep a worker to one core, and make it live exactly as long as the process it loads for."""
    torch.set_num_threads(1)
    if sys.platform != "linux":
        return
    # torch's own check for a dead parent may take five seconds, and never ends a worker that is stuck.
    # Linux counts the thread that started us as the parent: it has to outlive the iteration.
    end_with_parent(signal.SIGKILL)
    if os.getppid() != multiprocessing.parent_process().pid:  # it died before the line above
        os._exit(1)
    # Ctrl-C, and what a launcher or scancel sends to a whole group or job, are for the trainer: it saves, then ends us.
    os.setpgrp()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_asked, args=(os.getppid(),), daemon=True).start()


def _end_when_asked(trainer: int) -> None:
    """End this process on the SIGTERM of one process, also where it hangs."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
