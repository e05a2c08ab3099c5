"""Loss and every parameter's gradient on several gloo ranks equal one process with the whole batch."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from contrastive.distributed.collectives import all_gather_rows
from contrastive.losses import LOSSES
from contrastive.models import DualEncoder, ImageTowerConfig, ModelConfig, TextTowerConfig

BATCH = 24
CONFIG = ModelConfig(
    embed_dim=16,
    image=ImageTowerConfig(image_size=16, patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=32),
    text=TextTowerConfig(vocab_size=20, context_length=6, width=16, depth=1, num_heads=2, mlp_dim=32),
    init_logit_scale=10.0,
)


def batch():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(BATCH, 3, 16, 16, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 20, (BATCH, 6), generator=generator)
    caption_ids = torch.randint(0, 15, (BATCH,), generator=generator)
    return pixels, tokens, caption_ids


def loss_and_gradients(name, duplicates, rank, world_size):
    torch.manual_seed(0)
    config = replace(CONFIG, init_logit_bias=-3.0 if name == "sigmoid" else None)
    model = DualEncoder(config).double()
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    loss = replace(LOSSES.get(name)(), duplicates=duplicates).build()
    pixels, tokens, caption_ids = (t.chunk(world_size)[rank] for t in batch())
    value = loss(*wrapped(pixels, tokens), caption_ids=caption_ids)
    value.backward()
    return value.detach(), {n: p.grad for n, p in model.named_parameters()}


CASES = [("sigmoid", "negative"), ("sigmoid", "ignore"), ("softmax", "negative"), ("softmax", "positive")]


def run_rank(rank, world_size, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    results = {case: loss_and_gradients(*case, rank, world_size) for case in CASES}
    uneven = all_gather_rows(torch.full((rank + 1, 2), float(rank)))
    torch.save((results, uneven), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_equal_to_one_process(world_size, tmp_path):
    mp.spawn(run_rank, (world_size, str(tmp_path)), nprocs=world_size)
    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in range(world_size)]
    for case in CASES:
        expected_loss, expected = loss_and_gradients(*case, 0, 1)
        losses = torch.stack([results[case][0] for results, _ in ranks])
        torch.testing.assert_close(losses.mean(), expected_loss, rtol=1e-10, atol=0)
        for results, _ in ranks:
            assert results[case][1].keys() == expected.keys()
            for name, gradient in results[case][1].items():
                torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-12, msg=f"{case} {name}")
    expected_rows = [r for r in range(world_size) for _ in range(r + 1)]
    assert all(uneven[:, 0].tolist() == expected_rows for _, uneven in ranks)
