"""Objectives beside the contrastive loss: exact under ranks, micro-batches and resume, absent when off."""

import json
import os
import shutil

import pytest
import torch
import yaml
from objectives.toy import Toy, ToyConfig
from rank_processes import joined, run_on_ranks, script_on_ranks
from safetensors.torch import load_file

from contrastive.data.preprocess import Preprocess, PreprocessConfig
from contrastive.distributed.runtime import Runtime
from contrastive.errors import UserError
from contrastive.log import read_metrics
from contrastive.losses import SigmoidLoss
from contrastive.losses.reference import pair_labels, sigmoid_loss
from contrastive.models import ImageTowerConfig, ModelConfig, TextTowerConfig
from contrastive.models.encoders import unit_length
from contrastive.objectives import Setting
from contrastive.objectives.learner import Learner
from contrastive.train.gradient import Batch, forward_backward
from contrastive.train.pretrain import PretrainConfig, pretrain
from contrastive.train.run import command

CONFIG = ModelConfig(
    embed_dim=16,
    image=ImageTowerConfig(image_size=16, patch_size=4, width=16, depth=2, num_heads=2, mlp_dim=32),
    text=TextTowerConfig(vocab_size=20, context_length=6, width=16, depth=1, num_heads=2, mlp_dim=32),
    init_logit_scale=10.0,
    init_logit_bias=-3.0,
)
B = 24
BESIDE = ["--train.accumulate", "2", "--train.ema_decay", "0.9", "--checkpoint.keep", "9"]
PARTS = ("head.weight", "head.bias", "colour.weight", "colour.bias", "updates")


def learner(start=0.0):
    torch.manual_seed(0)
    model = Learner(CONFIG)
    setting = Setting("toy", CONFIG, None, None, Preprocess(PreprocessConfig(image_size=16)), 10, (16,))
    model.objectives["toy"] = ToyConfig(start=start).build(setting)
    return model.double()


def data():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(B, 3, 16, 16, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 20, (B, 6), generator=generator)
    views = torch.randint(0, 256, (B, 1, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return pixels, tokens, {"weight": torch.rand(B, generator=generator, dtype=torch.float64), "views": views}


def gradients(accumulate, runtime, rank=0, world_size=1, active=True):
    model = learner()
    wrapped = runtime.wrap(model)
    pixels, tokens, inputs = data()
    pixels, tokens = pixels.chunk(world_size)[rank], tokens.chunk(world_size)[rank]
    inputs = {name: value.chunk(world_size)[rank] for name, value in inputs.items()}
    objectives = model.active(0) if active else {}
    batch = Batch(pixels, tokens.chunk(accumulate), tokens[:, 0], {"toy": inputs} if active else {})
    how = {"objectives": objectives, "seed": (0, 5), "runtime": runtime}
    losses = forward_backward(wrapped, SigmoidLoss(), batch, **how)
    return losses, {name: p.grad for name, p in model.named_parameters()}


def reference(model):
    """The same as formulas on the whole batch."""
    toy, (pixels, tokens, inputs) = model.objectives["toy"], data()
    image, text = model.encode_image(pixels), model.encode_text(tokens)
    scale, bias = model.logit_scale.exp(), model.logit_bias
    labels = pair_labels(tokens[:, 0], "negative")
    contrastive = sigmoid_loss(image, text, scale, bias, *labels)
    second = unit_length(toy.head(model.encode_image(toy.normalize(inputs["views"][:, 0]).double())))
    colour = pixels.mean(dim=(2, 3))
    others = (colour.sum(0) - colour) / (B - 1)
    told = toy.colour(model.image_tower.forward_features(pixels)).mean(dim=1)
    own = sigmoid_loss(image, second, scale, bias, *labels)
    own = own + (inputs["weight"][:, None] * (told - others) ** 2).mean()
    return {"loss": contrastive + 0.5 * own, "contrastive_loss": contrastive, "toy_loss": own}


def check(losses, grads):
    model = learner()
    wanted = reference(model)
    for name, value in wanted.items():
        torch.testing.assert_close(losses[name], value.detach(), rtol=1e-10, atol=0)
    expected = torch.autograd.grad(wanted["loss"], list(model.parameters()))
    for (name, grad), want in zip(grads.items(), expected, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-8, atol=1e-12, msg=name)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_all_hooks_equal_the_formula(accumulate):
    check(*gradients(accumulate, Runtime("fp32")))


def test_random_parts_are_replayed_beside_losses_that_draw(monkeypatch):
    """Features of the pass without gradients and of that with are the same, whatever a loss draws between them."""
    runtime, seen = Runtime("fp32"), {True: [], False: []}
    monkeypatch.setattr(
        Toy, "loss", lambda one, part, inputs, targets: (one.colour(part.patches) * torch.rand(())).mean()
    )
    model = learner()
    for tower in (model.image_tower, model.text_tower):
        for part in tower.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.3
    forward = model.forward

    def watched(*args):
        outputs = forward(*args)
        if len(args) == 4:
            seen[torch.is_grad_enabled()].append(outputs.features.text.detach().clone())
        return outputs

    model.forward = watched
    pixels, tokens, inputs = data()
    batch = Batch(pixels, tokens.chunk(3), tokens[:, 0], {"toy": inputs})
    forward_backward(model, SigmoidLoss(), batch, objectives=model.active(0), seed=(0, 5), runtime=runtime)
    assert len(seen[True]) == 3 and all(map(torch.equal, seen[True], seen[False]))


def run_rank(rank, world_size, port, folder):
    runtime = joined(rank, world_size, port)
    results = [gradients(k, runtime, rank, world_size) for k in (1, 2)]
    results += [gradients(k, runtime, rank, world_size, active=False) for k in (1, 2)]
    torch.save(results, f"{folder}/rank{rank}.pt")
    runtime.close()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_equal_the_formula(ranks, tmp_path, free_port):
    run_on_ranks(ranks, run_rank, ranks, free_port, str(tmp_path))
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(ranks)]
    for case in (0, 1):
        losses = {name: sum(r[case][0][name] for r in results) / ranks for name in results[0][case][0]}
        check(losses, results[0][case][1])
    for case in (2, 3):  # not begun: DDP gets its zeros
        losses, grads = results[0][case]
        assert list(losses) == ["loss", "contrastive_loss"]
        assert all(not grad.any() for name, grad in grads.items() if name.startswith("objectives."))


def train(folder, file, *words):
    words = ["--config", str(file), "--run_folder", str(folder), *map(str, words)]
    command(PretrainConfig, pretrain, words, name="t", doc="", default_recipe=str(file), shown="")


def rows(folder, kind="train"):
    timed = ("samples_per_second", "data_wait")
    found = [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == kind]
    return [{name: value for name, value in row.items() if name not in timed} for row in found]


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory, tiny_text):
    """A run whose objective begins half way, in micro-batches, with averaged weights."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "tiny.yaml").write_text(tiny_text + "objectives: {toy: {start: 0.5}}\n")
    train(folder / "run", folder / "tiny.yaml", *BESIDE)
    return folder / "run"


def test_what_a_run_tells_and_keeps(toy_run):
    told = rows(toy_run)
    assert ["toy_loss" in row for row in told] == [False] * 4 + [True] * 4
    for row in told[4:]:
        assert row["loss"] == pytest.approx(row["contrastive_loss"] + 0.5 * row["toy_loss"], rel=1e-5)
    assert yaml.safe_load((toy_run / "config.yaml").read_text())["objectives"]["toy"]["start"] == 0.5
    checkpoint = toy_run / "checkpoints/step-00000008"
    beside = load_file(checkpoint / "objectives/model.safetensors")
    assert set(beside) == {f"objectives.toy.{name}" for name in PARTS}
    assert beside["objectives.toy.updates"] == 100 + 4
    assert not any(name.startswith("objectives.") for name in load_file(checkpoint / "model.safetensors"))
    assert set(load_file(checkpoint / "objectives/ema.safetensors")) == set(beside) - {"objectives.toy.updates"}
    assert not (toy_run / "final/objectives").exists()
    report = (toy_run / "report.html").read_text()
    assert "parts of the loss" in report and "</i>toy <b" in report


def test_modules_wait_untouched_until_they_begin(toy_run):
    second, fourth, last = (
        load_file(toy_run / f"checkpoints/step-{step:08d}/objectives/model.safetensors")["objectives.toy.head.weight"]
        for step in (2, 4, 8)
    )
    assert torch.equal(second, fourth) and not torch.equal(fourth, last)
    optimizer = load_file(toy_run / "checkpoints/step-00000004/optimizer.safetensors")
    assert not any("objectives." in name for name in optimizer)


@pytest.mark.parametrize("step", [4, 6])
def test_resume_is_exact_before_and_after_the_begin(step, toy_run, tmp_path):
    shutil.copytree(toy_run, tmp_path / "run")
    for folder in (tmp_path / "run/checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "run/final")
    train(tmp_path / "run", toy_run.parent / "tiny.yaml", "--resume")
    assert rows(tmp_path / "run") == rows(toy_run)
    for name in ("model", "objectives/model", "objectives/ema", "ema", "optimizer"):
        file = f"checkpoints/step-00000008/{name}.safetensors"
        ours, theirs = load_file(tmp_path / "run" / file), load_file(toy_run / file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name


def test_until_it_begins_a_run_is_as_without_it(toy_run, tiny, tmp_path):
    train(tmp_path / "run", tiny, *BESIDE)
    with_it, without = rows(toy_run)[:4], rows(tmp_path / "run")[:4]
    assert [{**row, "contrastive_loss": row["loss"]} for row in without] == with_it
    file = "checkpoints/step-00000004/model.safetensors"
    then, plain = load_file(toy_run / file), load_file(tmp_path / "run" / file)
    assert all(torch.equal(then[name], plain[name]) for name in plain)
    assert not (tmp_path / "run/checkpoints/step-00000004/objectives").exists()


def test_modules_are_kept_where_asked(tiny, tmp_path):
    words = "--objectives toy --objectives.toy.keep --train.steps 2 --train.ema_decay 0.5"
    train(tmp_path / "run", tiny, *words.split())
    kept = load_file(tmp_path / "run/final/objectives/model.safetensors")
    averaged = load_file(tmp_path / "run/checkpoints/step-00000002/objectives/ema.safetensors")
    assert torch.equal(kept["objectives.toy.head.weight"], averaged["objectives.toy.head.weight"])
    assert json.loads((tmp_path / "run/final/objectives/config.json").read_text())["toy"]["weight"] == 0.5


def test_three_ranks_go_on_exactly_where_it_begins(tiny, tmp_path, free_port):
    """To the bit, as DDP would lay gradients out by the pass that it sees first."""
    script = tmp_path / "train_toy.py"
    tests = os.path.dirname(os.path.dirname(__file__))
    script.write_text(f"import sys; sys.path[:0] = [{tests!r}, {os.path.dirname(tests)!r}]\n")
    with script.open("a") as file:
        file.write(
            "import objectives.toy\nfrom contrastive.commands.pretrain_command import main\nmain(sys.argv[1:])\n"
        )
    words = ["--config", tiny, "--objectives", "toy", "--objectives.toy.start", 0.4, "--train.global_batch_size", 12]
    words += ["--data.eval", "digits:test", "--checkpoint.keep", 9]
    for name in ("whole", "cut"):
        if name == "cut":
            shutil.copytree(tmp_path / "whole", tmp_path / "cut")
            for step in (6, 8):
                shutil.rmtree(tmp_path / f"cut/checkpoints/step-{step:08d}")
            shutil.rmtree(tmp_path / "cut/final")
            words.append("--resume")
        folder = tmp_path / f"of_{name}"
        statuses, said = script_on_ranks(3, free_port, script, *words, "--run_folder", tmp_path / name, folder=folder)
        assert statuses == [0, 0, 0], said
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    last = (load_file(tmp_path / f"{name}/checkpoints/step-00000008/model.safetensors") for name in ("whole", "cut"))
    whole, cut = last
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--objectives toyy", "unknown objective 'toyy'. Did you mean 'toy'?"),
        ("--objectives", "--objectives needs a name"),
        (
            "--objectives toy --objectives.toy.start 1.5",
            "objectives.toy.start is 1.5; it must be at least 0 and below 1",
        ),
        ("--objectives toy --objectives.toy.start 0.99", "objectives.toy.start 0.99 of 8 steps is after the last one"),
        (
            "--objectives self_distill --objectives.self_distill.augment.rand_augment_magnitude 3",
            "objectives.self_distill.augment.rand_augment_magnitude has no effect",
        ),
        ("--objectives toy --objectives.toy.wait 1", "unknown flag --objectives.toy.wait"),
        (
            "--objectives.toy.weight 1",
            "toy.weight is of an objective that was not chosen: --objectives toy",
        ),
    ],
)
def test_wrong_options_are_one_line(words, said, tiny, tmp_path):
    with pytest.raises(UserError) as error:
        train(tmp_path / "run", tiny, *words.split())
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_its_objectives(toy_run, tmp_path):
    shutil.copytree(toy_run, tmp_path / "run")
    for words in (["--objectives", "none"], ["--objectives.toy.weight", "2"]):
        with pytest.raises(UserError, match="a resumed run keeps its objectives"):
            train(tmp_path / "run", toy_run.parent / "tiny.yaml", "--resume", *words)
