"""Rows of the fault matrix about which sample comes when."""

import re
import time
import tracemalloc

import numpy as np
import pytest
import torch
from batches import batch_indices
from launching import pretrain_here

from contrastive.data.augment import AugmentConfig
from contrastive.data.loader import train_loader
from contrastive.data.order import check_cursor
from contrastive.data.order_choice import ShardedOrder, order_for
from contrastive.data.record import BadSample, Record, Source
from contrastive.data.samples import PairDataset
from contrastive.data.sources.derived import Mixture
from contrastive.data.tokenizer import train_bpe
from contrastive.errors import UserError

BATCH = 24


class Numbers(Source):
    """A source in memory whose every seventh sample cannot be read."""

    def __init__(self, name, count):
        self.name, self.count, self.fingerprint = name, count, f"{name} {count}"

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index % 7 == 3:
            raise BadSample("missing_image", str(index))
        pixels = np.random.default_rng(index).integers(0, 256, (12, 10, 3), dtype=np.uint8)
        return Record(str(index), pixels, self.captions(index))

    def captions(self, index):
        return (f"{self.name} {index}", f"number {index}")


ONE = Numbers("one", 107)
TWO = Mixture("two", [Numbers("first", 61), Numbers("second", 46)], (2, 1))
KINDS = {
    "whole": (ONE, {}),
    "sharded": (ONE, {"window": 10, "lanes": 6}),
    "drawn": (ONE, {"replacement": True}),
    "mixed": (TWO, {}),
    "mixed_sharded": (TWO, {"window": 10}),
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([f"number {n}" for n in range(100)], 300, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_row_16_same_ids_when_the_number_of_ranks_changes_in_mid_run(kind, tokenizer):
    """2 ranks for four steps, 1 for four, 4 for four, over the end of an epoch: the global batches of one rank."""
    source, options = KINDS[kind]

    def global_batches(world_size, start_step, num_steps):
        loaders = []
        for rank in range(world_size):  # as a new process does, each with an order of its own
            order = order_for(source, BATCH, seed=5, **options)
            dataset = PairDataset(source, order, tokenizer, 8, AugmentConfig())
            span = {"start_step": start_step, "num_steps": num_steps}
            loaders.append(train_loader(dataset, rank=rank, world_size=world_size, **span))
        for shares in zip(*loaders, strict=True):
            yield {name: torch.cat([share[name] for share in shares]) for name in ("index", "image", "tokens")}

    undisturbed = list(global_batches(1, 0, 12))
    changing = [*global_batches(2, 0, 4), *global_batches(1, 4, 4), *global_batches(4, 8, 4)]
    assert len(changing) == 12
    for one, other in zip(undisturbed, changing, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    expected = order_for(source, BATCH, seed=5, **options)
    visits = torch.cat([batch["index"] for batch in changing]).numpy()
    wanted = np.concatenate([batch_indices(expected, step) for step in range(12)])
    assert (visits == wanted).mean() > 0.7, "all but the stand-ins of bad samples"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 1}, "seed"),
        ({"batch": 12}, "global_batch_size"),
        ({"grown": 1}, "num_samples"),
        ({"fingerprint": "altered"}, "fingerprint"),
    ],
)
def test_row_17_a_changed_order_is_refused_by_name(kind, change, field):
    source, options = KINDS[kind]
    saved = order_for(source, BATCH, 0, **options).cursor(9, source.fingerprint)
    if "grown" in change:
        if source is ONE:
            source = Numbers("one", 108)
        else:
            source = Mixture("two", [Numbers("first", 62), Numbers("second", 46)], (2, 1))
    order = order_for(source, change.get("batch", BATCH), change.get("seed", 0), **options)
    with pytest.raises(UserError, match=f"cannot resume: {field} is ") as error:
        check_cursor(saved, order.cursor(9, change.get("fingerprint", source.fingerprint)))
    assert "\n" not in str(error.value)


def test_row_17_changed_weights_stop_the_command(tmp_path, capsys):
    config, run = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(
        "model:\n"
        "  embed_dim: 16\n"
        "  image: {image_size: 16, patch_size: 8, width: 16, depth: 1, num_heads: 2, mlp_dim: 32}\n"
        "  text: {context_length: 8, width: 16, depth: 1, num_heads: 2, mlp_dim: 32}\n"
        "data: {train: 'digits:train=2,digits:test=1', vocab_size: 300, window: 100}\n"
        "train: {samples: 36, global_batch_size: 12}\n"
    )
    pretrain_here("--config", config, "--run_folder", run)
    assert "3 steps of 12 samples" in capsys.readouterr().err
    before = (run / "metrics.jsonl").read_bytes()
    for flags, words in (
        (
            ("--data.train", "digits:train=1,digits:test=1"),
            "weights is [1, 1] but the checkpoint was made with weights",
        ),
        (("--data.window", "90"), "window is [90, 90] but the checkpoint was made with window [100, 100]"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            pretrain_here("--run_folder", run, "--resume", "--train.samples", "60", *flags)
    assert (run / "metrics.jsonl").read_bytes() == before
    capsys.readouterr()
    pretrain_here("--run_folder", run, "--resume", "--train.samples", "60")
    told = capsys.readouterr().err
    assert "resuming" in told and "5 steps of 12 samples" in told


def test_row_18_seeking_in_400_million_samples():
    """Step 1,000,000 of 40,000 shards costs what step 10 costs, a fraction of a second, and 100 MB at most."""
    sizes = np.random.default_rng(0).integers(9_900, 10_101, 40_000)
    total = int(sizes.sum())

    def seconds(step):
        begun = time.perf_counter()
        order = ShardedOrder(total, 4096, 1, sizes)
        built = time.perf_counter()
        batch_indices(order, step)
        return built - begun, time.perf_counter() - begun, order

    tracemalloc.start()
    _, _, order = seconds(1_000_000)
    for step in range(1_000_001, 1_000_300, 30):  # past the ends of windows
        batch_indices(order, step)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * 2**20
    tried = {step: [seconds(step)[:2] for _ in range(5)] for step in (10, 1_000_000)}
    near, far = (np.min(tried[step], axis=0) for step in (10, 1_000_000))
    assert far[0] < 0.2 and far[1] < 2 * near[1] + 0.05 and far[1] < 1
    begun = time.perf_counter()
    for step in range(1_000_300, 1_000_340):
        batch_indices(order, step)
    assert (time.perf_counter() - begun) / 40 < 0.02
