"""An option that was given counts, or is refused by name: beside --init, on --resume, in a file or by a flag."""

import shutil

import pytest
import torch
import yaml
from launching import pretrain_here, rows
from safetensors.torch import load_file

import contrastive
from contrastive.errors import UserError


@pytest.fixture(scope="module")
def model(tiny_text, tmp_path_factory):
    """A run of eight steps that keeps its checkpoints, and the file that it was started with."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "tiny.yaml").write_text(tiny_text)
    pretrain_here("--config", folder / "tiny.yaml", "--run_folder", folder / "run", "--checkpoint.keep", "9")
    return folder / "run"


@pytest.fixture
def stopped(model, tmp_path):
    """That run as a kill after its fourth step would have left it."""
    run = tmp_path / "run"
    shutil.copytree(model, run)
    shutil.rmtree(run / "final")
    for step in ("06", "08"):
        shutil.rmtree(run / "checkpoints" / f"step-000000{step}")
    return run


def first_command(model, run):
    return ("--config", model.parent / "tiny.yaml", "--run_folder", run, "--checkpoint.keep", "9")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--model.text.context_length", "64"],
            r"--init \S+ brings its own model.text.context_length: .* 64 ",
        ),
        (["--model.image.width", "32"], "its own model.image.width: model.image.width 32 .the model's: 16"),
        (["--model", "clip_vit_b_16"], "its own model.embed_dim: model.embed_dim 512 .the model's: 16"),
        (["--data.tokenizer", "clip"], "its own data.tokenizer: data.tokenizer clip"),
        (["--data.vocab_size", "9000"], "its own data.vocab_size: data.vocab_size 9000 .the model's: 300"),
        (["--data.clean", "clip"], "its own data.clean: data.clean clip .the model's: none"),
        (["--data.preprocess.resize", "crop"], "its own data.preprocess.resize: .* crop .the model's: squash"),
        (["--data.preprocess.mean", "0", "0", "0"], "its own data.preprocess.mean"),
        (
            ["--model.image.image_size", "20"],
            "input size 20×20: 20 is not a multiple of the patch size 8",
        ),
        (["--model.init_logit_scale", "20"], "its own model.init_logit_scale: .* 20.0 .the model's: 10.0"),
    ],
)
def test_init_brings_its_own(args, message, model, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match=message) as error:
        pretrain_here("--init", model, "--run_folder", run, *args)
    assert "\n" not in str(error.value) and not run.exists()


def test_init_image_brings_its_own(model, tmp_path):
    with pytest.raises(UserError, match="--init_image .* brings its own model.image.pool: model.image.pool average"):
        pretrain_here("--init_image", model, "--run_folder", tmp_path / "run", "--model.image.pool", "average")


def test_a_file_with_init_and_another_model_is_refused_as_flags_are(model, tmp_path):
    (tmp_path / "a.yaml").write_text(f"init: {model}\nmodel: {{image: {{depth: 3}}}}\ntrain: {{steps: 1}}")
    with pytest.raises(UserError, match="its own model.image.depth: model.image.depth 3 .the model's: 1"):
        pretrain_here("--config", tmp_path / "a.yaml", "--run_folder", tmp_path / "run")


def test_init_says_which_of_a_files_options_it_leaves_aside(model, tiny, tmp_path, capsys):
    """A recipe serves several models; and what the model has is what config.yaml says."""
    tiny.write_text(tiny.read_text().replace("depth: 1", "depth: 2").replace("vocab_size: 300", "vocab_size: 400"))
    pretrain_here("--config", tiny, "--init", model, "--run_folder", tmp_path / "run", "--train.steps", "1")
    told = capsys.readouterr().err
    assert "left aside: data.vocab_size, model.image.depth, model.text.depth" in told
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["model"]["image"]["depth"] == 1 and written["data"]["vocab_size"] == 300


def test_init_at_another_size_resamples_the_positions(model, tmp_path, capsys):
    run = tmp_path / "run"
    flags = ("--config", model.parent / "tiny.yaml", "--init", model, "--run_folder", run, "--train.steps", "2")
    pretrain_here(*flags, "--model.image.image_size", "32")
    assert "resampled for images of 32 pixels" in capsys.readouterr().err
    bundle = contrastive.load(run)
    assert bundle.config.image.image_size == 32 and bundle.preprocess.config.size == (32, 32)
    assert bundle.model.image_tower.position_embedding.shape[0] == 16
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["image"]["image_size"] == 32
    pretrain_here(*flags, "--model.image.image_size", "32", "--resume")  # the same again


def test_the_same_command_with_resume_goes_on_exactly(model, stopped, capsys):
    pretrain_here(*first_command(model, stopped), "--resume")
    assert "resuming with" not in capsys.readouterr().err
    assert [row["loss"] for row in rows(stopped)] == [row["loss"] for row in rows(model)]
    ours, theirs = (load_file(run / "final" / "model.safetensors") for run in (stopped, model))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    before, now = ((run / "config.yaml").read_text() for run in (model, stopped))
    assert now == before.replace(str(model), str(stopped))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ["--train.steps", "10"],
            "resuming with train.steps 8 → 10; from here on the learning rate is that of",
        ),
        (["--train.samples", "160"], "resuming with train.steps 8 → 10; from here"),
        (["--optimizer.lr", "5e-4"], "resuming with optimizer.lr 0.001 → 0.0005"),
        (["--data.num_workers", "1", "--checkpoint.keep", "2"], "checkpoint.keep 9 → 2; data.num_workers None → 1"),
        (["--train.accumulate", "2"], "resuming with train.accumulate 1 → 2"),
    ],
)
def test_what_may_change_is_said(args, said, stopped, capsys):
    pretrain_here("--run_folder", stopped, "--resume", *args)
    assert said in capsys.readouterr().err


def test_an_edited_file_counts_on_resume(model, stopped, tmp_path, capsys):
    edited = tmp_path / "tiny.yaml"
    edited.write_text((model.parent / "tiny.yaml").read_text().replace("steps: 8", "samples: 144"))
    pretrain_here("--config", edited, "--run_folder", stopped, "--resume")
    assert "resuming with train.steps 8 → 9" in capsys.readouterr().err and len(rows(stopped)) == 9
    edited.write_text(edited.read_text() + "loss: {name: softmax}\n")
    with pytest.raises(UserError, match="keeps its loss.name .asked for: loss.name sigmoid → softmax"):
        pretrain_here("--config", edited, "--run_folder", stopped, "--resume")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--loss", "softmax"], "keeps its loss.name .asked for: loss.name sigmoid → softmax"),
        (["--model", "siglip_vit_b_16"], "keeps its model: model.image.width is 16, not 768; leave --model out"),
        (["--model.text.dropout", "0.5"], "keeps its model.text.dropout .asked for: model.text.dropout 0.0 → 0.5"),
        (["--optimizer", "muon"], "optimizer.name adamw → muon"),
        (["--data.augment.flip"], "keeps its data.augment.flip"),
        (["--train.ema_decay", "0.9"], "train.ema_decay None → 0.9"),
        (["--data.caption_templates", "a {}"], "keeps its data.caption_templates"),
        (["--init", "elsewhere"], "keeps its init .asked for: init None → elsewhere"),
        (["--lock", "image", "--init", "elsewhere"], "keeps its (init|lock)"),
        (["--train.steps", "3"], "train.steps is 3, but the run has done 4 already; give more"),
    ],
)
def test_what_a_resumed_run_keeps_is_refused(args, message, stopped):
    before = (stopped / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=message):
        pretrain_here("--run_folder", stopped, "--resume", *args)
    assert (stopped / "metrics.jsonl").read_bytes() == before
