import io
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import batch_indices
from PIL import Image

from contrastive.data import loader
from contrastive.data.augment import AugmentConfig
from contrastive.data.loader import eval_loader, train_loader
from contrastive.data.order import Order
from contrastive.data.order_choice import ShardedOrder, order_for
from contrastive.data.preprocess import Preprocess, PreprocessConfig
from contrastive.data.record import BadSample, Record, Source
from contrastive.data.samples import PairDataset, caption_id
from contrastive.data.sources import open_source
from contrastive.data.tokenizer import train_bpe
from contrastive.errors import UserError

COLOURS = ["red", "green", "blue", "white", "black", "brown"]


def jpeg(index):
    rng = np.random.default_rng(index)
    image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((50 + index % 7, 40), 3)
    file = io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()


class Memory(Source):
    """A source in memory; `images` and `captions` replace those of single samples."""

    name, fingerprint = "memory", "0"

    def __init__(self, count=40, images=None, captions=None):
        self.count, self.images, self.words = count, images or {}, captions or {}

    def __len__(self):
        return self.count

    def captions(self, index):
        return self.words.get(index, tuple(f"{colour} thing {index}" for colour in COLOURS))

    def __getitem__(self, index):
        image = self.images.get(index) if index in self.images else jpeg(index)
        if image is None:
            raise BadSample("missing_image", f"key{index}")
        return Record(f"key{index}", image, self.captions(index))


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([f"{colour} thing {i}" for colour in COLOURS for i in range(40)], 300, 12)


def pairs(tokenizer, source=None, batch=8, seed=0, augment=None, size=16):
    source = source or Memory()
    augment = augment or AugmentConfig(crop_scale=(0.3, 1.0), flip=True)
    return PairDataset(source, Order(len(source), batch, seed), tokenizer, size, augment)


def batches(dataset, steps=7, **options):
    return list(train_loader(dataset, num_steps=steps, **options))


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
            assert same, name


BAD = {"images": {3: b"<html>", 5: b"", 9: None}, "captions": {4: ("",), 7: (), 11: ("", "x thing")}}


def test_batch_has_the_promised_tensors(tokenizer):
    dataset = pairs(tokenizer)
    first, second = batches(dataset, steps=2)
    kinds = {name: (tuple(value.shape), value.dtype) for name, value in first.items() if name != "bad"}
    assert kinds == {
        "image": ((8, 3, 16, 16), torch.uint8),
        "tokens": ((8, 12), torch.int64),
        "caption_id": ((8,), torch.int64),
        "index": ((8,), torch.int64),
        "replaced": ((8,), torch.int64),
    }
    assert first["bad"] == [] and first["image"].is_contiguous()
    assert first["index"].tolist() == batch_indices(dataset.order, 0).tolist()
    assert second["index"].tolist() == batch_indices(dataset.order, 1).tolist()


def test_tokens_and_caption_id_belong_to_the_image(tokenizer):
    source = Memory()
    for batch in batches(pairs(tokenizer, source)):
        for index, tokens, identity in zip(batch["index"], batch["tokens"], batch["caption_id"], strict=True):
            text = tokenizer.decode(tokens)
            assert text in source.captions(int(index)) and caption_id(text) == identity


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_batches(tokenizer, workers):
    dataset = pairs(tokenizer, Memory(**BAD))
    expected = batches(dataset)
    assert any(batch["bad"] for batch in expected)
    assert_same(batches(dataset, num_workers=workers, timeout=30), expected)


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks_gives_the_same_global_batches(tokenizer, world):
    dataset = pairs(tokenizer, Memory(**BAD))
    shares = [batches(dataset, rank=rank, world_size=world) for rank in range(world)]
    joined = [
        {
            name: sum((part[name] for part in parts), []) if name == "bad" else torch.cat([p[name] for p in parts])
            for name in parts[0]
        }
        for parts in zip(*shares, strict=True)
    ]
    assert_same(joined, batches(dataset))


def test_starting_late_is_the_tail_of_starting_early(tokenizer):
    dataset = pairs(tokenizer)
    assert_same(batches(dataset, steps=3, start_step=9), batches(dataset, steps=12)[9:])
    assert len(train_loader(dataset, num_steps=3, start_step=9)) == 3
    assert batches(dataset, steps=0) == []


def test_a_far_step_costs_no_more_than_a_near_one(tokenizer):
    def seconds(step):
        dataset = pairs(tokenizer)
        begun = time.perf_counter()
        batches(dataset, steps=1, start_step=step)
        return time.perf_counter() - begun

    seconds(0)
    assert min(seconds(1_000_000) for _ in range(3)) < 2 * min(seconds(10) for _ in range(3)) + 0.01


def test_visits_differ_in_crop_and_caption_and_seeds_differ(tokenizer):
    dataset = pairs(tokenizer, Memory(8))
    visits = batches(dataset, steps=12)
    of_sample_2 = [(b["image"][i], int(b["caption_id"][i])) for b in visits for i in range(8) if b["index"][i] == 2]
    assert len(of_sample_2) == 12
    assert len({image.numpy().tobytes() for image, _ in of_sample_2}) == 12
    assert len({caption for _, caption in of_sample_2}) >= 4
    other = pairs(tokenizer, Memory(8), seed=1)[0]
    assert not torch.equal(other["image"], dataset[0]["image"])


def test_no_global_random_state_is_touched(tokenizer):
    import random

    dataset = pairs(tokenizer)
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    first = batches(dataset)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert np.array_equal(np.random.get_state()[1], before[2])
    torch.manual_seed(123), np.random.seed(123)
    assert_same(batches(dataset), first)


def test_bad_samples_are_replaced_and_named(tokenizer):
    source = Memory(**BAD)
    epoch = batches(pairs(tokenizer, source), steps=5)  # 40 samples
    bad = sum((batch["bad"] for batch in epoch), [])
    visited = torch.cat([batch["index"] for batch in epoch])
    assert visited.shape == (40,) and not set(visited.tolist()) & {3, 4, 5, 7, 9}
    reasons = {key: reason for reason, key in bad}
    expected = {
        "key3": "unreadable_image",
        "key5": "unreadable_image",
        "key9": "missing_image",
        "key4": "empty_caption",
        "key7": "missing_caption",
    }
    assert expected.items() <= reasons.items()
    assert set(reasons) <= {*expected, "key11"}
    assert_same(epoch, batches(pairs(tokenizer, source), steps=5))


def test_image_with_one_usable_caption_is_kept(tokenizer):
    source = Memory(8, captions={i: ("", "  ", "red thing") for i in range(8)})
    epochs = batches(pairs(tokenizer, source), steps=6)
    assert all(sorted(batch["index"].tolist()) == list(range(8)) for batch in epochs)
    assert all(tokenizer.decode(tokens) == "red thing" for batch in epochs for tokens in batch["tokens"])
    faults = sum((batch["bad"] for batch in epochs), [])
    assert {reason for reason, _ in faults} == {"empty_caption"} and 20 < len(faults) < 44  # two thirds of 48


@pytest.mark.parametrize("workers", [0, 1])
def test_only_bad_samples_stop_with_one_line(tokenizer, workers):
    source = Memory(8, images={i: b"no image" for i in range(8)})
    with pytest.raises(UserError, match="^100 samples in a row .*unreadable_image.*memory'$") as error:
        batches(pairs(tokenizer, source), num_workers=workers)
    assert "\n" not in str(error.value)


def test_untouched_arrays_arrive_as_they_are(tokenizer):
    images = {i: np.full((16, 16, 3), i, np.uint8) for i in range(8)}
    dataset = pairs(tokenizer, Memory(8, images), augment=AugmentConfig(crop_scale=(1.0, 1.0)))
    batch = batches(dataset, steps=1)[0]
    assert (batch["image"] == batch["index"].view(8, 1, 1, 1)).all()


def test_batch_that_does_not_divide_among_ranks(tokenizer):
    with pytest.raises(UserError, match="8 does not divide among 3"):
        batches(pairs(tokenizer), world_size=3)


def test_eval_loader_keeps_order_and_leaves_out_bad_images():
    source = Memory(12, images={3: b"<html>", 4: None, 5: b""})
    preprocess = Preprocess(PreprocessConfig(16, resize="crop"))
    indices = [7, 3, 0, 11, 4, 5, 3, 2]
    for workers in (0, 2):
        found = list(eval_loader(source, preprocess, indices, batch_size=2, num_workers=workers))
        assert [batch["index"].tolist() for batch in found] == [[7], [0, 11], [], [2]]
        assert [len(batch["image"]) for batch in found] == [1, 2, 0, 1]
        assert found[2]["image"].shape == (0, 3, 16, 16)
        faults = [("unreadable_image", "key3")], [], [("missing_image", "key4"), ("unreadable_image", "key5")]
        assert [batch["bad"] for batch in found[:3]] == list(faults)
        assert torch.equal(found[3]["image"][0], preprocess.pixels(jpeg(2)))


ORPHANS = """
import os, sys, time
sys.path[:0] = [{folder!r}, os.path.dirname({folder!r})]
from test_loader import *
class Slow(Memory):
    def __getitem__(self, index):
        time.sleep({pause})
        return super().__getitem__(index)
words = train_bpe(["red thing"], 259, 12)
loader = iter(train_loader(pairs(words, Slow()), num_steps=1000, num_workers=2))
{first}
import multiprocessing
while len(multiprocessing.active_children()) < 2:
    time.sleep(0.1)
time.sleep(0.5)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
time.sleep(1000)
"""


def running(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and prctl")
@pytest.mark.parametrize(
    ("pause", "first"),
    [(0, "next(loader)"), (100, "import threading; threading.Thread(target=next, args=(loader,)).start()")],
    ids=["idle", "stuck"],
)
def test_workers_die_with_their_parent(pause, first):
    code = ORPHANS.format(folder=str(Path(__file__).parent), pause=pause, first=first)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2 and all(running(pid) for pid in workers)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 3
    while any(running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(running(pid) for pid in workers)


class Afar(Memory):
    """Shards of five samples each, which notes what it is asked to fetch."""

    remote = True

    def __init__(self, count=40):
        super().__init__(count)
        self.shard_sizes, self.asked = [5] * (count // 5), []

    def prefetch(self, shards):
        self.asked.append(list(shards))


def test_shards_of_the_steps_ahead_are_fetched(tokenizer, monkeypatch):
    monkeypatch.setattr(loader, "_SAMPLES_AHEAD", 64)  # 16 steps of 4: asked for anew every second one
    source = Afar()
    order = order_for(source, 8, 0, window=5, lanes=2)
    dataset = PairDataset(source, order, tokenizer, 16, AugmentConfig())
    list(train_loader(dataset, rank=1, world_size=2, start_step=3, num_steps=18))
    expected = [order.shards_ahead(step, min(16, 21 - step), 1, 2).tolist() for step in range(3, 21, 2)]
    assert source.asked == expected and len(expected[0]) > 4
    source.asked, source.remote = [], False
    list(train_loader(dataset, num_steps=2))
    assert not source.asked
    whole = PairDataset(Afar(), Order(40, 8, 0), tokenizer, 16, AugmentConfig())
    assert len(list(train_loader(whole, num_steps=2))) == 2


def test_the_stand_in_is_the_orders(tokenizer):
    bad = {index: None for index in range(10, 20)}  # all of one shard, and of every window that lies in it
    source = Memory(40, images=bad)
    order = ShardedOrder(40, 8, 0, [10] * 4, window=10, lanes=1)
    dataset = PairDataset(source, order, tokenizer, 16, AugmentConfig())
    for position in range(40):
        sample = dataset[position]
        assert sample["index"] not in bad
        if order.index_of(position) in bad:  # ten tries close by, all bad, then anywhere
            assert len(sample["bad"]) > 10
        else:
            assert not sample["bad"]


def test_prompts_of_one_class_have_one_id(tokenizer):
    """Else 'a photo of a cat' would be a negative for 'a drawing of a cat', on every second pair of a labelled set."""
    source = open_source("digits", prompts="digits")
    dataset = pairs(tokenizer, source)
    by_id: dict[int, set[str]] = {}
    labels: dict[int, set[int]] = {}
    for position in range(200):
        sample = dataset[position]
        by_id.setdefault(sample["caption_id"], set()).add(tokenizer.decode(sample["tokens"]))
        labels.setdefault(sample["caption_id"], set()).add(source.label(sample["index"]))
    assert len(by_id) == 10 and all(len(found) == 1 for found in labels.values())
    assert max(len(texts) for texts in by_id.values()) > 1
