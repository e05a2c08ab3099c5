"""Checkpoints are whole or absent, verified before use, and never silently replaced by a fresh start."""

import json
import os
import shutil

import pytest
import torch

import contrastive
from contrastive.data.preprocess import PreprocessConfig
from contrastive.data.tokenizer import train_bpe
from contrastive.errors import UserError
from contrastive.files import problem, write_folder
from contrastive.interop.bundle import save_model
from contrastive.models import DualEncoder, ImageTowerConfig, ModelConfig, TextTowerConfig
from contrastive.optim import AdamWConfig, ExponentialMovingAverage, MuonConfig
from contrastive.train.checkpoint import find_checkpoint, load_model, load_training_state, read_cursor
from contrastive.train.launches import RunLock, check_folder
from contrastive.train.options import CheckpointConfig
from contrastive.train.saver import CheckpointSaver


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["a red circle", "a blue star"], 300, 8)


def build(tokenizer, seed=0, optimizer=None):
    torch.manual_seed(seed)
    text = TextTowerConfig(
        vocab_size=tokenizer.vocab_size, context_length=8, width=16, depth=1, num_heads=2, mlp_dim=32
    )
    image = ImageTowerConfig(image_size=16, patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=32)
    model = DualEncoder(ModelConfig(embed_dim=16, image=image, text=text, init_logit_bias=-3.0))
    optimizers = (optimizer or AdamWConfig()).build(model)
    ema = ExponentialMovingAverage(model, 0.9)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for each in optimizers:
        each.step()
    ema.update(model, 5, skipped=torch.tensor(False))
    return model, optimizers, ema


def saver(checkpoints, tokenizer, parts, **options):
    model = parts[0]

    def save_parts(folder, weights, average):
        save_model(folder, weights, model.config, PreprocessConfig(16), tokenizer, average)

    return CheckpointSaver(checkpoints, CheckpointConfig(every=1, **options), *parts, save_parts)


def save(checkpoints, step, tokenizer, parts, **options):
    saver(checkpoints, tokenizer, parts, **options).save({"step": step}, in_background=False)
    return checkpoints / f"step-{step:08d}"


def load(folder, model, optimizers, ema):
    load_model(folder, model)
    load_training_state(folder, model, optimizers, ema)


@pytest.mark.parametrize("optimizer", [AdamWConfig(), MuonConfig()])
def test_everything_comes_back(tokenizer, tmp_path, optimizer):
    parts = model, optimizers, ema = build(tokenizer, 0, optimizer)
    folder = save(tmp_path, 7, tokenizer, parts)
    assert find_checkpoint(tmp_path) == folder and read_cursor(folder)["step"] == 7
    other, other_optimizers, other_ema = build(tokenizer, 1, optimizer)
    load(folder, other, other_optimizers, other_ema)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(ema.average[name], other_ema.average[name]) for name in ema.average)
    # The next step is the same to the bit, so every state of the optimizers is.
    for each, its in ((model, optimizers), (other, other_optimizers)):
        torch.manual_seed(3)
        for p in each.parameters():
            p.grad = torch.randn_like(p)
        for one in its:
            one.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    bundle = contrastive.load(folder)  # a checkpoint is a model folder too, and its average is what counts
    weights = bundle.model.state_dict()
    assert all(torch.equal(weights[name], other_ema.average[name]) for name in weights)


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("damage", [flip_bit, truncate, os.remove])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_damaged_newest_is_passed_over(damage, name, tokenizer, tmp_path, capsys):
    parts = build(tokenizer)
    older, newest = save(tmp_path, 10, tokenizer, parts), save(tmp_path, 20, tokenizer, parts)
    damage(newest / name)
    assert find_checkpoint(tmp_path) == older
    assert "checkpoint passed over: step-00000020" in capsys.readouterr().err
    damage(older / name)
    with pytest.raises(UserError, match="all are damaged: step-00000020: .*; step-00000010"):
        find_checkpoint(tmp_path)


def test_a_copy_by_another_name_is_none_of_the_run(tokenizer, tmp_path):
    folder = save(tmp_path, 20, tokenizer, build(tokenizer))
    shutil.copytree(folder, tmp_path / "step-00000020-before-the-long-run")
    assert find_checkpoint(tmp_path) == folder


def test_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(UserError, match="there is none yet"):
        find_checkpoint(tmp_path)


def test_keeps_the_newest_and_never_deletes_the_one_just_saved(tokenizer, tmp_path):
    parts = build(tokenizer)
    for step in (10, 20, 30):
        save(tmp_path, step, tokenizer, parts, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000030"]
    flip_bit(tmp_path / "step-00000030" / "model.safetensors")  # resumed from 20, then stopped at 25
    save(tmp_path, 25, tokenizer, parts, keep=1)
    assert find_checkpoint(tmp_path).name == "step-00000025"


def test_failing_write_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "thing"
    write_folder(folder, lambda temporary: (temporary / "a").write_text("old"))

    def fail(temporary):
        (temporary / "a").write_text("new")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_folder(folder, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]
    assert (folder / "a").read_text() == "old" and problem(folder) is None


def test_another_optimizer_or_model_is_refused(tokenizer, tmp_path):
    folder = save(tmp_path, 1, tokenizer, build(tokenizer))
    with pytest.raises(UserError, match="of another optimizer or model"):
        load(folder, *build(tokenizer, 0, MuonConfig()))
    model, optimizers, _ = build(tokenizer)
    shutil.rmtree(tmp_path)
    parts = save(tmp_path, 1, tokenizer, (model, optimizers, None))
    with pytest.raises(UserError, match="no averaged weights"):
        load(parts, *build(tokenizer))


def test_load_refuses_what_is_not_a_whole_model(tokenizer, tmp_path):
    folder = save(tmp_path / "checkpoints", 1, tokenizer, build(tokenizer))
    assert contrastive.load(tmp_path).path == folder  # a run folder: its newest checkpoint
    with pytest.raises(UserError, match="no such file or folder"):
        contrastive.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="neither a run"):
        contrastive.load(folder / "tokenizer")
    flip_bit(folder / "ema.safetensors")
    with pytest.raises(UserError, match="ema.safetensors is damaged"):
        contrastive.load(folder)
    description = json.loads((folder / "config.json").read_text())
    del description["format"]
    write_folder(tmp_path / "foreign", lambda t: (t / "config.json").write_text(json.dumps(description)))
    with pytest.raises(UserError, match="neither a run"):
        contrastive.load(tmp_path / "foreign")


@pytest.mark.parametrize("resume", [False, True])
def test_a_read_only_run_folder_is_said_before_anything(resume, tmp_path, monkeypatch):
    if resume:
        (tmp_path / "config.yaml").write_text("a: 1")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match="cannot write to .*; name another folder with --out"):
        check_folder(tmp_path, resume)


def test_run_folder_checks(tmp_path):
    path = tmp_path / "run"
    check_folder(path, resume=False)
    with RunLock(path) as lock:
        lock.begin(0, None)
        check_folder(path, resume=False)
    check_folder(path, resume=False)  # a start that failed leaves only its record, and the next may begin
    with pytest.raises(UserError, match="nothing to resume"):
        check_folder(path, resume=True)
    (path / "config.yaml").write_text("a: 1")
    with pytest.raises(UserError, match="exists; continue it with --resume"):
        check_folder(path, resume=False)
    check_folder(path, resume=True)
