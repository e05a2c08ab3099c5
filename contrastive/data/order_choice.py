"""Which order a source is trained in; and the one for data that is large or far away, by shards and windows."""

from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from contrastive.data.order import REMAINDER, SHARDS, WINDOWS, DrawnOrder, MixtureOrder, Order, SampleOrder, shuffled
from contrastive.data.record import Source
from contrastive.errors import UserError

SHUFFLED_WHOLE = 4_000_000  # samples of local data up to which the shuffled list of them all is kept in memory
WINDOW = 16_384
MAX_LANES = 64
PSEUDO_SHARD = 10_000  # rows, where a source has no shards of its own
_NEARBY_ATTEMPTS = 10
_PART_SEED = 0x9E3779B97F4A7C15  # odd, so that no two parts of a mixture share a seed

Place = TypeVar("Place", int, np.ndarray)


@dataclass(frozen=True, eq=False)
class ShardedOrder(SampleOrder):
    """Every sample exactly once an epoch, with few shards in use at a time.

    With N samples, batch G and L lanes: the stream of an epoch is its shards in shuffled order, row after row.
    It is cut into L lanes of T * G / L samples, T = N // G, and what is left over. Lane l fills slots
    l * G / L to (l + 1) * G / L - 1 of the T batches of the epoch, shuffled within windows; what is left over
    is shuffled and fills the epoch's last N - T * G positions.

    So a rank, whose share of a batch is a run of slots, reads the shards of its own lanes. An epoch begins
    where the last one ends, in mid-batch unless G divides N: its slots are then those of the batch turned by
    as much, and a rank may share one lane with its neighbour.

    Memory: 24 bytes a shard, and 4 bytes a sample of the two newest windows of each lane.

    Args:
        shard_sizes: samples of each shard, in the order of the source, int (n,). Sum: num_samples.
        window: samples shuffled among themselves; more than a lane has is all of the lane.
        lanes: L, a divisor of the batch. None: the largest up to MAX_LANES.

    Raises:
        UserError: as SampleOrder; lanes that do not divide the batch, a window below 1.
    """

    shard_sizes: np.ndarray
    window: int = WINDOW
    lanes: int | None = None
    _starts: np.ndarray = field(init=False, repr=False)
    _epochs: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, init=False, repr=False)
    _windows: dict[tuple[int, int, int], np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        super().__post_init__()
        sizes = np.asarray(self.shard_sizes, np.int64)
        if sizes.sum() != self.num_samples or sizes.min(initial=0) < 0:
            raise ValueError(f"the shards hold {sizes.sum()} samples, the source {self.num_samples}")
        if self.window < 1:
            raise UserError(f"data.window is {self.window}; it must be 1 or more")
        lanes = default_lanes(self.global_batch_size) if self.lanes is None else self.lanes
        if lanes < 1 or self.global_batch_size % lanes:
            raise UserError(
                f"data.lanes {lanes} does not divide the batch of {self.global_batch_size}; "
                f"use a divisor of it, such as {default_lanes(self.global_batch_size)}, or leave it out"
            )
        object.__setattr__(self, "shard_sizes", sizes)
        object.__setattr__(self, "lanes", lanes)
        object.__setattr__(self, "_starts", np.cumsum(sizes) - sizes)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epochs": {}, "_windows": {}}  # cheap to make again, dear to send to a worker

    @property
    def _share(self) -> int:
        """Slots of a batch that a lane fills."""
        return self.global_batch_size // self.lanes

    @property
    def _lane_size(self) -> int:
        """Samples of a lane."""
        return self.num_samples // self.global_batch_size * self._share

    def at(self, positions: np.ndarray) -> np.ndarray:
        shards, rows = self._locate(positions)
        return self._starts[shards] + rows

    def index_of(self, position: int) -> int:
        epoch, place = divmod(position, self.num_samples)
        lane, number, row = self._place(place)
        return self._index(epoch, self._window_start(lane, number) + int(self._window(epoch, lane, number)[row]))

    def stand_in(self, position: int, draw: float, attempt: int) -> int:
        # Near at first, so that a bad sample does not fetch another shard; anywhere when all near are bad.
        if attempt > _NEARBY_ATTEMPTS:
            return super().stand_in(position, draw, attempt)
        epoch, place = divmod(position, self.num_samples)
        lane, number, _ = self._place(place)
        return self._index(epoch, self._window_start(lane, number) + int(draw * self._window_size(lane, number)))

    def shards_at(self, positions: np.ndarray) -> np.ndarray:
        return self._locate(positions)[0]

    def kind(self) -> dict[str, Any]:
        return {"window": self.window, "lanes": self.lanes}

    def _place(self, place: Place) -> tuple[Place, Place, Place]:
        """Return (lane, window, row in the window) of a place in an epoch, or of an array of them.

        What is left over at the end of the stream is one window of a lane of its own, the one after the last.
        """
        whole, share = self._lane_size * self.lanes, self._share
        batch, slot = divmod(place, self.global_batch_size)
        lane, offset = slot // share, batch * share + slot % share
        number, row = divmod(offset, self.window)
        if isinstance(place, np.ndarray):
            rest = place >= whole
            return np.where(rest, self.lanes, lane), np.where(rest, 0, number), np.where(rest, place - whole, row)
        return (self.lanes, 0, place - whole) if place >= whole else (lane, number, row)

    def _window_start(self, lane: Place, number: Place) -> Place:
        """Return the place in the stream where a window begins."""
        return lane * self._lane_size + number * self.window

    def _window_size(self, lane: int, number: int) -> int:
        if lane == self.lanes:
            return self.num_samples - self._lane_size * self.lanes
        return min(self.window, self._lane_size - number * self.window)

    def _window(self, epoch: int, lane: int, number: int) -> np.ndarray:
        """Return a window's permutation, int32 (size,)."""
        key = (epoch, lane, number)
        if key not in self._windows:
            stream, attempt = (REMAINDER, 0) if lane == self.lanes else (WINDOWS, lane << 40 | number)
            found = shuffled(self._window_size(lane, number), self.seed, epoch, stream, attempt)
            self._windows[key] = found.astype(np.int32)
            # The lanes advance together: the window made first is the one done with first.
            while len(self._windows) > self.lanes * (self._share // self.window + 2) + 1:  # what one batch may touch
                del self._windows[next(iter(self._windows))]
        return self._windows[key]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards in their order in the stream, and where in it each of them ends."""
        if epoch not in self._epochs:
            order = shuffled(len(self.shard_sizes), self.seed, epoch, SHARDS)
            self._epochs[epoch] = order, np.cumsum(self.shard_sizes[order])
            for old in set(self._epochs) - {epoch, epoch - 1}:
                del self._epochs[old]
        return self._epochs[epoch]

    def _index(self, epoch: int, place: int) -> int:
        """Return the source index of a place in the stream."""
        order, ends = self._epoch(epoch)
        rank = int(np.searchsorted(ends, place, side="right"))
        shard = int(order[rank])
        return int(self._starts[shard]) + place - int(ends[rank]) + int(self.shard_sizes[shard])

    def _locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (shard, row in it), each int64 (n,), of the samples at `positions`."""
        epochs, places = np.divmod(positions, self.num_samples)
        lanes, numbers, rows = self._place(places)
        windows = (epochs * (self.lanes + 1) + lanes) * (self._lane_size // self.window + 1) + numbers
        by_window = np.argsort(windows, kind="stable")
        bounds = np.flatnonzero(np.diff(windows[by_window])) + 1
        for members in np.split(by_window, bounds) if len(positions) else ():
            one = members[0]
            permutation = self._window(int(epochs[one]), int(lanes[one]), int(numbers[one]))
            rows[members] = permutation[rows[members]]
        places = self._window_start(lanes, numbers) + rows
        shards = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            order, ends = self._epoch(int(epoch))
            ranks = np.searchsorted(ends, places[now], side="right")
            shards[now] = order[ranks]
            rows[now] = places[now] - ends[ranks] + self.shard_sizes[order[ranks]]
        return shards, rows


def default_lanes(global_batch_size: int) -> int:
    """Return the largest divisor of the batch up to MAX_LANES."""
    return next(lanes for lanes in range(min(MAX_LANES, global_batch_size), 0, -1) if global_batch_size % lanes == 0)


def pseudo_shards(num_samples: int) -> np.ndarray:
    """Return the sizes, int64 (n,), that cut a source without shards into runs of PSEUDO_SHARD rows."""
    return np.diff(np.arange(0, num_samples + PSEUDO_SHARD, PSEUDO_SHARD).clip(max=num_samples))


def order_for(
    source: Source,
    global_batch_size: int,
    seed: int,
    *,
    window: int | None = None,
    lanes: int | None = None,
    replacement: bool = False,
) -> SampleOrder:
    """Return the order that fits the source: the same on every rank and at every restart.

    Args:
        window: samples shuffled among themselves; as many as the data has shuffle all of it. None: all of local
            data up to SHUFFLED_WHOLE samples, else WINDOW.
        lanes: places in the data that a batch is read from; see ShardedOrder.
        replacement: draw each sample from all of the data.

    Raises:
        UserError: the batch is larger than the data, lanes that do not divide it, options that exclude each other.
    """
    if replacement and (window is not None or lanes is not None):
        raise UserError("data.window and data.lanes mean nothing with data.replacement; leave them out")
    if len(source.parts) > 1:
        return _mixed(source, global_batch_size, seed, window=window, lanes=lanes, replacement=replacement)
    size = len(source)
    if replacement:
        if source.remote:
            raise UserError(
                f"data.replacement would fetch a shard of '{source.name}' for nearly every sample; leave it out, "
                "or copy the shards here first"
            )
        return DrawnOrder(size, global_batch_size, seed)
    whole = size <= SHUFFLED_WHOLE and not source.remote if window is None else window >= size
    if whole and lanes in (None, 1):
        return Order(size, global_batch_size, seed)
    sizes = pseudo_shards(size) if source.shard_sizes is None else source.shard_sizes
    if window is None:
        window = size if whole else WINDOW
    return ShardedOrder(size, global_batch_size, seed, sizes, window, lanes)


def _mixed(source: Source, global_batch_size: int, seed: int, **options: Any) -> MixtureOrder:
    parts = []
    for number, (part, weight) in enumerate(zip(source.parts, source.weights, strict=True)):
        share = global_batch_size * weight / sum(source.weights)
        batch = min(_part_batch(share, options["lanes"]), len(part))
        try:
            parts.append(order_for(part, batch, seed + number * _PART_SEED, **options))
        except UserError as error:
            raise UserError(f"{part.name}: {error}") from None
    return MixtureOrder(len(source), global_batch_size, seed, tuple(parts), source.weights)


def _part_batch(share: float, lanes: int | None) -> int:
    """Return the batch size of a part's own order.

    With its share of the batch, the part's lanes stay where the slots of the ranks are. Where the weights do not
    divide the batch they drift past each other, and a size close by may have many more lanes: 2,728 has 62, the
    prime 2,731 one, and its batches would be of one window.
    """
    if lanes:
        return lanes * max(1, round(share / lanes))
    nearest = max(1, round(share))
    close = range(nearest - nearest // 256, nearest + nearest // 256 + 1)
    return max(close, key=lambda size: (default_lanes(size), -abs(size - nearest)))
