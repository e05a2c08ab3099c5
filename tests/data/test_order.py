import pickle
import time

import numpy as np
import pytest

from contrastive.data.order import Order, check_cursor
from contrastive.errors import UserError


def stream(order, steps):
    return np.concatenate([order.indices(step) for step in range(steps)])


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


def test_pure_function_of_the_seed():
    first, again, other = (Order(1000, 100, seed) for seed in (5, 5, 6))
    assert np.array_equal(stream(first, 25), stream(again, 25))
    assert not np.array_equal(stream(first, 25), stream(other, 25))
    assert np.array_equal(pickle.loads(pickle.dumps(first)).indices(17), first.indices(17))


def test_known_order():
    """A change here breaks the resuming of every older run."""
    assert Order(8, 8, seed=42).indices(0).tolist() == [7, 1, 6, 4, 3, 5, 0, 2]


def test_seeking_far_costs_what_the_start_costs():
    def seconds(step):
        order = Order(100_000, 256, seed=1)
        begun = time.perf_counter()
        order.indices(step)
        return time.perf_counter() - begun

    near, far = (min(seconds(step) for _ in range(3)) for step in (10, 1_000_000))
    assert far < 2 * near + 0.01


def test_two_epochs_are_kept_at_most():
    order = Order(100, 50, seed=1)
    stream(order, 20)
    assert set(order._permutations) == {8, 9}


@pytest.mark.parametrize(
    ("num_samples", "batch", "words"),
    [(10, 11, ("11", "10")), (0, 1, ("no samples",)), (10, 0, ("0",))],
)
def test_bad_sizes_are_refused(num_samples, batch, words):
    with pytest.raises(UserError) as error:
        Order(num_samples, batch, seed=0)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_cursor_accepts_another_step_of_the_same_order():
    order = Order(10, 4, seed=1)
    saved, now = order.cursor(7, "abc"), order.cursor(0, "abc")
    assert (saved["step"], saved["epoch"]) == (7, 2)
    check_cursor(saved, now)


@pytest.mark.parametrize(
    ("field", "value"),
    [("seed", 99), ("global_batch_size", 5), ("num_samples", 12), ("fingerprint", "abd")],
)
def test_cursor_names_the_field_that_differs(field, value):
    saved = Order(10, 4, seed=1).cursor(7, "abc")
    with pytest.raises(UserError, match=field) as error:
        check_cursor(saved, {**saved, field: value})
    assert str(saved[field]) in str(error.value) and str(value) in str(error.value)


def test_cursor_with_a_field_missing_or_unknown_is_refused():
    saved = Order(10, 4, seed=1).cursor(7, "abc")
    with pytest.raises(UserError, match="seed"):
        check_cursor({name: value for name, value in saved.items() if name != "seed"}, saved)
    with pytest.raises(UserError, match="window"):
        check_cursor({**saved, "window": 8}, saved)
