"""Which sample stands where in the training stream: a pure function of (seed, epoch, position)."""

import bisect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from contrastive.errors import UserError

# Counter values that keep the random streams of one (seed, number) pair apart.
PERMUTATION, DRAWS, SHARDS, WINDOWS, REMAINDER, REPLACEMENT, MIXTURE, VIEWS, PATCHES = range(9)


def philox(seed: int, number: int, stream: int, attempt: int = 0) -> np.random.Philox:
    """Return a counter-based bit generator that depends on its four arguments alone.

    Philox (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3") needs no warm-up, so the
    draws of position 10^9 cost what the draws of position 0 cost.
    """
    # The two high words of the counter carry the names; draws count up in the low words and never reach them.
    counter = (stream << 128) | (attempt << 192)
    return np.random.Philox(key=(seed % 2**64) | (number << 64), counter=counter)


def shuffled(size: int, seed: int, number: int, stream: int, attempt: int = 0) -> np.ndarray:
    """Return a permutation of 0..size-1, int64 (size,), that depends on the arguments alone."""
    # Sorting raw words depends on the Philox bit stream only, which numpy keeps stable for ever;
    # its `Generator.permutation` may change between releases.
    words = philox(seed, number, stream, attempt).random_raw(size)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


@dataclass(frozen=True, eq=False)
class SampleOrder(ABC):
    """Which sample of a source stands at each position, as a pure function of (seed, position).

    A position is `batch * global_batch_size + slot`; its epoch is `position // num_samples`, so a batch may
    straddle two epochs and no sample is ever dropped. The batches come in turn, one a step, but for those that a run
    was told to skip. Nothing here is state: any step can be asked for.

    Raises:
        UserError: the data is empty, or the batch is larger than the data.
    """

    num_samples: int
    global_batch_size: int
    seed: int
    skipped: tuple[int, ...] = field(default=(), kw_only=True)
    """Numbers of the batches that no step takes, rising."""

    def __post_init__(self):
        if self.num_samples < 1:
            raise UserError("the training data holds no samples; check the data spec")
        if self.global_batch_size < 1:
            raise UserError(f"global batch size {self.global_batch_size} is too small; set it to 1 or more")
        if self.global_batch_size > self.num_samples:
            raise UserError(
                f"global batch size {self.global_batch_size} is larger than the training data "
                f"({self.num_samples} samples); lower it to {self.num_samples} or less, or add data"
            )

    @abstractmethod
    def at(self, positions: np.ndarray) -> np.ndarray:
        """Return the source indices of the samples at `positions`, both int64 (n,)."""

    def index_of(self, position: int) -> int:
        """Return the source index of the sample at `position`."""
        return int(self.at(np.array([position]))[0])

    def stand_in(self, position: int, draw: float, attempt: int) -> int:
        """Return the source index of what takes the place of a bad sample.

        Args:
            draw: uniform in 0..1; the same draw gives the same stand-in.
            attempt: how many were tried before, the bad sample included.
        """
        return int(draw * self.num_samples)

    def batches(self, step: int, num_steps: int) -> np.ndarray:
        """Return the numbers of the batches, int64 (n,), of `num_steps` steps from `step` on."""
        numbers = np.arange(step, step + num_steps)
        for skipped in self.skipped:
            numbers += numbers >= skipped
        return numbers

    def step_of(self, position: int) -> int:
        """Return the step that takes the sample at `position`, or would if its batch were not skipped."""
        batch = position // self.global_batch_size
        return batch - bisect.bisect_left(self.skipped, batch)

    def share(self, step: int, num_steps: int, rank: int, world_size: int) -> np.ndarray:
        """Return the positions, int64 (n,), of a rank's slice of the batches of `num_steps` steps from `step` on."""
        batch = self.global_batch_size
        slots = np.arange(rank * batch // world_size, (rank + 1) * batch // world_size)
        return (self.batches(step, num_steps)[:, None] * batch + slots).ravel()

    def shards_ahead(self, step: int, num_steps: int, rank: int = 0, world_size: int = 1) -> Sequence[Any]:
        """Return the source's numbers of the shards that a rank reads in `num_steps` steps from `step` on.

        Each comes once, the first needed first; none where the order does not go by shards.
        """
        return ()

    def cursor(self, step: int, fingerprint: str = "") -> dict[str, Any]:
        """Return all that a checkpoint has to keep for the data to go on from `step`.

        `fingerprint` is the source's; it changes when the data changes.
        """
        return {
            "step": step,
            # In which the batch of `step` begins.
            "epoch": int(self.batches(step, 1)[0]) * self.global_batch_size // self.num_samples,
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "num_samples": self.num_samples,
            "fingerprint": fingerprint,
            **({"skipped": list(self.skipped)} if self.skipped else {}),
            **self.kind(),
        }

    @abstractmethod
    def kind(self) -> dict[str, Any]:
        """Return the cursor's fields that tell this order from one of another kind, plain enough for JSON."""


@dataclass(frozen=True, eq=False)
class Order(SampleOrder):
    """All of the data shuffled anew every epoch: every sample exactly once in it, anywhere.

    It keeps 16 bytes a sample and may read any file at any time; for more data see ShardedOrder.
    """

    _permutations: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_permutations": {}}  # cheap to make again, dear to send to a worker

    def permutation(self, epoch: int) -> np.ndarray:
        """Return the source indices of one epoch in visiting order, int64 (num_samples,)."""
        if epoch not in self._permutations:
            self._permutations[epoch] = shuffled(self.num_samples, self.seed, epoch, PERMUTATION)
            for old in set(self._permutations) - {epoch, epoch - 1}:
                del self._permutations[old]
        return self._permutations[epoch]

    def at(self, positions: np.ndarray) -> np.ndarray:
        epochs, places = np.divmod(positions, self.num_samples)
        found = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            found[now] = self.permutation(int(epoch))[places[now]]
        return found

    def index_of(self, position: int) -> int:
        epoch, place = divmod(position, self.num_samples)
        return int(self.permutation(epoch)[place])

    def kind(self) -> dict[str, Any]:
        return {"window": self.num_samples, "lanes": 1}


@dataclass(frozen=True, eq=False)
class DrawnOrder(SampleOrder):
    """Sampling with replacement: each position draws from all of the data, whatever was drawn before.

    `num_samples` positions are called an epoch, though a sample may come several times in one, or never.
    """

    _BLOCK = 1024  # positions that share a generator

    def at(self, positions: np.ndarray) -> np.ndarray:
        blocks, places = np.divmod(positions, self._BLOCK)
        found = np.empty(len(positions), np.int64)
        for block in np.unique(blocks):
            now = blocks == block
            words = philox(self.seed, int(block), REPLACEMENT).random_raw(self._BLOCK)[places[now]]
            # The last bits of 64 are as even as the first: the remainder is off by less than 1 in 10^9.
            found[now] = words % self.num_samples
        return found

    def kind(self) -> dict[str, Any]:
        return {"replacement": True}


def check_cursor(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to resume when the data order of a checkpoint is not the one of this run.

    Every field but `step` and `epoch`, which are where the run stands, has to agree.

    Raises:
        UserError: names the first field that differs, with both values.
    """
    saved, current = _complete(saved), _complete(current)
    for name in [*current, *(name for name in saved if name not in current)]:
        if name in ("step", "epoch"):
            continue
        before, now = saved.get(name, "absent"), current.get(name, "absent")
        if before != now:
            raise UserError(
                f"cannot resume: {name} is {now} but the checkpoint was made with {name} {before}; "
                f"use the old value or start in a new run folder"
            )


def _complete(cursor: Mapping[str, Any]) -> dict[str, Any]:
    """Add what a cursor leaves unsaid, as older ones do: each sample once an epoch, anywhere in it."""
    whole = {"skipped": [], "replacement": False, "weights": "none", "window": cursor.get("num_samples"), "lanes": 1}
    return {**{name: value for name, value in cursor.items() if name not in whole}, **whole, **cursor}
