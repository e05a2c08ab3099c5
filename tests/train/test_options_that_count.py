"""An option that was given counts, or is refused by name: beside --init, on --resume, in a file or by a flag."""

import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from launching import pretrain_here, rows
from safetensors.torch import load_file

import contrastive
from contrastive.config import to_dict
from contrastive.errors import UserError
from contrastive.models import classifier_config, model_config
from contrastive.train.classify import TrainClassifierConfig
from contrastive.train.pretrain import PretrainConfig, pretrain
from contrastive.train.run import command


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
        (["--model.text.context_length", "2"], "context length 2 leaves no room for text"),
        (["--model.image.patch_size", "5"], "input size 16×16: 16 is not a multiple of the patch size 5"),
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


def test_init_at_another_context_length(model, tmp_path, capsys):
    run, length = tmp_path / "run", 12
    flags = ("--config", model.parent / "tiny.yaml", "--init", model, "--run_folder", run, "--train.steps", "1")
    pretrain_here(*flags, "--model.text.context_length", length)
    assert "resampled for 12 tokens" in capsys.readouterr().err
    bundle = contrastive.load(run)
    assert bundle.tokenizer.context_length == bundle.config.text.context_length == length
    assert bundle.tokenizer("a red circle").shape == (1, length)
    pretrain_here(*flags, "--model.text.context_length", length, "--resume")  # the same again


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
    for dry in ("--dry_run",), ():  # a dry run says it too
        pretrain_here("--run_folder", stopped, "--resume", *args, *dry)
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("decay", ["wsd", "constant"])
def test_a_stable_run_is_cooled_down_from_a_checkpoint(decay, tiny, tmp_path):
    """As if it had been planned so; what would have needed other steps before is refused."""
    plan, run = tmp_path / "plan", tmp_path / "run"
    flags = ("--config", tiny, "--evaluation.limit", "8", "--schedule.warmup_steps", "2", "--schedule.decay")
    cooldown = ("--schedule.decay", "wsd", "--schedule.cooldown_steps", "3")
    pretrain_here(*flags, *cooldown[1:], "--train.steps", "8", "--run_folder", plan)
    pretrain_here(*flags, decay, "--train.steps", "10", "--run_folder", run, "--checkpoint.keep", "9")
    for left in ("final", *(f"checkpoints/step-{step:08}" for step in (6, 8, 10))):
        shutil.rmtree(run / left)
    with pytest.raises(UserError, match="schedule: step 3 was done .* begin the cooldown at step 4"):
        pretrain_here("--run_folder", run, "--resume", *cooldown, "--train.steps", "5")
    pretrain_here("--run_folder", run, "--resume", *cooldown, "--train.steps", "8")
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (run, plan))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_edited_file_counts_on_resume(model, stopped, tmp_path, capsys):
    edited = tmp_path / "tiny.yaml"
    edited.write_text((model.parent / "tiny.yaml").read_text().replace("steps: 8", "samples: 144"))
    pretrain_here("--config", edited, "--run_folder", stopped, "--resume")
    assert "resuming with train.steps 8 → 9" in capsys.readouterr().err and len(rows(stopped)) == 9
    other = {**yaml.safe_load(edited.read_text()), "model": {"name": "siglip_vit_b_16"}}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(UserError, match="model.embed_dim is 16, not 768; leave --config out"):
        pretrain_here("--config", tmp_path / "other.yaml", "--run_folder", stopped, "--resume")
    edited.write_text(edited.read_text() + "loss: {name: softmax}\n")
    with pytest.raises(UserError, match="keeps its loss.name .asked for: loss.name sigmoid → softmax"):
        pretrain_here("--config", edited, "--run_folder", stopped, "--resume")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--loss", "softmax"], "keeps its loss.name .asked for: loss.name sigmoid → softmax"),
        (["--model", "siglip_vit_b_16"], "keeps its model: model.embed_dim is 16, not 768; leave --model out"),
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


def test_a_resumed_run_keeps_the_model_that_it_was_started_with(tmp_path):
    def resume(cls, model, name):
        options = to_dict(cls(model=model, run_folder=str(tmp_path)))
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
        args = ["--resume", "--run_folder", str(tmp_path), "--model", name]
        words = {"name": "t", "doc": "", "default_recipe": str(tmp_path / "config.yaml"), "shown": ""}
        command(cls, lambda config: True, args, **words)

    config = model_config("ViT-B-16")
    filled_in = replace(config, init_logit_scale=10.0, text=replace(config.text, dropout=0.1))
    resume(PretrainConfig, filled_in, "ViT-B-16")
    with pytest.raises(UserError, match="its model: model.image.activation is gelu, not quick_gelu; leave --model out"):
        resume(PretrainConfig, filled_in, "ViT-B-16-quickgelu")
    with pytest.raises(UserError, match="its model: model.image.image_size is 224, not 256; leave --model out"):
        resume(PretrainConfig, model_config("ViT-B-16-SigLIP"), "ViT-B-16-SigLIP-256")
    small = classifier_config("tiny")
    resume(TrainClassifierConfig, replace(small, image=replace(small.image, image_size=8, patch_size=1)), "tiny")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data.caption_column", "title"], "data.caption_column has no effect: digits:train has no texts to choose"),
        (["--data.image_column", "path"], "data.image_column has no effect: digits:train has no columns; leave it out"),
        (["--data.train", "scenes:val", "--data.eval", "scenes:test", "--data.templates", "cifar"], None),
        (
            ["--data.train", "scenes:val", "--data.eval", "scenes:val", "--data.templates", "cifar"],
            "templates cifar is for labelled data",
        ),
        (
            ["--data.augment.crop_scale", "1", "1", "--data.augment.crop_ratio", "1", "2"],
            "crop_scale .1.0, 1.0.",
        ),
        (
            ["--data.augment.rand_augment_magnitude", "20"],
            "magnitude has no effect with data.augment.rand_augment_ops 0",
        ),
        (["--data.augment.color_jitter_prob", "0.5"], "color_jitter_prob has no effect with data.augment.color_jitter"),
        (["--data.preprocess.cut", "floor"], "data.preprocess.cut has no effect with data.preprocess.resize squash"),
        (
            ["--schedule.decay", "constant", "--schedule.final_fraction", "0.1"],
            "final_fraction has no .*decay constant",
        ),
        (["--data.timeout", "9"], "data.timeout has no effect without data.num_workers; leave it out"),
        (
            ["--data.max_bad_share", "1", "--data.bad_window", "9"],
            "bad_window has no effect with data.max_bad_share 1.0",
        ),
    ],
)
def test_what_the_choice_leaves_without_effect(args, message, tiny, tmp_path):
    run = tmp_path / "run"
    flags = ("--config", tiny, "--run_folder", run, "--train.steps", "1", "--evaluation.limit", "9", *args)
    if message is None:
        pretrain_here(*flags)
    else:
        with pytest.raises(UserError, match=message) as error:
            pretrain_here(*flags)
        assert "\n" not in str(error.value) and not (run / "config.yaml").exists()


def test_a_locked_tower_has_no_dropout(model, tmp_path):
    flags = (
        "--config",
        model.parent / "tiny.yaml",
        "--init",
        model,
        "--run_folder",
        tmp_path / "run",
        "--lock",
        "image",
    )
    with pytest.raises(UserError, match="model.image.patch_dropout has no effect with lock image; leave it out"):
        pretrain_here(*flags, "--model.image.patch_dropout", "0.5")
    pretrain_here(*flags, "--train.steps", "1")  # the file's dropout serves other runs too


def test_evaluation_without_data(tiny, tmp_path):
    tiny.write_text(tiny.read_text().replace('eval: ["digits:test"], ', ""))
    flags = ("--config", tiny, "--run_folder", tmp_path / "run", "--train.steps", "1")
    with pytest.raises(UserError, match="evaluation.limit has no effect without data.eval; leave it out"):
        pretrain_here(*flags, "--evaluation.limit", "9")
    tiny.write_text(tiny.read_text() + "schedule: {decay: constant, final_fraction: 0.1}\n")
    with pytest.raises(UserError, match="schedule.final_fraction has no effect with schedule.decay constant"):
        pretrain_here(*flags)  # a file that contradicts itself
    pretrain_here(*flags, "--schedule.decay", "constant", "--train.log_every", "3")  # a flag makes another choice


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tune", "head", "--dropout", "0.1"], "dropout has no effect with tune head"),
        (["--tune", "head", "--optimizer.layer_decay", "0.5"], "optimizer.layer_decay has no effect with tune head"),
        (["--head", "zeros", "--templates", "plain"], "templates has no effect with head zeros"),
        (["--optimizer.logit_lr_factor", "2"], "optimizer.logit_lr_factor has no effect in this kind of run"),
        (["--data.preprocess.resize", "crop"], "brings its own data.preprocess.resize"),
    ],
)
def test_what_fine_tuning_does_not_use(flags, message, model, tmp_path):
    from contrastive.commands.finetune_command import main

    with pytest.raises(UserError, match=message):
        main([str(model), "--data", "digits", "--run_folder", str(tmp_path / "run"), "--batch-size", "8", *flags])


def test_the_sizes_of_small_images_can_be_named_in_full(tmp_path):
    from contrastive.commands.classifier_command import main

    common = ["--data", "digits", "--batch-size", "8", "--model.image.depth", "1", "--dry_run"]
    common += ["--run_folder", str(tmp_path / "run"), "--model.image.image_size", "16"]
    with pytest.raises(UserError, match="image_size is 8, but model.image.image_size 16: give one of them"):
        main([*common, "--image_size", "8"])
    with pytest.raises(UserError, match="16 is not a multiple of model.image.patch_size 3"):
        main([*common, "--model.image.patch_size", "3"])


def test_what_only_the_default_file_says_is_no_mistake_of_the_user(tiny_text, tmp_path):
    """Its prompts are for its own data; data without labels have no use for them, and nobody asked."""
    tiny_text = tiny_text.replace("data: {", "data: {templates: photo, ").replace("digits:train", "scenes:val")
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    words = {"name": "t", "doc": "", "default_recipe": str(tmp_path / "tiny.yaml"), "shown": ""}
    pairs = ["--data.train", "scenes:val", "--data.eval", "scenes:val", "--dry_run"]
    command(PretrainConfig, pretrain, pairs, **words)
    command(PretrainConfig, pretrain, ["--data.eval", "--dry_run"], **words)
    for asked in (["--config", str(tmp_path / "tiny.yaml")], ["--data.templates", "photo"]):
        with pytest.raises(UserError, match="--data.templates photo is for labelled data"):
            command(PretrainConfig, pretrain, [*pairs, *asked], **words)
