"""Norms by block: in the rows that were asked for, of the right numbers, and nothing is kept elsewhere."""

import math

import pytest
import torch
from launching import pretrain_here, rows

from contrastive.errors import UserError
from contrastive.models.packing import Segments
from contrastive.models.transformer import Transformer, TransformerConfig
from contrastive.train.health import HealthConfig
from contrastive.train.options import RunConfig, TrainConfig, check_run

KEYS = ("grad_norm/", "output_rms/")


def norms(row):
    return {key: value for key, value in row.items() if key.startswith(KEYS)}


@pytest.mark.parametrize("flags", [(), ("--train.accumulate", "2", "--train.gradient_checkpointing", "1")])
def test_the_rows_that_were_asked_for_have_them(flags, tiny, tmp_path):
    run, same = tmp_path / "run", ("--config", tiny, "--train.max_grad_norm", "0.01", *flags)
    pretrain_here(*same, "--run_folder", tmp_path / "plain")
    pretrain_here(*same, "--run_folder", run, "--health.norms_every", "2")
    plain = rows(tmp_path / "plain")
    assert not any(map(norms, plain)) and [row["loss"] for row in plain] == [row["loss"] for row in rows(run)]
    assert [bool(norms(row)) for row in rows(run)] == [row["step"] % 2 == 0 for row in rows(run)]
    for row in filter(norms, rows(run)):
        parts = [value for key, value in row.items() if key.startswith("grad_norm/")]
        assert math.sqrt(sum(value**2 for value in parts)) == pytest.approx(row["grad_norm"], rel=1e-5)
        assert row["grad_norm/image_tower.blocks.0"] > 0 and row["grad_norm/text_tower.blocks.0"] > 0
        assert 0 < row["output_rms/image_tower.blocks.0"] < 100 and row["output_rms/text_tower.blocks.0"] > 0


def test_outputs_are_those_of_the_blocks():
    torch.manual_seed(0)
    transformer = Transformer(TransformerConfig(width=8, depth=3, num_heads=2, mlp_dim=16))
    x = torch.randn(2, 5, 8)
    transformer(x)
    assert transformer.mean_squares is None
    transformer.mean_squares = []
    transformer(x)
    expected = [transformer.states(x, {number})[number].square().mean() for number in (1, 2, 3)]
    assert torch.equal(torch.stack([mean for mean, _ in transformer.mean_squares]), torch.stack(expected))
    assert [count for _, count in transformer.mean_squares] == [10] * 3
    # Of packed tokens without the fillers before them.
    lengths = torch.tensor([3, 9, 5] * 4 + [2])
    segments, *_ = Segments.of(lengths, longest=9)
    x, transformer.mean_squares = torch.randn(int(segments.boundaries[-1]), 8), []
    transformer(x, segments)
    own = transformer.states(x, {1}, segments)[1][-70:]
    assert segments.fillers > 0 and torch.equal(transformer.mean_squares[0][0], own.square().mean())
    assert transformer.mean_squares[0][1] == 70


def test_rows_that_are_not_written_cannot_show_them():
    config = RunConfig(train=TrainConfig(steps=9, log_every=2), health=HealthConfig(norms_every=5))
    with pytest.raises(UserError, match="health.norms_every 5 is no multiple of train.log_every 2"):
        check_run(config)
