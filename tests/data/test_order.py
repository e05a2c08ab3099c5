import json
import pickle
import time
from dataclasses import replace
from functools import partial
from itertools import chain, permutations

import numpy as np
import pytest
from batches import batch_indices
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.data import order_choice
from contrastive.data.order import DrawnOrder, Order, check_cursor, shuffled
from contrastive.data.order_choice import ShardedOrder, default_lanes, order_for, pseudo_shards
from contrastive.data.record import Source
from contrastive.errors import UserError


def stream(order, steps):
    return np.concatenate([batch_indices(order, step) for step in range(steps)])


def sharded(sizes, batch, seed=0, window=16, lanes=None):
    return ShardedOrder(int(np.sum(sizes)), batch, seed, sizes, window, lanes)


KINDS = {
    "whole": lambda seed=5: Order(1000, 100, seed),
    "sharded": lambda seed=5: sharded([100] * 10, 100, seed, 30, 10),
    "drawn": lambda seed=5: DrawnOrder(1000, 100, seed),
}


def test_every_sample_once_an_epoch_and_batches_straddle():
    order = Order(num_samples=10, global_batch_size=4, seed=3)
    visits = stream(order, 10)  # 40 positions are 4 epochs
    for epoch in visits.reshape(4, 10):
        assert sorted(epoch) == list(range(10))
    assert visits.dtype == np.int64
    assert not np.array_equal(visits[:10], visits[10:20]), "epochs repeat each other"
    assert not np.array_equal(visits[:10], np.arange(10)), "not shuffled"


def test_index_of_agrees_with_indices_in_any_order_of_asking():
    order = Order(num_samples=7, global_batch_size=5, seed=0)
    visits = stream(order, 20)
    for position in (99, 0, 34, 35, 6, 7, 98):
        assert order.index_of(position) == visits[position]


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_pure_function_of_the_seed(make):
    first, again, other = make(), make(), make(seed=6)
    assert np.array_equal(stream(first, 25), stream(again, 25))
    assert not np.array_equal(stream(first, 25), stream(other, 25))
    assert np.array_equal(batch_indices(pickle.loads(pickle.dumps(first)), 17), batch_indices(first, 17))


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (Order(8, 8, seed=42), [7, 1, 6, 4, 3, 5, 0, 2]),
        (
            sharded([3, 1, 4, 5], 4, seed=42, window=2, lanes=2),
            [1, 0, 10, 11, 3, 2, 12, 4, 8, 9, 6, 5, 7, 8, 3, 5, 4, 9, 10, 7, 6, 11, 12, 0, 1, 2],
        ),
        (DrawnOrder(8, 8, seed=42), [2, 3, 0, 1, 2, 0, 6, 3]),
    ],
    ids=KINDS,
)
def test_known_order(order, expected):
    """A change here breaks the resuming of every older run."""
    assert order.at(np.arange(len(expected))).tolist() == expected


def test_seeking_far_costs_what_the_start_costs():
    def seconds(step):
        order = Order(100_000, 256, seed=1)
        begun = time.perf_counter()
        batch_indices(order, step)
        return time.perf_counter() - begun

    near, far = (min(seconds(step) for _ in range(3)) for step in (10, 1_000_000))
    assert far < 2 * near + 0.01


def test_two_epochs_are_kept_at_most():
    order = Order(100, 50, seed=1)
    stream(order, 20)
    assert set(order._permutations) == {8, 9}


@st.composite
def sharded_orders(draw):
    """Any sizes of shards, some of one sample or none, any batch with one of its divisors, any window."""
    sizes = draw(st.lists(st.one_of(st.just(1), st.integers(0, 40)), min_size=1, max_size=12).filter(any))
    batch = draw(st.integers(1, sum(sizes)))
    lanes = draw(st.sampled_from([None, *(n for n in range(1, batch + 1) if batch % n == 0)]))
    return sharded(sizes, batch, draw(st.integers(0, 2**64 - 1)), draw(st.integers(1, 50)), lanes)


@settings(max_examples=200, deadline=None)
@given(sharded_orders(), st.integers(0, 10**6))
def test_sharded_every_sample_once_in_every_epoch(order, epoch):
    first = epoch * order.num_samples
    visits = order.at(np.arange(first, first + order.num_samples))
    assert visits.dtype == np.int64
    assert sorted(visits) == list(range(order.num_samples))


@settings(max_examples=100, deadline=None)
@given(sharded_orders(), st.integers(0, 10**4), st.randoms())
def test_sharded_index_of_agrees_with_indices(order, step, rng):
    batch = order.global_batch_size
    visits = np.concatenate([batch_indices(order, step), batch_indices(order, step + 1)])
    places = list(range(2 * batch))
    rng.shuffle(places)
    assert [order.index_of(step * batch + place) for place in places] == visits[places].tolist()


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_elastic_the_shares_of_the_ranks_are_the_global_batch(make, world_size):
    share = 100 // world_size
    for step in (0, 9, 10, 123):  # the epoch ends at step 10
        positions = [range(step * 100 + rank * share, step * 100 + (rank + 1) * share) for rank in range(world_size)]
        of_ranks = [make().index_of(position) for own in positions for position in own]
        assert of_ranks == batch_indices(make(), step).tolist()


def test_sharded_mixes_within_windows_and_lanes_only():
    """With one lane, the n-th window of the run holds the n-th window of the stream, shuffled."""
    order = sharded([50, 30, 20], 10, seed=4, window=25, lanes=1)
    epoch = order.at(np.arange(100))
    shards = (range(0, 50), range(50, 80), range(80, 100))
    sequences = [list(chain(*ordered)) for ordered in permutations(shards)]
    windows = [[set(sequence[i : i + 25]) for i in range(0, 100, 25)] for sequence in sequences]
    assert [set(epoch[i : i + 25].tolist()) for i in range(0, 100, 25)] in windows
    assert not any(np.array_equal(epoch, sequence) for sequence in sequences), "not shuffled in the windows"
    others = [order.at(np.arange(100) + 100 * number) for number in range(1, 9)]
    assert len({tuple(other // 50) for other in [epoch, *others]}) > 1, "shards keep their order"


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_sharded_a_rank_reads_its_share_of_the_shards(world_size):
    order = sharded([25] * 640, 64, window=50, lanes=16)  # 16,000 samples: an epoch is 250 batches
    for first in (0, 250):
        seen = [set(order.shards_ahead(first, 250, rank, world_size).tolist()) for rank in range(world_size)]
        assert set.union(*seen) == set(range(640))
        # Those of its own lanes, and those that the lanes' ends cut.
        assert all(len(shards) <= 640 / world_size + 16 / world_size for shards in seen)
    # An epoch that begins in mid-batch turns the slots: one more lane, not more.
    odd = sharded([25] * 639, 64, window=50, lanes=16)
    for rank in range(world_size):
        assert len(odd.shards_ahead(300, 150, rank, world_size)) <= 0.6 * 639 * (1 / world_size + 1 / 16) + 2 * 16 + 20


def test_shards_ahead_are_those_that_are_read_the_first_first():
    sizes = np.array([7, 1, 12, 30, 5, 9, 11])
    order = sharded(sizes, 12, seed=2, window=5, lanes=4)
    owner = np.repeat(np.arange(7), sizes)
    for step, rank in ((0, 0), (5, 1), (6, 0)):  # an epoch is 6.25 batches
        read = [owner[i] for s in range(step, step + 3) for i in batch_indices(order, s)[rank * 6 : rank * 6 + 6]]
        assert order.shards_ahead(step, 3, rank, 2).tolist() == list(dict.fromkeys(read))


def test_sharded_keeps_two_windows_a_lane_and_sends_none_to_workers():
    order = sharded([100] * 1000, 64, window=500, lanes=8)
    fresh = len(pickle.dumps(order))
    stream(order, 300)
    assert len(order._windows) <= 8 * 2 + 1
    assert len(pickle.dumps(order)) == fresh < 20_000


def test_sharded_makes_each_window_once(monkeypatch):
    made = []
    monkeypatch.setattr(order_choice, "shuffled", lambda *names: made.append(names) or shuffled(*names))
    order = sharded([100] * 64, 64, window=60, lanes=8)  # lanes of 800 samples: 14 windows, the last of 20
    for position in range(6400):
        order.index_of(position)
    stream(order, 100)
    stream(order, 1)
    assert len(made) == 2 * 8 * 14 + 1 + 8, "the second time round as in the first, the list of shards once"


def test_sharded_stand_ins_are_near_then_anywhere():
    order = sharded([100] * 50, 50, seed=1, window=20, lanes=5)
    near = {order.stand_in(1234, draw, attempt=1) for draw in np.linspace(0, 0.999, 100)}
    in_window = set(order.at(np.arange(5000)).reshape(100, 50)[24:26, 30:40].ravel().tolist())
    assert near == in_window and order.index_of(1234) in near
    assert order.stand_in(1234, 0.5, attempt=50) == 2500


def test_drawn_covers_evenly_and_repeats():
    order = DrawnOrder(10, 5, seed=0)
    visits = stream(order, 4000)
    counts = np.bincount(visits, minlength=10)
    assert len(counts) == 10 and abs(counts - 2000).max() < 200
    assert len(set(visits[:10])) < 10, "without replacement"
    assert [order.index_of(position) for position in (0, 1023, 1024, 19_999)] == visits[
        [0, 1023, 1024, 19_999]
    ].tolist()


@pytest.mark.parametrize(
    ("num_samples", "batch", "words"),
    [(10, 11, ("11", "10")), (0, 1, ("no samples",)), (10, 0, ("0",))],
)
@pytest.mark.parametrize("kind", [Order, DrawnOrder, partial(ShardedOrder, shard_sizes=[])])
def test_bad_sizes_are_refused(kind, num_samples, batch, words):
    with pytest.raises(UserError) as error:
        kind(num_samples, batch, seed=0)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lanes": 7}, "data.lanes 7 does not divide the batch of 64; use a divisor of it, such as 64"),
        ({"lanes": 0}, "data.lanes 0"),
        ({"window": 0}, "data.window is 0; it must be 1 or more"),
    ],
)
def test_bad_options_of_the_sharded_order(options, match):
    with pytest.raises(UserError, match=match):
        sharded([1000], 64, **options)


def test_default_lanes():
    assert [default_lanes(batch) for batch in (1, 64, 100, 127, 4096, 32_768)] == [1, 64, 50, 1, 64, 64]


def test_pseudo_shards():
    assert [pseudo_shards(n).tolist() for n in (1, 10_000, 25_000)] == [[1], [10_000], [10_000, 10_000, 5_000]]


class Sized(Source):
    name = "sized"

    def __init__(self, size, **extra):
        self.size = size
        self.__dict__.update(extra)

    def __len__(self):
        return self.size


def test_which_order_a_source_gets():
    def kind(size=100_000, window=None, lanes=None, replacement=False, **extra):
        order = order_for(Sized(size, **extra), 64, 3, window=window, lanes=lanes, replacement=replacement)
        return type(order), order.kind()

    assert kind() == (Order, {"window": 100_000, "lanes": 1})
    assert kind(4_000_000)[0] is Order
    assert kind(4_000_001) == (ShardedOrder, {"window": 16_384, "lanes": 64})
    assert kind(remote=True) == (ShardedOrder, {"window": 16_384, "lanes": 64})
    assert kind(4_000_001, window=5_000_000) == (Order, {"window": 4_000_001, "lanes": 1})
    assert kind(window=500) == (ShardedOrder, {"window": 500, "lanes": 64})
    assert kind(lanes=4) == (ShardedOrder, {"window": 100_000, "lanes": 4})
    assert kind(replacement=True) == (DrawnOrder, {"replacement": True})
    with pytest.raises(UserError, match="data.replacement"):
        kind(replacement=True, window=5)
    with pytest.raises(UserError, match="'sized'"):
        kind(replacement=True, remote=True)
    own = order_for(Sized(100, shard_sizes=[60, 40]), 10, 0, window=10)
    assert own.shard_sizes.tolist() == [60, 40]
    with pytest.raises(ValueError, match="hold 90"):
        order_for(Sized(100, shard_sizes=[60, 30]), 10, 0, window=10)


def test_cursor_accepts_another_step_of_the_same_order():
    order = Order(10, 4, seed=1)
    saved, now = order.cursor(7, "abc"), order.cursor(0, "abc")
    assert (saved["step"], saved["epoch"]) == (7, 2)
    check_cursor(saved, now)


def test_cursor_of_an_older_version_is_that_of_all_the_data_shuffled():
    older = {"step": 7, "epoch": 2, "seed": 1, "global_batch_size": 4, "num_samples": 10, "fingerprint": "abc"}
    check_cursor(older, Order(10, 4, seed=1).cursor(0, "abc"))
    with pytest.raises(UserError, match="window is 3 but the checkpoint was made with window 10"):
        check_cursor(older, sharded([10], 4, 1, window=3).cursor(0, "abc"))
    with pytest.raises(UserError, match="lanes is 4 but the checkpoint was made with lanes 1"):
        check_cursor(older, sharded([10], 4, 1, window=10).cursor(0, "abc"))
    with pytest.raises(UserError, match="replacement is True but the checkpoint was made with replacement False"):
        check_cursor(older, DrawnOrder(10, 4, 1).cursor(0, "abc"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("seed", 99), ("global_batch_size", 5), ("num_samples", 12), ("fingerprint", "abd")],
        *[("lanes", 2), ("window", 7), ("replacement", True)],
    ],
)
def test_cursor_names_the_field_that_differs(field, value):
    saved = json.loads(json.dumps(sharded([10], 4, 1, window=3).cursor(7, "abc")))
    current = {**saved, field: value}
    with pytest.raises(UserError, match=field) as error:
        check_cursor(saved, current)
    assert str(saved.get(field, False)) in str(error.value) and str(value) in str(error.value)


def test_cursor_with_a_field_missing_or_unknown_is_refused():
    saved = Order(10, 4, seed=1).cursor(7, "abc")
    with pytest.raises(UserError, match="seed"):
        check_cursor({name: value for name, value in saved.items() if name != "seed"}, saved)
    with pytest.raises(UserError, match="stride"):
        check_cursor({**saved, "stride": 8}, saved)


def test_skipped_batches_are_left_out_and_the_rest_is_as_it_was():
    whole = Order(100, 8, seed=1)
    some = replace(whole, skipped=(3, 4, 9))
    taken = [0, 1, 2, 5, 6, 7, 8, 10, 11]
    assert some.batches(0, 9).tolist() == taken and some.batches(4, 2).tolist() == [6, 7]
    for step, batch in enumerate(taken):
        positions = some.share(step, 1, 1, 2)
        assert positions.tolist() == whole.share(batch, 1, 1, 2).tolist()
        assert {some.step_of(int(position)) for position in positions} == {step}
    assert some.cursor(10)["epoch"] == 1 and whole.cursor(10)["epoch"] == 0
    with pytest.raises(UserError, match="skipped is .3, 4, 9. but the checkpoint was made with skipped .."):
        check_cursor(whole.cursor(5), some.cursor(5))
