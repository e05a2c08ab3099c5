"""benchmarks/scaling.py at a tiny size, and what contrastive/train/counting.py computes for other machines."""

import json

import pytest
import torch
from launching import ROOT

from contrastive.errors import UserError
from contrastive.models import DualEncoder, ImageTowerConfig, ModelConfig, TextTowerConfig
from contrastive.optim import AdamWConfig, MuonConfig
from contrastive.train.counting import Exchange, step_traffic

TOWER = {"width": 8, "depth": 1, "num_heads": 2, "mlp_dim": 16}


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scaling

    return scaling


def test_losses_and_bytes_are_what_they_should_be(scaling, tmp_path, capsys):
    small = {"ranks": (2,), "batch": 16, "steps": 1, "accumulate": 2, "results": str(tmp_path / "rows")}
    scaling.main(scaling.Options(losses=("softmax",), optimizers=("muon",), duplicates="ignore", **small))
    one, plain, sharded = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert [(row["ranks"], row["sharded"]) for row in (one, plain, sharded)] == [(1, False), (2, False), (2, True)]
    assert all(row["bytes_agree"] and row["loss_difference"] < 1e-5 for row in (one, plain, sharded))
    assert not any(one["sent"].values()) and plain["sent"]["gradients"] == 4 * plain["parameters"]
    assert sharded["sent"]["weights"] > 2 * sharded["sent"]["gradients"] > 0 < sharded["sent"]["optimizer"]
    assert plain["sent"]["loss"] == sharded["sent"]["loss"] > 0
    assert capsys.readouterr().out.count("equal") == 3


def test_other_losses_or_bytes_are_a_failure(scaling, tmp_path, monkeypatch):
    found = {"losses": [1.0, 2.0], "samples_per_second": 1.0, "sent": {}, "computed": {}}
    options = {"ranks": (2,), "losses": ("sigmoid",), "optimizers": ("adamw",), "results": str(tmp_path / "rows")}
    for wrong in ({"losses": [1.0, 2.0001]}, {"computed": {"loss": 1.0}}):
        answer = lambda case, wrong=wrong: found | (wrong if case.sharded else {}) | case.__dict__  # noqa: E731
        monkeypatch.setattr(scaling, "_run", answer)
        with pytest.raises(UserError, match="1 cases have other losses than one process, or send other bytes"):
            scaling.main(scaling.Options(**options))
    with pytest.raises(UserError, match="--batch 6 does not divide among 4 ranks"):
        scaling.main(scaling.Options(batch=6))


@pytest.fixture(scope="module")
def model():
    image = ImageTowerConfig(image_size=16, patch_size=8, **TOWER)
    text = TextTowerConfig(vocab_size=20, context_length=6, **TOWER)
    with torch.device("meta"):
        return DualEncoder(ModelConfig(embed_dim=8, image=image, text=text, init_logit_bias=-1.0))


def traffic(model, optimizer=AdamWConfig(), **how):  # noqa: B008 - frozen
    return step_traffic(model, optimizer.build(model), Exchange(world_size=4, embed_dim=8, **how))


def test_of_plain_ranks(model):
    numbers = sum(p.numel() for p in model.parameters())
    assert traffic(model)["gradients"] == 2 * 3 / 4 * 4 * numbers
    gathered, ring = traffic(model, feature_bytes=2), traffic(model, feature_bytes=2, nccl=False)
    assert gathered["loss"] == 3 / 4 * 256 * 8 * (2 + 4)  # features and their gradient
    assert ring["loss"] == 256 * 8 * (3 / 4 * 2 + 4)  # whose sums come home in a step more
    assert traffic(model, num_losses=3)["loss"] == 3 * traffic(model)["loss"]
    large = traffic(model, global_batch_size=2**24)
    assert large["loss"] == 2**24 * 8 * 4 * (3 / 4 + 1)  # too much to gather
    softmax = traffic(model, loss="softmax", duplicates="positive")["loss"] - traffic(model)["loss"]
    assert softmax == 3 / 4 * 256 * (8 * 4 + 4 * 8 + 8)  # a second sweep, four numbers a column, ids
    assert traffic(model, loss=None)["loss"] == 0


def test_of_sharded_ranks(model):
    plain, fp32, bf16 = traffic(model), traffic(model, sharded=True), traffic(model, sharded=True, bf16=True)
    assert fp32["weights"] == 2 * bf16["weights"] and fp32["gradients"] == bf16["gradients"]
    assert plain["gradients"] / 2 <= fp32["gradients"] < 0.6 * plain["gradients"]  # half, and rows that fill up
    assert traffic(model, sharded=True, reshard=False)["weights"] < fp32["weights"]
    assert 2 < traffic(model, sharded=True, accumulate=2)["weights"] / fp32["weights"] < 3
    muon = traffic(model, MuonConfig(), sharded=True)["optimizer"]
    matrices = [p for n, p in model.named_parameters() if "transformer.blocks" in n and p.ndim == 2]
    assert 2 * 3 / 4 / 4 * 4 * sum(p.numel() for p in matrices) <= muon
    assert traffic(model, MuonConfig(), sharded=True, nccl=False)["optimizer"] == 4 * muon
    assert not any(step_traffic(model, [], Exchange(world_size=1, sharded=True)).values())


def test_what_does_not_learn_is_gathered_but_not_summed(model):
    learns = traffic(model, sharded=True)
    model.image_tower.requires_grad_(False)
    locked = traffic(model, sharded=True)
    model.image_tower.requires_grad_(True)
    assert 0 < locked["gradients"] < learns["gradients"] and 0 < locked["weights"] < learns["weights"]
