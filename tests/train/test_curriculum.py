"""A curriculum is a function of the step: stages equal runs at their size, resumed runs equal whole ones."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from launching import pretrain_here, rows
from safetensors.torch import load_file

import contrastive
from contrastive.errors import UserError
from contrastive.models import ImageTowerConfig
from contrastive.models.image_tower import ImageTower
from contrastive.train.options import Stage
from contrastive.train.task import Curriculum

STAGES = ("--curriculum", "until=0.5,image_size=8,patch_dropout=0.5", "until=0.8,patch_dropout=0.25")


def tower() -> ImageTower:
    options = {"image_size": 16, "patch_size": 4, "width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 16}
    return ImageTower(ImageTowerConfig(**options, patch_dropout=0.1), 16)


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(run / "final" / "model.safetensors") for run in (one, other))
    return all(torch.equal(ours[name], theirs[name]) for name in theirs | ours)


def test_what_a_stage_does_not_name_is_the_models_own():
    found = Curriculum((Stage(0.3, 8), Stage(0.6, patch_dropout=0.5)), 10, tower())
    assert [found.at(step) for step in (0, 2, 3, 5, 6, 99)] == 2 * [(8, 0.1)] + 2 * [(16, 0.5)] + 2 * [(16, 0.1)]
    assert str(found).startswith("8 px, patch dropout 0.1 until step 3; 16 px, patch dropout 0.5 until step 6; then 16")
    assert Curriculum((), 10, tower()).at(3) == (16, 0.1)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([Stage(0.5, 10)], "image_size 10, which is not a multiple of model.image.patch_size 4; use 8 or 12"),
        ([Stage(0.5, 8), Stage(0.3, 12)], "until 0.3 ends before it begins"),
        ([Stage(0.5, 8), Stage(0.51, 12)], "until 0.51 ends at step 5 of 10, where it begins"),
        ([Stage(0.5, 16, 0.1)], "until 0.5 changes nothing"),
        ([Stage(0.5, 8), Stage(0.7, 8)], "until 0.5 changes nothing"),
    ],
)
def test_stages_that_cannot_be(stages, message):
    with pytest.raises(UserError, match=message):
        Curriculum(tuple(stages), 10, tower())


def test_a_tower_that_does_not_learn_drops_no_patches():
    fixed = tower().requires_grad_(False)
    assert Curriculum((Stage(0.5, 8),), 10, fixed).image_size(0) == 8
    with pytest.raises(UserError, match="patch_dropout, which has no effect on a tower that does not learn"):
        Curriculum((Stage(0.5, 8, 0.5),), 10, fixed)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("until=1.5", "curriculum.until is 1.5; it must be above 0 and at most 1"),
        ("until=0.5,patch_dropout=1", "curriculum.patch_dropout is 1.0; it must be at least 0 and below 1"),
        ("until=0.5,size=8", "--curriculum is 'until=0.5,size=8', expected a list of until=float,image_size=int or"),
        ("image_size=8", "--curriculum is 'image_size=8', expected"),
    ],
)
def test_words_that_are_no_stage(words, message, tiny, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        pretrain_here("--config", tiny, "--run_folder", tmp_path / "run", "--curriculum", words)


def test_a_run_in_one_stage_is_the_run_at_its_size(tiny, tmp_path):
    """In every bit, in micro-batches with their activations computed twice; fixed positions need no resampling."""
    flags = ("--config", tiny, "--model.image.position", "sincos", "--train.steps", "3", "--train.accumulate", "2")
    flags += ("--model.image.patch_size", "4", "--train.gradient_checkpointing", "1", "--evaluation.limit", "8")
    stage = "until=1,image_size=8,patch_dropout=0.5"
    pretrain_here(*flags, "--curriculum", stage, "--run_folder", tmp_path / "stage")
    own = ("--model.image.image_size", "8", "--model.image.patch_dropout", "0.5")
    pretrain_here(*flags, *own, "--run_folder", tmp_path / "own")
    assert same_weights(tmp_path / "stage", tmp_path / "own")
    assert rows(tmp_path / "stage")[-1]["loss"] == rows(tmp_path / "own")[-1]["loss"]
    assert contrastive.load(tmp_path / "stage").preprocess.config.size == (16, 16)


def test_it_goes_on_in_the_midst_of_a_stage_and_keeps_what_was_done(tiny, tmp_path, capsys):
    """The file says what the flags say, and other numbers of workers change nothing."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = ("--config", tiny, "--model.image.patch_size", "4", "--checkpoint.keep", "9", "--evaluation.limit", "8")
    pretrain_here(*flags, *STAGES, "--run_folder", whole)
    said = " ".join(capsys.readouterr().err.split())
    assert "8 px, patch dropout 0.5 until step 4; 16 px, patch dropout 0.25 until step 6; then 16 px" in said
    stages = [{"until": 0.5, "image_size": 8, "patch_dropout": 0.5}, {"until": 0.8, "patch_dropout": 0.25}]
    tiny.write_text(yaml.safe_dump({**yaml.safe_load(tiny.read_text()), "curriculum": stages}))
    pretrain_here(*flags, "--run_folder", stopped)
    assert same_weights(whole, stopped)
    shutil.rmtree(stopped / "final")
    for step in ("04", "06", "08"):
        shutil.rmtree(stopped / "checkpoints" / f"step-000000{step}")
    for change in (["until=0.5,image_size=12"], ["until=0.1,image_size=8,patch_dropout=0.5", "until=0.8,image_size=8"]):
        with pytest.raises(UserError, match="curriculum: step 1 |curriculum: step 0 "):
            pretrain_here("--run_folder", stopped, "--resume", "--curriculum", *change)
    with pytest.raises(UserError, match="curriculum: step 1 was done with image size and patch dropout"):
        pretrain_here("--run_folder", stopped, "--resume", "--train.steps", "2")
    pretrain_here("--run_folder", stopped, "--resume", "--data.num_workers", "1")
    assert same_weights(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-00000008")
    shutil.rmtree(stopped / "checkpoints" / "step-00000006")
    later = "until=0.6,image_size=8,patch_dropout=0.5"  # step 4 was to come in the next stage
    pretrain_here("--run_folder", stopped, "--resume", "--curriculum", later, "--dry_run")
    assert "resuming with curriculum" in capsys.readouterr().err
