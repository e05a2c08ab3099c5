from collections import Counter

import numpy as np
import pytest

from contrastive.data.order import check_cursor
from contrastive.data.order_choice import ShardedOrder, order_for
from contrastive.data.record import BadSample, Record, Source
from contrastive.data.shards import remote
from contrastive.data.sources import open_source
from contrastive.data.sources.derived import ClassPrompts, Mixture
from contrastive.data.sources.subset import labelled_share
from contrastive.errors import UserError


@pytest.fixture(scope="module")
def digits():
    return open_source("digits")


def keys(source):
    return [source[index].key for index in range(len(source))]


def test_each_class_gives_its_share(digits):
    whole = Counter(digits.label(i) for i in range(len(digits)))
    tenth = labelled_share(digits, 0.1)
    counts = Counter(tenth.label(i) for i in range(len(tenth)))
    assert counts == {label: round(0.1 * n) for label, n in whole.items()}
    assert tenth[3].label == tenth.label(3) and tenth.captions(3) == tenth[3].captions
    assert tenth.class_names == digits.class_names and tenth.name == "digits:train (10 %)"


def test_always_the_same_and_nested(digits):
    tenth, half = keys(labelled_share(digits, 0.1)), keys(labelled_share(digits, 0.5))
    assert tenth == keys(labelled_share(digits, 0.1)) and set(tenth) < set(half)
    prints = {labelled_share(digits, share).fingerprint for share in (0.1, 0.5, 1.0)}
    assert len(prints | {digits.fingerprint}) == 4


def test_the_least_is_one_of_each_class(digits):
    assert Counter(labelled_share(digits, 1e-6).label(i) for i in range(10)) == dict.fromkeys(range(10), 1)


class Holes(Source):
    """Two of three samples have no label, one of them because it cannot be read."""

    name, class_names, fingerprint = "holes", ("even", "odd"), "0"

    def __init__(self, labelled=True):
        self.labelled = labelled

    def __len__(self):
        return 300

    def label(self, index):
        if index % 3 == 0:
            raise BadSample("bad_label")
        return index % 2 if index % 3 == 2 and self.labelled else None


def test_unlabelled_samples_are_left_out():
    assert len(labelled_share(Holes(), 1.0)) == 100
    with pytest.raises(UserError, match="holes has no labels"):
        labelled_share(Holes(labelled=False), 0.5)


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan")])
def test_a_share_that_is_none(digits, share):
    with pytest.raises(UserError, match="data.share is"):
        labelled_share(digits, share)


class Afar(Source):
    """Remote shards of 0 to 9 samples, two in three of them labelled; the classes come one after the other."""

    remote, class_names = True, ("a", "b")
    shard_sizes = np.array([9, 0, 1, 6, 7, 2, 9, 9, 9, 8])

    def __init__(self, name="afar"):
        self.name = self.fingerprint = name

    def __len__(self):
        return 60

    def __getitem__(self, index):
        return Record(str(index), b"", label=self.label(index))

    def label(self, index):
        return index // 30 if index % 3 else None

    def wanted(self, shards):
        return [(f"{self.name}/{shard}.tar", 1, None) for shard in shards]


def shards_read(source, order, first, last):
    """Of the whole source: the shards of the samples at these positions, the first needed first."""
    indices = [int(source[order.index_of(position)].key) for position in range(first, last)]
    return list(dict.fromkeys(np.searchsorted(np.cumsum(source.source.shard_sizes), indices, side="right").tolist()))


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.2, 1.0])
def test_remote_shards_keep_windows_and_prefetching(share, prompts):
    """Shards of which nothing is left are neither read nor fetched."""
    afar = ClassPrompts(Afar(), ("a {}",)) if prompts else Afar()
    source = labelled_share(afar, share)
    assert source.remote and len(source.shard_sizes) == 10 and source.shard_sizes.sum() == len(source)
    order = order_for(source, 2, 0)
    assert isinstance(order, ShardedOrder) and order.kind()["window"] == 16_384
    assert sorted(order.at(np.arange(len(source)))) == list(range(len(source)))
    for step in range(0, len(source) // 2):
        ahead = order.shards_ahead(step, 3).tolist()
        assert ahead == shards_read(source, order, 2 * step, 2 * step + 6)
        assert source.wanted(ahead) == [(f"afar/{shard}.tar", 1, None) for shard in ahead]


def test_a_run_is_not_resumed_with_other_shards():
    """Local shards decide the order within a window too, which the rest of a cursor does not tell."""
    whole, cut = Afar(), Afar()
    whole.shard_sizes, cut.shard_sizes = None, np.array([40, 20])
    sources = [labelled_share(source, 0.5) for source in (whole, cut, Afar())]
    assert len({source.fingerprint for source in sources}) == 3
    before, after = (order_for(source, 2, 0, window=5).cursor(3, source.fingerprint) for source in sources[:2])
    with pytest.raises(UserError, match="cannot resume: fingerprint"):
        check_cursor(before, after)


def test_a_share_of_a_mixture_of_remote_shards_is_fetched_ahead(monkeypatch):
    asked = []
    monkeypatch.setattr(remote, "prefetch", asked.append)
    near = ClassPrompts(open_source("digits:test").stored, ("{}",))
    source = labelled_share(Mixture("mix", [Afar(), near, Afar("far")], (1, 1, 2)), 0.3)
    assert source.remote and [part.remote for part in source.parts] == [True, False, True]
    order = order_for(source, 8, 0)
    source.prefetch(order.shards_ahead(0, 4))
    assert asked == [source.wanted(order.shards_ahead(0, 4))] and {url.split("/")[0] for url, _, _ in asked[0]} == {
        "afar",
        "far",
    }
