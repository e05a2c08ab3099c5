"""Row 30: ranks whose data do not match are told so before a collective that would hang or abort."""

import time

import pytest
import torch
import torch.distributed as dist
from rank_processes import run_on_ranks

from contrastive.losses import SigmoidLoss, SoftmaxLoss


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rows = torch.eye(4)[: 4 - rank].requires_grad_()  # this rank's last batch is one short
    answers = []
    for loss, *bias in ((SigmoidLoss(), torch.tensor(0.0)), (SoftmaxLoss(),)):
        began = time.monotonic()
        with pytest.raises(ValueError) as caught:
            loss(rows, rows, torch.tensor(1.0), *bias)
        answers.append((str(caught.value), time.monotonic() - began))
    torch.save(answers, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_row_30_an_uneven_batch_is_refused_by_all_ranks(tmp_path):
    run_on_ranks(2, run_rank, str(tmp_path))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for (message, seconds), (other, _) in zip(first, second, strict=True):
        assert message == other and seconds < 5
        assert "rank 1 differ" in message and "rank 0 (4, 4)" in message and "rank 1 (3, 4)" in message
