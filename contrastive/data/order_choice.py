"""Which order a source is trained in."""

from contrastive.data.mixture import MixtureOrder
from contrastive.data.order import DrawnOrder, Order, SampleOrder
from contrastive.data.record import Source
from contrastive.data.sharded_order import WINDOW, ShardedOrder, default_lanes, pseudo_shards
from contrastive.errors import UserError

SHUFFLED_WHOLE = 4_000_000  # samples of local data up to which the shuffled list of them all is kept in memory
_PART_SEED = 0x9E3779B97F4A7C15  # odd, so that no two parts of a mixture share a seed


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
    options = {"window": window, "lanes": lanes, "replacement": replacement}
    if len(source.parts) > 1:
        return _mixed(source, global_batch_size, seed, options)
    return _plain(source, global_batch_size, seed, **options)


def _mixed(source: Source, global_batch_size: int, seed: int, options: dict) -> MixtureOrder:
    parts = []
    for number, (part, weight) in enumerate(zip(source.parts, source.weights, strict=True)):
        share = global_batch_size * weight / sum(source.weights)
        batch = min(_part_batch(share, options["lanes"]), len(part))
        try:
            parts.append(_plain(part, batch, seed + number * _PART_SEED, **options))
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


def _plain(
    source: Source, global_batch_size: int, seed: int, window: int | None, lanes: int | None, replacement: bool
) -> SampleOrder:
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
