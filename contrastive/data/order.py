"""Which sample stands where in the training stream: a pure function of (seed, epoch, position)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from contrastive.errors import UserError

# Counter values that keep the random streams of one (seed, number) pair apart.
PERMUTATION, DRAWS = 0, 1


def philox(seed: int, number: int, stream: int, attempt: int = 0) -> np.random.Philox:
    """Return a counter-based bit generator that depends on its four arguments alone.

    Philox (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3") needs no warm-up, so the
    draws of position 10^9 cost what the draws of position 0 cost.
    """
    # The two high words of the counter carry the names; draws count up in the low words and never reach them.
    counter = (stream << 128) | (attempt << 192)
    return np.random.Philox(key=(seed % 2**64) | (number << 64), counter=counter)


@dataclass(frozen=True)
class Order:
    """The order of training samples, with every sample exactly once an epoch.

    A position is `step * global_batch_size + slot`; its epoch is `position // num_samples`, so a batch may
    straddle two epochs and no sample is ever dropped. Nothing here is state: any step can be asked for.

    Raises:
        UserError: the data is empty, or the batch is larger than the data.
    """

    num_samples: int
    global_batch_size: int
    seed: int
    _permutations: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

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

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_permutations": {}}  # cheap to make again, dear to send to a worker

    def permutation(self, epoch: int) -> np.ndarray:
        """Return the source indices of one epoch in visiting order, int64 (num_samples,)."""
        if epoch not in self._permutations:
            # Sorting raw words depends on the Philox bit stream only, which numpy keeps stable for ever;
            # its `Generator.permutation` may change between releases.
            words = philox(self.seed, epoch, PERMUTATION).random_raw(self.num_samples)
            self._permutations[epoch] = np.argsort(words, kind="stable").astype(np.int64, copy=False)
            for old in set(self._permutations) - {epoch, epoch - 1}:
                del self._permutations[old]
        return self._permutations[epoch]

    def index_of(self, position: int) -> int:
        """Return the source index of the sample at `position`."""
        epoch, place = divmod(position, self.num_samples)
        return int(self.permutation(epoch)[place])

    def indices(self, step: int) -> np.ndarray:
        """Return the source indices of the global batch of `step`, int64 (global_batch_size,)."""
        epoch, place = divmod(step * self.global_batch_size, self.num_samples)
        head = self.permutation(epoch)[place : place + self.global_batch_size]
        missing = self.global_batch_size - len(head)
        return np.concatenate([head, self.permutation(epoch + 1)[:missing]]) if missing else head.copy()

    def epoch_of(self, step: int) -> int:
        """Return the epoch in which the batch of `step` begins."""
        return step * self.global_batch_size // self.num_samples

    def cursor(self, step: int, fingerprint: str = "") -> dict[str, Any]:
        """Return all that a checkpoint has to keep for the data to go on from `step`.

        `fingerprint` is the source's; it changes when the data changes.
        """
        return {
            "step": step,
            "epoch": self.epoch_of(step),
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "num_samples": self.num_samples,
            "fingerprint": fingerprint,
        }


def check_cursor(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to resume when the data order of a checkpoint is not the one of this run.

    Every field but `step` and `epoch`, which are where the run stands, has to agree.

    Raises:
        UserError: names the first field that differs, with both values.
    """
    for name in [*current, *(name for name in saved if name not in current)]:
        if name in ("step", "epoch"):
            continue
        before, now = saved.get(name, "absent"), current.get(name, "absent")
        if before != now:
            raise UserError(
                f"cannot resume: {name} is {now} but the checkpoint was made with {name} {before}; "
                f"use the old value or start in a new run folder"
            )
