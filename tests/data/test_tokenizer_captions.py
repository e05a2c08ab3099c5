"""Which captions the run's own tokenizer is trained on."""

import pytest

from contrastive.data.captions import sampled_captions
from contrastive.data.record import BadSample, Source


class Counting(Source):
    def __init__(self, count, remote):
        self.count, self.remote = count, remote

    def __len__(self):
        return self.count

    def captions(self, index):
        if index == 3:
            raise BadSample("bad_json")
        return (index, -index - 1)


@pytest.mark.parametrize("remote", [False, True])
def test_all_of_a_small_source(remote):
    wanted = [c for index in range(30_000) if index != 3 for c in (index, -index - 1)]
    assert list(sampled_captions(Counting(30_000, remote))) == wanted


def test_evenly_spread_when_local_and_in_runs_when_far():
    """400 million samples in shards of 10,000: a sample here and there, or 16 shards at most."""
    local, far = ([c for c in sampled_captions(Counting(400_000_000, remote)) if c >= 0] for remote in (False, True))
    assert (len(local), len(far)) == (50_000, 49_999)  # sample 3 is bad, and in the runs only
    assert {b - a for a, b in zip(local, local[1:], strict=False)} == {8000}
    assert len({index // 10_000 for index in far}) <= 16
    assert max(far) > 340_000_000
