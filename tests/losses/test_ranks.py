"""Loss and every parameter's gradient on several gloo ranks equal one process with the whole batch."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from rank_processes import run_on_ranks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from contrastive.distributed import collectives
from contrastive.distributed.collectives import all_gather_rows
from contrastive.losses import LOSSES, SigmoidLoss, all_pairs
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


CASES = [
    ("sigmoid", "negative"),
    ("sigmoid", "ignore"),
    ("sigmoid", "positive"),
    ("softmax", "negative"),
    ("softmax", "ignore"),
    ("softmax", "positive"),
]
EXCHANGES = {"ring": collectives.RingBlocks, "gather": collectives.GatheredBlocks}


def join(rank, world_size, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)


def run_rank(rank, world_size, folder):
    torch.set_num_threads(1)
    join(rank, world_size, folder)
    all_pairs.CPU_TILE = 5  # tiles that end inside a rank's rows, and inside a gathered block
    results = {}
    for exchange, kind in EXCHANGES.items():
        all_pairs.every_block = kind
        for case in CASES:
            results[exchange, *case] = loss_and_gradients(*case, rank, world_size)
    uneven = all_gather_rows(torch.full((rank + 1, 2), float(rank)))
    torch.save((results, uneven), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_equal_to_one_process(world_size, tmp_path):
    run_on_ranks(world_size, run_rank, world_size, str(tmp_path))
    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in range(world_size)]
    for case in CASES:
        expected_loss, expected = loss_and_gradients(*case, 0, 1)
        for exchange in EXCHANGES:
            key = (exchange, *case)
            losses = torch.stack([results[key][0] for results, _ in ranks])
            torch.testing.assert_close(losses.mean(), expected_loss, rtol=1e-10, atol=0)
            for results, _ in ranks:
                assert results[key][1].keys() == expected.keys()
                for name, gradient in results[key][1].items():
                    torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-12, msg=f"{key} {name}")
    expected_rows = [r for r in range(world_size) for _ in range(r + 1)]
    assert all(uneven[:, 0].tolist() == expected_rows for _, uneven in ranks)


def test_the_exchange_suits_the_link(monkeypatch):
    assert isinstance(collectives.every_block(torch.ones(2, 3)), collectives.GatheredBlocks), "nothing to exchange"
    monkeypatch.setattr(collectives, "world_size", lambda: 4)
    assert isinstance(collectives.every_block(torch.ones(2, 3)), collectives.RingBlocks), "gloo"
    monkeypatch.setattr(collectives, "over_nccl", lambda tensor: tensor.is_cuda)
    with FakeTensorMode():  # stands for a GPU: only the size and the device are looked at
        assert isinstance(collectives.every_block(torch.ones(8192, 512, device="cuda")), collectives.GatheredBlocks)
        assert isinstance(collectives.every_block(torch.ones(2**17, 768, device="cuda")), collectives.RingBlocks)


def ask(rank, loss, image, text, **changed):
    """Call a loss on all ranks; return what it says to this one."""
    arguments = {"logit_scale": torch.tensor(1.0), "logit_bias": torch.tensor(0.0), **changed}
    try:
        return f"fine: {loss(image, text, **arguments).item():.3f}"
    except ValueError as error:
        return f"{type(error).__name__}: {error}"


def run_bad_rank(rank, world_size, folder):
    torch.set_num_threads(1)
    join(rank, world_size, folder)
    loss, x = SigmoidLoss(), torch.eye(3)
    broken = x.clone()
    broken[1, 1] = torch.nan
    answers = [
        ask(rank, loss, *((x[:2], x[:2]) if rank == 2 else (x, x))),
        ask(rank, loss, broken if rank == 1 else x, x),
        ask(rank, loss, x, x.long() if rank == 0 else x),
        ask(rank, loss, *((x.double(), x.double()) if rank == 1 else (x, x))),
        ask(rank, loss, x.clone().requires_grad_(rank == 1), x),
        ask(rank, loss, x, x, logit_scale=torch.tensor(torch.inf if rank == 2 else 1.0)),
        ask(rank, SigmoidLoss("ignore"), x, x, caption_ids=None if rank == 0 else torch.arange(3)),
        ask(rank, loss, x, x),
        ask(rank, loss, x, x, logit_scale="ten" if rank == 1 else 1.0),
        ask(rank, loss, x, x, logit_scale=1, logit_bias=0.0),
    ]
    torch.save(answers, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_what_one_rank_is_given_wrongly_all_ranks_refuse(tmp_path):
    """Fault row 30: none waits in a collective for one that has raised, and the next call works."""
    run_on_ranks(3, run_bad_rank, 3, str(tmp_path))
    answers = [torch.load(tmp_path / f"rank{r}.pt") for r in range(3)]
    uneven, broken, integers, double, gradients, scale, ids, good, words, numbers = zip(*answers, strict=True)
    assert len(set(uneven)) == 1
    assert "rank 2 differ" in uneven[0] and "rank 0 (3, 3)" in uneven[0] and "rank 2 (2, 3)" in uneven[0]
    assert all(answer.startswith("NonFiniteFeatures") and "rank 1" in answer for answer in broken)
    assert "image_features on rank 1 has 1 of 9 values" in broken[1] and "image_features on rank 1" in broken[0]
    assert "torch.int64" in integers[0] and "rank 0 refused" in integers[1] and "rank 0 refused" in integers[2]
    assert all("rank 1 differ" in answer and "64 bit" in answer for answer in double)
    assert all("need of gradients" in answer for answer in gradients)
    assert all("logit_scale on rank 2" in answer for answer in scale)
    assert "needs caption_ids" in ids[0] and "rank 0 refused" in ids[1]
    assert all(answer.startswith("fine") for answer in good) and numbers == good
    assert (
        "logit_scale must be one number" in words[1] and "rank 1 refused" in words[0] and "rank 1 refused" in words[2]
    )


def fails(rank):
    if rank == 1:
        raise FileNotFoundError(2, "no such file", "gone")


def run_failing_rank(rank, world_size, folder):
    join(rank, world_size, folder)
    with pytest.raises(FileNotFoundError, match="no such file: 'gone'") as caught:
        collectives.together(lambda: fails(rank))
    assert any(entry.name == "fails" for entry in caught.traceback) == (rank == 1), "where it failed is lost"
    dist.destroy_process_group()


def test_what_fails_on_one_rank_fails_on_all_and_says_there_where(tmp_path):
    run_on_ranks(2, run_failing_rank, 2, str(tmp_path))
