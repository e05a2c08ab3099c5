"""Which order a source is trained in; and the order of several sources mixed by weight, exactly, block by block."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from contrastive.data.order import MIXTURE, DrawnOrder, Order, SampleOrder, philox
from contrastive.data.record import Source
from contrastive.data.sharded_order import WINDOW, ShardedOrder, default_lanes, first_seen, pseudo_shards
from contrastive.errors import UserError

SHUFFLED_WHOLE = 4_000_000  # samples of local data up to which the shuffled list of them all is kept in memory
_CHUNK = 16_384  # words of a mixture drawn at once, whole blocks of them
_PART_SEED = 0x9E3779B97F4A7C15  # odd, so that no two parts of a mixture share a seed


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

    def shards_ahead(self, step: int, num_steps: int, rank: int = 0, world_size: int = 1) -> list[tuple[int, int]]:
        """As ShardedOrder's: pairs of a part's number and that of its shard, of the parts that are read by shards."""
        owners, draws = self._owners(self.share(step, num_steps, rank, world_size))
        touched = np.full((len(draws), 2), -1)
        for number, part in enumerate(self.parts):
            own = owners == number
            if isinstance(part, ShardedOrder) and own.any():
                touched[own] = np.stack([owners[own], part.shards_at(draws[own])], axis=1)
        return [tuple(pair) for pair in first_seen(touched).tolist() if pair[0] >= 0]

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
