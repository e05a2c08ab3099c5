"""What plan.py says beforehand is what is counted and measured: FLOPs, memory, hours."""

import json
import re
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from contrastive import products
from contrastive.commands.plan_command import main
from contrastive.errors import UserError
from contrastive.models import DualEncoder, ImageTowerConfig, ModelConfig, TextTowerConfig
from contrastive.named_sections import by_name, chosen
from contrastive.objectives import OBJECTIVES
from contrastive.objectives.caption import CaptionConfig
from contrastive.objectives.distill import DistillConfig
from contrastive.objectives.hard_negatives import HardNegativesConfig
from contrastive.objectives.masked import MaskedConfig
from contrastive.objectives.patch_distill import PatchDistillConfig
from contrastive.objectives.patch_mean import PatchMeanConfig
from contrastive.objectives.self_distill import SelfDistillConfig
from contrastive.objectives.slip import SlipConfig
from contrastive.optim import AdamWConfig, MuonConfig
from contrastive.train.counting import count_weights, example_inputs, model_of, one_pass, scalar_of_all
from contrastive.train.options import TrainConfig
from contrastive.train.plan import FLOAT, PlanConfig, fitting_batch, make_plan, rank_memory, stages, suggested, traffic

TINY = ModelConfig(
    embed_dim=32,
    image=ImageTowerConfig(image_size=32, patch_size=8, width=32, depth=3, num_heads=2, mlp_dim=64),
    text=TextTowerConfig(vocab_size=100, context_length=8, width=32, depth=2, num_heads=2, mlp_dim=64),
)
CONFIG = PlanConfig(model=TINY, train=TrainConfig(steps=10, global_batch_size=64))


def recomputing(share):
    return replace(CONFIG, train=replace(CONFIG.train, gradient_checkpointing=share))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_flops_are_those_of_real_tensors(share, monkeypatch):
    monkeypatch.setattr(products, "ONEDNN", False)  # whose operator is not counted
    model = DualEncoder(TINY)
    for tower in (model.image_tower, model.text_tower):
        tower.transformer.gradient_checkpointing = share
    with FlopCounterMode(display=False) as counter:
        features = model(torch.randn(4, 3, 32, 32), torch.ones(4, 8, dtype=torch.int64))
        forward = counter.get_total_flops()
        (features.image.sum() + features.text.sum()).backward()
    seen = one_pass(recomputing(share), 4, 8, bf16=False, keeps=True)
    assert (seen.forward, seen.both) == (forward, counter.get_total_flops())


HEAD = {"prototypes": 16, "hidden": 16, "bottleneck": 8}
BESIDE = {
    "caption": CaptionConfig(start=0.25),
    "self_distill": SelfDistillConfig(crops=2, start=0.75, **HEAD),
    "masked": MaskedConfig(start=0.75, **HEAD),
    "patch_distill": PatchDistillConfig(start=0.75, **HEAD),
    "patch_mean": PatchMeanConfig(start=0.75),
    "slip": SlipConfig(hidden=16, out=8),
    "distill": DistillConfig(teacher=("nowhere",)),
    "hard_negatives": HardNegativesConfig(column="wrong"),
}


def test_objectives_are_counted_with_their_modules_teachers_and_views(monkeypatch):
    monkeypatch.setattr(products, "ONEDNN", False)
    config = replace(CONFIG, objectives=chosen(OBJECTIVES, BESIDE))
    model = model_of(config)
    named = ["caption", "self_distill", "masked", "patch_distill", "patch_mean", "slip"]
    assert list(model.objectives) == named, "what needs data is left out"
    given = torch.randn(4, 3, 32, 32), torch.ones(4, 8, dtype=torch.int64), example_inputs(config, model, 4)
    given[2]["caption"]["weights"].fill_(1 / 8)  # all tokens count
    with FlopCounterMode(display=False) as counter:
        total = scalar_of_all(model, given)
        forward = counter.get_total_flops()
        total.backward()
    seen = one_pass(config, 4, 8, bf16=False, keeps=True)
    assert (seen.forward, seen.both) == (forward, counter.get_total_flops())
    learning = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad and "logit" not in name)
    assert count_weights(config).trainable == sum(p.numel() for p in learning) < count_weights(config).all
    always = {"slip", "distill", "hard_negatives"}
    names = [(share, set(by_name(stage.objectives))) for share, stage in stages(config)]
    assert names == [(0.25, always), (0.5, always | {"caption"}), (0.25, set(BESIDE))]


def test_recomputed_blocks_and_bf16_keep_less():
    kept = [one_pass(recomputing(share), 8, 8, False, keeps=False).activations for share in (0.0, 0.5, 1.0)]
    assert kept[0] > kept[1] > kept[2]
    assert one_pass(CONFIG, 64, 8, True, keeps=False).activations < one_pass(CONFIG, 64, 8, False, False).activations


def test_weights_and_what_is_kept_for_them():
    model = DualEncoder(TINY)
    weights = count_weights(replace(CONFIG, optimizer=AdamWConfig()))
    assert weights.all == weights.trainable == sum(p.numel() for p in model.parameters())
    scalars = FLOAT * len(list(model.parameters()))  # a step each
    assert weights.optimizer == 2 * FLOAT * weights.all + scalars
    assert count_weights(replace(CONFIG, optimizer=MuonConfig())).optimizer < weights.optimizer
    locked = count_weights(replace(CONFIG, lock="image", init_image="x"))
    assert locked.trainable == locked.all - locked.image


def test_fsdp_shares_out_what_ddp_repeats():
    weights = count_weights(CONFIG)
    plain, shared = (rank_memory(CONFIG, weights, 4, 8, 8, False, fsdp) for fsdp in (False, True))
    for part in ("weights", "gradients", "optimizer"):
        assert shared[part] == plain[part] / 4
    average = replace(CONFIG, train=replace(CONFIG.train, ema_decay=0.9))
    assert rank_memory(average, weights, 4, 8, 8, False, True)["averaged weights"] == FLOAT * weights.all / 4


@pytest.mark.parametrize("fsdp", [False, True])
def test_the_largest_micro_batch_fits_and_the_next_does_not(fsdp):
    weights = count_weights(CONFIG)

    def need(pairs):
        return sum(rank_memory(CONFIG, weights, 2, pairs, 8, False, fsdp).values())

    assert fitting_batch(CONFIG, weights, 2, 8, False, fsdp, need(16) + 1) == 16
    assert fitting_batch(CONFIG, weights, 2, 8, False, fsdp, need(16) - 1000) == 8
    assert fitting_batch(CONFIG, weights, 2, 8, False, fsdp, 1e4) == 0


def test_what_is_sent_is_the_gradient_and_what_the_loss_needs():
    captions = replace(CONFIG, data=replace(CONFIG.data, captions_per_image=3), between_captions=1.0)
    once, six = (traffic(config, 4, True, False) for config in (CONFIG, captions))
    assert once["gradients"] == 2 * 3 / 4 * FLOAT * count_weights(CONFIG).all
    assert six["gradients"] == once["gradients"] and six["loss"] == 6 * once["loss"] > 0
    assert not any(traffic(CONFIG, 1, True, False).values())


def test_hours_follow_from_the_rate():
    flat = replace(TINY, image=replace(TINY.image, depth=1), text=replace(TINY.text, depth=1))
    config = replace(CONFIG, model=flat, gpus=(1, 4), gpu="a100", utilisation=0.5)
    plan = make_plan(config)
    rate = 312e12 * 0.5 / plan.flops
    assert [each.samples_per_second for each in plan.forecasts] == pytest.approx([rate, 4 * rate])
    assert plan.forecasts[0].hours == pytest.approx(10 * 64 / rate / 3600)
    config = replace(config, gpus=(1,))
    epochs = replace(config, train=TrainConfig(epochs=2, global_batch_size=64))
    assert make_plan(epochs).forecasts[0].hours is None
    assert make_plan(replace(epochs, num_samples=320)).forecasts[0].hours == pytest.approx(plan.forecasts[0].hours)
    twice = make_plan(replace(config, train=replace(config.train, accumulate=2)))
    assert twice.model_flops == plan.flops < twice.flops < 1.5 * plan.flops


def test_a_larger_batch_takes_the_square_root_of_its_growth():
    config = replace(CONFIG, train=TrainConfig(steps=1000, global_batch_size=256))
    rate, warmup = suggested(config, recipe_batch=64)
    assert rate == pytest.approx(2 * config.optimizer.lr) and warmup == 100
    assert suggested(config, recipe_batch=256)[0] == config.optimizer.lr


def test_the_script_says_it(capsys):
    small = [
        "--model",
        "clip_vit_ti_32",
        "--model.image.depth",
        "1",
        "--model.text.depth",
        "1",
        "--gpus",
        "1",
        "2",
        "--gpu",
        "l4",
        "--tokens",
        "14",
    ]
    main([*small, "--train.global_batch_size", "64", "--optimizer.lr", "1e-3"])
    told = capsys.readouterr().out
    assert "DDP, GiB" in told and "FSDP2, GiB" in told and "hours" in told and "14 tokens each" in told
    assert "learning rate 0.00071, by the square root of the batch from 128" in re.sub(r"\s+", " ", told)
    main([*small, "--train.global_batch_size", "64", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [one["gpus"] for one in found["forecasts"]] == [1, 2] and found["tokens"] == 14


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu", "h1000"], "unknown GPU 'h1000'. Did you mean 'h100'. known are a100-40, "),
        (["--gpus", "3"], "global_batch_size 128 does not divide into 3 ranks"),
        (["--gpus", "0"], "gpus is 0; it must be above 0"),
        (["--tokens", "14", "--model", "siglip_vit_ti_32"], "tokens: this text tower computes its padding"),
        (["--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_bad_input_is_one_line(flags, message):
    with pytest.raises(UserError, match=message):
        main(flags)
