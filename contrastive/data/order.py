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
_CHUNK = 16_384  # words of a mixture drawn at once, whole blocks of them


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
        found = self.shards_at(self.share(step, num_steps, rank, world_size))
        if found is None:
            return ()
        distinct, first = np.unique(found, axis=0, return_index=True)
        return distinct[np.argsort(first)]

    def shards_at(self, positions: np.ndarray) -> np.ndarray | None:
        """Return the source's numbers of the shards that hold the samples at `positions`, both int64 (n,).

        None where the order does not go by shards.
        """
        return None

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


@dataclass(frozen=True, eq=False)
class MixtureOrder(SampleOrder):
    """Positions shared out among the orders of several parts, in proportion to whole weights.

    Each block of sum(weights) positions has exactly weights[d] of part d, in shuffled places. The k-th of them
    in the run is position k of the part's own order, so a part has epochs of its own and every sample of it
    comes exactly once in each. Indices are those of the parts laid end to end.

    An epoch of the mixture is `num_samples` positions, as many as the parts have samples together: a part of
    a large weight comes more than once in it.

    Args:
        parts: their orders; the batch sizes are those of their share.
        weights: whole numbers above 0, one a part.
    """

    parts: Sequence[SampleOrder]
    weights: tuple[int, ...]
    _starts: np.ndarray = field(init=False, repr=False)
    _chunks: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        super().__post_init__()
        sizes = [part.num_samples for part in self.parts]
        if sum(sizes) != self.num_samples or len(sizes) != len(self.weights) or min(self.weights) < 1:
            raise ValueError(f"{len(sizes)} parts of {sum(sizes)} samples do not make this mixture")
        object.__setattr__(self, "_starts", np.cumsum(sizes) - sizes)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_chunks": {}}  # cheap to make again, dear to send to a worker

    def at(self, positions: np.ndarray) -> np.ndarray:
        owners, draws = self._owners(positions)
        found = np.empty(len(positions), np.int64)
        for number, part in enumerate(self.parts):
            own = owners == number
            if own.any():
                found[own] = self._starts[number] + part.at(draws[own])
        return found

    def index_of(self, position: int) -> int:
        number, draw = self._owner(position)
        return int(self._starts[number]) + self.parts[number].index_of(draw)

    def stand_in(self, position: int, draw: float, attempt: int) -> int:
        # From the same part: bad samples leave the proportions as they are.
        number, own = self._owner(position)
        return int(self._starts[number]) + self.parts[number].stand_in(own, draw, attempt)

    def shards_at(self, positions: np.ndarray) -> np.ndarray:
        """As SampleOrder's, (n, 2): the number of the part and that of its shard; -1 of parts that go by none."""
        owners, draws = self._owners(positions)
        found = np.full((len(positions), 2), -1)
        for number, part in enumerate(self.parts):
            own = owners == number
            shards = part.shards_at(draws[own])
            if shards is not None:
                found[own] = np.stack([owners[own], shards], axis=1)
        return found

    def shards_ahead(self, step: int, num_steps: int, rank: int = 0, world_size: int = 1) -> list[tuple[int, int]]:
        """As SampleOrder's: pairs of a part's number and that of its shard, of the parts that are read by shards."""
        pairs = super().shards_ahead(step, num_steps, rank, world_size).tolist()
        return [tuple(pair) for pair in pairs if pair[0] >= 0]

    def kind(self) -> dict[str, Any]:
        parts = [part.kind() for part in self.parts]
        shared = {name: [part.get(name) for part in parts] for name in ("window", "lanes")}
        return {"weights": list(self.weights), "replacement": any(part.get("replacement") for part in parts), **shared}

    def _owner(self, position: int) -> tuple[int, int]:
        """Return the number of the part at `position`, and the position in the part's own order."""
        block, place = divmod(position, sum(self.weights))
        chunk, row = divmod(block, self._blocks_in_chunk)
        owners, earlier = self._chunk(chunk)
        number = int(owners[row, place])
        return number, block * self.weights[number] + int(earlier[row, place])

    def _owners(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `_owner`, int64 (n,) each."""
        blocks, places = np.divmod(positions, sum(self.weights))
        chunks, rows = np.divmod(blocks, self._blocks_in_chunk)
        owners, earlier = np.empty((2, len(positions)), np.int64)
        for chunk in np.unique(chunks):
            now = chunks == chunk
            of, before = self._chunk(int(chunk))
            owners[now], earlier[now] = of[rows[now], places[now]], before[rows[now], places[now]]
        return owners, blocks * np.asarray(self.weights)[owners] + earlier

    @property
    def _blocks_in_chunk(self) -> int:
        return max(1, _CHUNK // sum(self.weights))

    def _chunk(self, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """Return, int64 (blocks, places), whose each place is and how many of the same part are before it."""
        if chunk not in self._chunks:
            size, blocks = sum(self.weights), self._blocks_in_chunk
            words = philox(self.seed, chunk, MIXTURE).random_raw(blocks * size).reshape(blocks, size)
            tickets = np.repeat(np.arange(len(self.weights)), self.weights)
            owners = tickets[np.argsort(words, axis=1, kind="stable")]
            # Sorted by owner, the places of part d follow each other from where its tickets begin.
            counts = np.arange(size) - (np.cumsum(self.weights) - self.weights)[tickets]
            earlier = np.empty_like(owners)
            np.put_along_axis(earlier, np.argsort(owners, axis=1, kind="stable"), counts[None], axis=1)
            self._chunks[chunk] = owners, earlier
            for old in set(self._chunks) - {chunk, chunk - 1}:
                del self._chunks[old]
        return self._chunks[chunk]


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
