"""How many unusable samples stop a run, and what is written of them."""

from contrastive.train.loop import MAX_KEYS, BadSamples, merged


def test_the_share_is_of_the_window_or_of_what_a_large_batch_makes_of_it():
    few = BadSamples(0.01, 10_000)
    assert not any(few.too_many(100, 10) for _ in range(10)), "100 of a window of 10,000 are allowed"
    assert few.too_many(100, 1)
    large = BadSamples(0.01, 10_000)
    assert not large.too_many(32_768, 110) and not large.too_many(32_768, 327) and large.too_many(32_768, 400)


def test_old_ones_are_forgotten():
    bad = BadSamples(0.01, 1000)
    assert not bad.too_many(100, 10)
    assert not any(bad.too_many(100, 0) for _ in range(9))
    assert not bad.too_many(100, 10), "the first ten are more than 1,000 samples ago"


def test_rows_of_old_and_new_runs_are_read_together():
    bad = BadSamples(0.01, 1000)
    bad.note([("unreadable_image", f"key{i}") for i in range(30)])
    taken = bad.take()
    assert taken["counts"] == {"unreadable_image": 30} and len(taken["keys"]["unreadable_image"]) == MAX_KEYS
    assert bad.take() == {"counts": {}, "keys": {}}
    old = {"kind": "bad_samples", "step": 3, "unreadable_image": 2}
    both = merged([old, {"kind": "bad_samples", "step": 5, **taken}])
    assert both["counts"] == {"unreadable_image": 32} and both["keys"]["unreadable_image"][0] == "key0"
