"""FSDP2 over gloo: the losses and weights of one process, whatever the number of ranks that saved and went on."""

import shutil
from pathlib import Path

import pytest
import torch
from evaluate.small_model import save_small_model
from launching import rows
from rank_processes import script_on_ranks
from safetensors.torch import load_file

import contrastive
from contrastive.data.sources import open_source
from contrastive.evaluate.classification import zero_shot

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/pretrain.py"
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
TOGETHER = (
    *("--optimizer", "muon", "--train.ema_decay", "0.5", "--train.accumulate", "2", "--train.max_grad_norm", "0.1"),
    *("--train.gradient_checkpointing", "0.5", "--evaluation.every", "6", "--checkpoint.every", "3"),
    *("--health.norms_every", "3", "--train.log_every", "1", "--train.steps", "6", "--model.image.dropout", "0"),
)
SIGMOID = ("--loss", "sigmoid", "--loss.duplicates", "positive", *TOGETHER)
CLASSIFIER = """
model: {image: {image_size: 16, width: 16, depth: 2, num_heads: 2, mlp_dim: 32, dropout: 0.1}}
patch_size: 8
data: {train: digits}
train: {steps: 6, global_batch_size: 16, accumulate: 2}
evaluation: {every: 6, limit: 40}
"""

TRACED = """
import torch
compile_ = torch.compile
torch.compile = lambda function, **_: compile_(function, backend="aot_eager")
from contrastive.entry import run_script
from contrastive.commands.pretrain_command import main
run_script("pretrain.py", main)
"""


@pytest.fixture
def trained(tiny, tmp_path, free_port):
    def run(ranks, name, *flags, script=SCRIPT, port=[free_port], **environment):  # noqa: B006 - a port for each
        port[0] += 1
        folder = tmp_path / name
        status, told = script_on_ranks(
            ranks,
            port[0],
            script,
            *flags,
            "--run_folder",
            folder,
            folder=tmp_path / f"told-{folder.name}",
            **environment,
        )
        assert set(status) == {0}, told
        return folder

    return run


@pytest.fixture(scope="module")
def kept(tiny_text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    (folder / "tiny.yaml").write_text(tiny_text)
    return folder


@pytest.fixture
def sigmoid_run(kept, trained):
    """A run that several tests compare with, on 1 rank, "plain" ones or so many sharded ones: for all of them once."""

    def run(on):
        folder = kept / f"{on}"
        if not folder.exists():
            ranks, environment = on_ranks(on)
            trained(ranks, folder, "--config", kept / "tiny.yaml", *SIGMOID, **environment)
        return folder

    return run


def on_ranks(on):
    return (2, {}) if on == "plain" else (on, FSDP if on > 1 else {})


def assert_alike(run, reference):
    for ours, theirs in zip(rows(run), rows(reference), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        for name in {key for row in (ours, theirs) for key in row if "/" in key}:  # norms by block
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
        assert ours["logit_scale"] == pytest.approx(theirs["logit_scale"], rel=1e-6)
    assert len(rows(run)) == 6
    ours, theirs = (load_file(folder / "final/model.safetensors") for folder in (run, reference))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # Sums of gradients in another order, and Muon's rounds make them grow.
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize(
    "duplicates",
    [None, "ignore", pytest.param("positive", marks=pytest.mark.slow)],
    ids=["sigmoid", "ignore", "positive"],
)
def test_losses_and_weights_are_those_of_one_process_and_of_plain_ranks(duplicates, tiny, trained, sigmoid_run):
    """With softmax and this choice of duplicates, or with sigmoid."""
    if duplicates is None:
        one, plain, sharded = map(sigmoid_run, (1, "plain", 4))
    else:
        flags = ("--config", tiny, "--loss", "softmax", "--loss.duplicates", duplicates, *TOGETHER)
        one, plain, sharded = (
            trained(n, name, *flags, **on) for n, name, on in ((1, "one", {}), (2, "plain", {}), (2, "sharded", FSDP))
        )
    assert_alike(plain, one)
    assert_alike(sharded, one)
    assert rows(sharded, "eval")[-1] == pytest.approx(rows(one, "eval")[-1], abs=2.6)  # one image of 40
    bundle = contrastive.load(sharded)  # an ordinary model folder
    assert zero_shot(bundle, open_source("digits:test"), device="cpu", limit=40)["acc1"] == pytest.approx(
        rows(sharded, "eval")[-1]["zero_shot/digits:test/acc1"]
    )


@pytest.mark.parametrize(("saved_by", "resumed_by"), [(4, 2), (2, 4), (2, "plain"), ("plain", 2), (2, 1)])
def test_any_number_of_ranks_goes_on(saved_by, resumed_by, trained, sigmoid_run, tmp_path):
    run = shutil.copytree(sigmoid_run(saved_by), tmp_path / "run")
    for later in ("checkpoints/step-00000006", "final", "report.html"):
        path = run / later
        path.rename(path.with_name(f"old-{path.name}"))
    saved = run / "checkpoints/step-00000003"
    assert (saved / "optimizer").exists() == (saved_by != "plain")
    ranks, environment = on_ranks(resumed_by)
    trained(ranks, "run", "--resume", **environment)
    assert_alike(run, sigmoid_run(1))


def test_images_of_any_shape(tiny, trained):
    """Each rank's batch has a length of its own, and each step its number of patches."""
    # The tokenizer of the captions of scenes:wide takes ten times as long as the steps.
    wide = ("--data.train", "scenes:wide-val", "--data.eval", "scenes:wide-val", "--data.native.patches", "8", "12")
    flags = ("--config", tiny, "--model.image.native", *wide, *TOGETHER)
    one = trained(1, "one", *flags)
    assert_alike(trained(2, "plain", *flags), one)
    assert_alike(trained(2, "sharded", *flags, **FSDP), one)


BESIDE = """
objectives:
  caption: {width: 16, num_heads: 2, mlp_dim: 16, depth: 2}
  self_distill: {start: 0.5, crops: 2, crop_size: 8, prototypes: 16, hidden: 16, bottleneck: 8, balance: sinkhorn}
  masked: {start: 0.3, share: 0.4, prototypes: 16, hidden: 16, bottleneck: 8, keep: true}
  patch_distill: {start: 0.4, prototypes: 16, hidden: 16, bottleneck: 8}
  patch_mean: {start: 0.4}
  distill: {teacher: [TEACHER], feature_weight: 0.5, project: true}
"""


def test_objectives_that_begin_on_the_way(tiny, trained):
    """Teachers, one of them sharded as the student is; heads that wait; another number of ranks that goes on."""
    with tiny.open("a") as file:
        file.write(BESIDE.replace("TEACHER", str(save_small_model(tiny.parent / "teacher"))))
    flags = ("--config", tiny, *TOGETHER)
    one = trained(1, "one", *flags)
    sharded = trained(2, "sharded", *flags, **FSDP)
    assert_alike(trained(2, "plain", *flags), one)
    assert_alike(sharded, one)
    for ours, theirs in zip(rows(sharded), rows(one), strict=True):
        names = {name for name in theirs if name.endswith("_loss")}
        assert len(names) == (3 if theirs["step"] < 3 else 4 if theirs["step"] < 4 else 7)
        assert all(ours[name] == pytest.approx(theirs[name], rel=1e-5) for name in names)
    for name in ("checkpoints/step-00000006", "final", "report.html"):
        (sharded / name).rename(sharded / f"old-{Path(name).name}")
    assert_alike(trained(1, "sharded", "--resume"), one)
    ours, theirs = (load_file(run / "checkpoints/step-00000006/objectives/ema.safetensors") for run in (sharded, one))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-4, msg=name)
    assert not any("self_distill" in name for name in load_file(sharded / "final/objectives/model.safetensors"))


def assert_same_losses(run, reference, rel):
    ours, theirs = ([row["loss"] for row in rows(folder)] for folder in (run, reference))
    assert ours == pytest.approx(theirs, rel=rel) and len(set(ours)) > 1


@pytest.mark.parametrize("flags", [(), ("--train.accumulate", "2", "--train.gradient_checkpointing", "1")])
def test_bf16_is_near_to_plain_ranks_in_bf16(flags, tiny, trained):
    flags = ("--config", tiny, "--train.precision", "bf16", *flags)
    sharded = trained(2, "sharded", *flags, **FSDP)
    # Weights are rounded before they are gathered, and what the blocks add up is bf16 too: both are as near to fp32.
    assert_same_losses(sharded, trained(2, "plain", *flags), rel=2e-2)
    assert {tensor.dtype for tensor in load_file(sharded / "final/model.safetensors").values()} == {torch.float32}


def test_compiled(tiny, tmp_path, trained):
    """As far as torch's own operators go: generating code takes a minute a rank."""
    traced = tmp_path / "traced.py"
    traced.write_text(TRACED)
    flags = ("--config", tiny, "--train.steps", "3", "--evaluation.every", "3")
    compiled = trained(2, "compiled", *flags, "--train.compile", "on", script=traced, **FSDP)
    assert_same_losses(compiled, trained(2, "plain", *flags), rel=1e-5)


def test_a_step_that_is_not_finite_is_skipped_by_all(tiny, trained):
    flags = ("--config", tiny, "--loss", "faulty", "--optimizer", "muon", "--train.ema_decay", "0.5")
    faulty = {"script": ROOT / "tests/faults/faulty.py", "FAULT": "nan,1,4,1"}
    sharded, plain = trained(2, "sharded", *flags, **faulty, **FSDP), trained(2, "plain", *flags, **faulty)
    ours, theirs = ([row["loss"] for row in rows(folder)] for folder in (sharded, plain))
    assert ours == pytest.approx(theirs, rel=1e-5, nan_ok=True)
    assert [step for step, loss in enumerate(ours, 1) if loss != loss] == [4] and len(ours) == 8


def test_a_classifier(tmp_path, trained):
    script = ROOT / "scripts/train_classifier.py"
    config = tmp_path / "classifier.yaml"
    config.write_text(CLASSIFIER)
    plain = trained(2, "plain", "--config", config, script=script)
    sharded = trained(2, "sharded", "--config", config, script=script, **FSDP)
    assert_same_losses(sharded, plain, rel=1e-5)
    assert rows(sharded, "eval")[-1] == pytest.approx(rows(plain, "eval")[-1], abs=2.6)
    assert contrastive.load(sharded).class_names == contrastive.load(plain).class_names


def test_a_locked_image_tower(tiny, trained, sigmoid_run):
    first = sigmoid_run(1)
    flags = ("--config", tiny, "--lock", "image", "--init_image", first)
    sharded = trained(2, "sharded", *flags, **FSDP)
    assert_same_losses(sharded, trained(2, "plain", *flags), rel=1e-5)
    ours, theirs = (load_file(folder / "final/model.safetensors") for folder in (sharded, first))
    same = {name for name in theirs if torch.equal(ours[name], theirs[name])}
    assert same == {name for name in theirs if name.startswith("image_tower.")}
