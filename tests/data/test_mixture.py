import json
import pickle

import numpy as np
import pytest
from batches import batch_indices
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from contrastive.data.order import DrawnOrder, MixtureOrder, Order, check_cursor
from contrastive.data.order_choice import ShardedOrder, order_for
from contrastive.data.record import BadSample, Record, Source
from contrastive.data.shards import remote
from contrastive.data.sources import open_source
from contrastive.data.sources.derived import Mixture, split_mixture
from contrastive.errors import UserError


class Memory(Source):
    """A source in memory; the image of sample `bad` is missing."""

    def __init__(self, name, count, class_names=None, bad=None, **extra):
        self.name, self.count, self.class_names, self.bad = name, count, class_names, bad
        self.fingerprint = f"{name}{count}"
        self.__dict__.update(extra)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index == self.bad:
            raise BadSample("missing_image", f"key{index}")
        return Record(f"key{index}", b"", self.captions(index), self.label(index))

    def captions(self, index):
        return (f"{self.name} {index}",)

    def label(self, index):
        return index % 2 if self.class_names else None


def mixture(sizes, weights, **extra):
    return Mixture("mix", [Memory(f"part{n}", size, **extra) for n, size in enumerate(sizes)], weights)


def owners_of(order, first, count):
    indices = order.at(np.arange(first, first + count))
    return np.searchsorted(np.cumsum([part.num_samples for part in order.parts]), indices, side="right"), indices


@st.composite
def mixtures(draw):
    """Two to four parts, each of any kind of order, with any weights."""
    parts = draw(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9)), min_size=2, max_size=4))
    sizes, weights = zip(*parts, strict=True)
    batch = draw(st.integers(1, sum(sizes)))
    window = draw(st.sampled_from([None, 1, 7, 30]))
    return order_for(mixture(sizes, weights), batch, draw(st.integers(0, 2**64 - 1)), window=window)


@settings(max_examples=100, deadline=None)
@given(mixtures(), st.integers(0, 10**5))
def test_every_block_has_exactly_the_weights(order, block):
    size = sum(order.weights)
    owners, _ = owners_of(order, block * size, 5 * size)
    for one in owners.reshape(5, size):
        assert np.bincount(one, minlength=len(order.parts)).tolist() == list(order.weights)


@settings(max_examples=100, deadline=None)
@given(mixtures(), st.integers(0, 3))
def test_every_part_comes_once_in_each_of_its_own_epochs(order, part):
    part %= len(order.parts)
    size, weight = order.parts[part].num_samples, order.weights[part]
    blocks = -(-3 * size // weight)
    owners, indices = owners_of(order, 0, blocks * sum(order.weights))
    own = indices[owners == part] - sum(other.num_samples for other in order.parts[:part])
    assert own.tolist() == order.parts[part].at(np.arange(blocks * weight)).tolist()
    for epoch in range(3):
        assert sorted(own[epoch * size : (epoch + 1) * size]) == list(range(size))


@settings(max_examples=50, deadline=None)
@given(mixtures(), st.integers(0, 10**4), st.randoms())
def test_index_of_agrees_with_indices(order, step, rng):
    batch = order.global_batch_size
    visits = np.concatenate([batch_indices(order, step), batch_indices(order, step + 1)])
    assert visits.dtype == np.int64
    places = list(range(2 * batch))
    rng.shuffle(places)
    assert [order.index_of(step * batch + place) for place in places] == visits[places].tolist()


def test_known_mixture():
    """A change here breaks the resuming of every older run."""
    order = MixtureOrder(13, 4, 42, (Order(8, 3, 42), Order(5, 1, 43)), (2, 1))
    assert order.at(np.arange(12)).tolist() == [7, 1, 8, 6, 12, 4, 10, 3, 5, 0, 2, 9]
    built = order_for(mixture([8, 5], (2, 1)), 4, 42)
    assert [part.seed % 2**64 for part in built.parts] == [42, 0x9E3779B97F4A7C3F]


def test_places_are_shuffled_anew_in_every_block():
    order = order_for(mixture([50, 50], (1, 3)), 4, 0)
    owners, _ = owners_of(order, 0, 4 * 200)
    places = np.nonzero(owners.reshape(200, 4) == 0)[1]
    assert np.bincount(places, minlength=4).min() > 25


def test_a_ranks_share_of_each_part_is_local():
    """With a batch that the weights divide, lanes of the parts lie where the slots of the ranks are."""
    order = order_for(mixture([12_000, 6_000], (2, 1)), 96, 0, window=50, lanes=16)
    assert [part.global_batch_size for part in order.parts] == [64, 32]
    touched = [set(), set()]
    for step in range(100):
        indices = batch_indices(order, step)
        for rank in range(2):
            touched[rank] |= set((indices[rank * 48 : rank * 48 + 48] // 50).tolist())
    assert len(touched[0] & touched[1]) < 0.2 * len(touched[0])


def test_shards_ahead_are_those_of_the_parts_read_by_shards():
    sizes = [np.array([9, 5, 20, 3, 23]), np.array([30, 1, 9])]
    parts = [Memory("far", 60, remote=True, shard_sizes=sizes[0]), Memory("near", 50)]
    parts.append(Memory("also far", 40, remote=True, shard_sizes=sizes[1]))
    order = order_for(Mixture("mix", parts, (3, 1, 2)), 24, 0, lanes=None)
    shard_of = {0: np.repeat(np.arange(5), sizes[0]), 2: np.repeat(np.arange(3), sizes[1])}
    for step, rank in ((0, 0), (7, 1)):
        read = []
        for one in range(step, step + 2):
            owners, indices = owners_of(order, one * 24 + rank * 12, 12)
            rows = zip(owners.tolist(), (indices - order._starts[owners]).tolist(), strict=True)
            read += [(owner, shard_of[owner][row]) for owner, row in rows if owner != 1]
        assert order.shards_ahead(step, 2, rank, 2) == list(dict.fromkeys(read))
    assert order_for(mixture([10, 20], (1, 1)), 4, 0).shards_ahead(0, 3) == []


def test_seek_is_pure_and_nothing_cached_is_sent_to_workers():
    order = order_for(mixture([4000, 999], (1000, 7)), 64, 3)
    fresh = pickle.dumps(order)
    far = batch_indices(order, 1_000_000)
    assert len(pickle.dumps(order)) == len(fresh) < 5000
    assert np.array_equal(batch_indices(pickle.loads(fresh), 1_000_000), far)
    for chunk in range(5):
        batch_indices(order, chunk * 300)  # 64 of the 16,112 positions of a chunk
    assert len(order._chunks) <= 2


def test_stand_ins_come_from_the_same_part():
    order = order_for(mixture([10, 90], (1, 1)), 10, 0)
    owners, _ = owners_of(order, 0, 40)
    for position, owner in enumerate(owners):
        for draw in (0.0, 0.5, 0.999):
            assert (order.stand_in(position, draw, 1) >= 10) == owner


def test_cursor_names_weights_and_keeps_the_kinds_of_the_parts():
    source = mixture([300, 50], (2, 1))
    order = order_for(source, 30, 0, window=100)
    saved = json.loads(json.dumps(order.cursor(9, source.fingerprint)))
    assert (saved["weights"], saved["window"], saved["lanes"]) == ([2, 1], [100, 50], [20, 1])
    check_cursor(saved, order.cursor(0, source.fingerprint))
    other = mixture([300, 50], (1, 1))
    with pytest.raises(UserError, match=r"weights is \[1, 1\] but the checkpoint was made with weights \[2, 1\]"):
        check_cursor(saved, order_for(other, 30, 0, window=100).cursor(0, other.fingerprint))
    with pytest.raises(UserError, match="window"):
        check_cursor(saved, order_for(source, 30, 0, window=90).cursor(0, source.fingerprint))
    with pytest.raises(UserError, match="replacement"):
        check_cursor(saved, order_for(source, 30, 0, replacement=True).cursor(0, source.fingerprint))
    with pytest.raises(UserError, match="weights"):
        check_cursor({**Order(350, 30, 0).cursor(0, source.fingerprint)}, order.cursor(0, source.fingerprint))


def test_the_parts_have_orders_of_their_own_kind():
    parts = [Memory("near", 100), Memory("far", 200, remote=True), Memory("tiny", 3)]
    order = order_for(Mixture("mix", parts, (1, 2, 13)), 16, 0)
    assert [type(part) for part in order.parts] == [Order, ShardedOrder, Order]
    assert [part.global_batch_size for part in order.parts] == [1, 2, 3]
    drawn = order_for(mixture([10, 20], (1, 1)), 4, 0, replacement=True)
    assert all(isinstance(part, DrawnOrder) for part in drawn.parts)
    with pytest.raises(UserError, match="part0: data.lanes 7 does not divide the batch of 5"):
        order_for(mixture([5, 100], (1, 1)), 30, 0, lanes=7)


@pytest.mark.parametrize(
    ("batch", "weights", "lanes", "expected"),
    [
        (96, (2, 1), None, [(64, 64), (32, 32)]),
        (8192, (3, 1), None, [(6144, 64), (2048, 64)]),
        (8192, (2, 1), None, [(5440, 64), (2728, 62)]),  # 2,731 is prime
        (30, (1, 1), 7, [(14, 7), (14, 7)]),
    ],
)
def test_parts_have_many_lanes_whatever_the_weights(batch, weights, lanes, expected):
    order = order_for(mixture([10_000, 10_000], weights), batch, 0, window=100, lanes=lanes)
    assert [(part.global_batch_size, part.lanes) for part in order.parts] == expected


def test_source_lays_parts_end_to_end_and_names_them_in_keys():
    source = mixture([3, 2], (1, 1), bad=1)
    assert len(source) == 5 and source.name == "mix"
    assert source[2].key == "part0:key2" and source[3].key == "part1:key0"
    assert [source.captions(index) for index in (0, 4)] == [("part0 0",), ("part1 1",)]
    for index, key in ((1, "part0:key1"), (4, "part1:key1")):
        with pytest.raises(BadSample, match="missing_image") as fault:
            source[index]
        assert fault.value.key == key
    for index in (5, -1):
        with pytest.raises(IndexError):
            source[index]
    assert pickle.loads(pickle.dumps(source))[3].key == "part1:key0"
    assert source.fingerprint != mixture([3, 3], (1, 1)).fingerprint != mixture([2, 3], (1, 1)).fingerprint


def test_prefetch_asks_once_for_the_remote_shards_of_all_parts(monkeypatch):
    asked = []
    monkeypatch.setattr(remote, "prefetch", asked.append)
    parts = [Memory(name, 9, remote=name != "near") for name in ("far", "near", "also far")]
    for part in parts[::2]:
        part.wanted = lambda numbers, name=part.name: [(name, number) for number in numbers]
    source = Mixture("mix", parts, (1, 1, 1))
    source.prefetch([(2, 7), (0, 1), (1, 5), (2, 3)])
    assert asked == [[("also far", 7), ("far", 1), ("also far", 3)]]
    assert source.remote and not mixture([2, 2], (1, 1)).remote


def test_labels_only_where_all_parts_share_the_class_names():
    same = mixture([3, 2], (1, 1), class_names=("cat", "dog"))
    assert same.class_names == ("cat", "dog") and same.label(4) == 1 and same[4].label == 1
    parts = [Memory("a", 3, ("cat", "dog")), Memory("b", 2, ("dog", "cat"))]
    other = Mixture("mix", parts, (1, 1))
    assert other.class_names is None and other.label(1) is None and other[1].label is None


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("a.csv", (["a.csv"], (1,))),
        ("a.csv=2", (["a.csv=2"], (1,))),
        ("a/{00..09}.tar=2,b.csv=1", (["a/{00..09}.tar", "b.csv"], (2, 1))),
        ("a.csv, b.csv", (["a.csv", "b.csv"], (1, 1))),
        ("a/{x,{y,z}}.tar=4,b.csv=2.5,c", (["a/{x,{y,z}}.tar", "b.csv", "c"], (8, 5, 2))),
        ("a=0.125,b=.375", (["a", "b"], (1, 3))),
        ("https://x/a.tar?v=2,s3://b/{0..9}.tar=3", (["https://x/a.tar?v=2", "s3://b/{0..9}.tar"], (1, 3))),
        ("https://x/a.tar?u=1&v=2=5,b=1", (["https://x/a.tar?u=1&v=2", "b"], (5, 1))),
        ("lr=3/a.csv,y=2020/*.tar=7", (["lr=3/a.csv", "y=2020/*.tar"], (1, 7))),
    ],
)
def test_spec_splits_at_commas_outside_braces(spec, expected):
    assert split_mixture(spec) == expected


def test_a_path_that_is_there_stays_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b=3").mkdir()
    (tmp_path / "year=2020").mkdir()
    assert split_mixture("a,b=3") == (["a,b=3"], (1,))
    assert split_mixture("year=2020,c.csv=2") == (["year=2020", "c.csv"], (1, 2))


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("scenes,", "nothing before or after a comma"),
        ("scenes=0,digits", "weight '0' is not a number above 0"),
        ("scenes=-1,digits", "weight '-1' .*write 'scenes=2'"),
        ("scenes=,digits", "weight ''"),
        ("scenes=1.2345,digits", "at most three decimals"),
        ("scenes=1.2.3,digits", "weight '1.2.3'"),
        ("scenes=1234567,digits=1000000", "1234567:1000000 in lowest terms"),
        ("digits=1,digits=2", "'digits:train' is there twice"),
        ("digits=1,digtis=2", "unknown data source 'digtis'.*digits"),
    ],
)
def test_bad_specs_are_refused(spec, match):
    refused(spec, match)


def test_open_source_opens_a_mixture():
    source = open_source("digits:train=3,digits:test")
    assert isinstance(source, Mixture) and source.weights == (3, 1)
    assert len(source) == 1442 + 355 and source.class_names[7] == "seven"
    assert source[1442].key.startswith("digits:test:") and source[1442].captions


def test_open_clips_way_to_join_shards_is_told_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        split_mixture("a-{0..3}.tar::b.tar")
    assert "'{a-{0..3}.tar,b.tar}' reads all as one, 'a-{0..3}.tar,b.tar' draws from each alike" in str(error.value)
    (tmp_path / "odd::name.tar").touch()
    assert split_mixture("odd::name.tar") == (["odd::name.tar"], (1,))
