"""The real command, end to end: it trains, scores, survives a kill, and gives the same on two ranks."""

import random
import shutil
import time

import pytest
import torch
import yaml
from launching import ACCELERATE, ROOT, pretrain, pretrain_here, rows
from rank_processes import start_script
from safetensors.torch import load_file

import contrastive
from contrastive.errors import UserError
from contrastive.train.launches import RunLock

SCRIPT = ROOT / "scripts" / "pretrain.py"


@pytest.fixture(scope="module")
def launched(tiny_text, tmp_path_factory):
    """A run with the sigmoid loss by the whole command, which says one thread: (what it printed, its folder)."""
    folder = tmp_path_factory.mktemp("launched")
    (folder / "tiny.yaml").write_text(tiny_text)
    run = folder / "run"
    return pretrain("--config", folder / "tiny.yaml", "--run_folder", run, launcher=ACCELERATE).stderr, run


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_trains_and_leaves_a_run_folder(loss, tiny, tmp_path, request, capsys):
    if loss == "sigmoid":
        told, run = request.getfixturevalue("launched")
        assert "1 x cpu, fp32, 1 threads each" in told
    else:
        run = tmp_path / "run"
        pretrain_here("--config", tiny, "--loss", loss, "--run_folder", run)
        told = capsys.readouterr().err
    assert f"model: {run}/final" in told
    losses = [row["loss"] for row in rows(run)]
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert [row["step"] for row in rows(run, "eval")] == [4, 8]
    assert 0 <= rows(run, "eval")[-1]["zero_shot/digits:test/acc1"] <= 100
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["loss"]["name"] == loss and written["loss"]["duplicates"] == "positive"  # class prompts
    assert written["model"]["text"]["vocab_size"] == contrastive.load(run).tokenizer.vocab_size
    bundle = contrastive.load(run)
    assert bundle.tokenizer(["a photo of a seven"]).shape == (1, 8)
    assert bundle.model.encode_text(bundle.tokenizer(["seven"])).shape == (1, 16)
    assert (bundle.model.logit_bias is None) == (loss == "softmax")


def test_trackers_get_the_figures(tiny, tmp_path):
    pretrain_here("--config", tiny, "--run_folder", tmp_path / "run", "--trackers", "tensorboard")
    events = list((tmp_path / "run").rglob("events.out.tfevents*"))
    assert any(b"train/loss" in path.read_bytes() for path in events)


def test_two_processes_give_the_losses_of_one(tiny, tmp_path, free_port):
    """With README's command, which accelerate alone would run as a single process."""
    common = ("--config", tiny, "--model.image.dropout", "0", "--train.log_every", "1")
    pretrain_here(*common, "--run_folder", tmp_path / "one")
    done = pretrain(
        *common,
        "--run_folder",
        tmp_path / "two",
        launcher=(*ACCELERATE, "--num_processes", "2", "--cpu", "--main_process_port", str(free_port)),
    )
    assert "2 x cpu" in done.stderr
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == len(two) == 8
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    for a, b in zip(rows(tmp_path / "one", "eval"), rows(tmp_path / "two", "eval"), strict=True):
        assert a == pytest.approx(b, abs=2.6)  # one image of 40 may sit on the boundary


def test_killed_and_resumed_equals_undisturbed(tiny, tmp_path, free_port, capsys):
    """SIGKILL at a random step: same losses, same weights, bit for bit. With dropout."""
    common = ("--config", tiny, "--train.steps", "14", "--train.ema_decay", "0.9", "--evaluation.every", "14")
    pretrain_here(*common, "--run_folder", tmp_path / "whole")
    run = tmp_path / "killed"
    (process,) = start_script(1, free_port, SCRIPT, *common, "--run_folder", run, folder=tmp_path / "told")
    at_step = random.randint(3, 11)
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(rows(run)) < at_step:
        assert process.is_alive() and time.monotonic() < deadline, "the run ended before it was killed"
        time.sleep(0.002)
    process.kill()
    process.join()
    assert not (run / "final").exists()
    capsys.readouterr()
    pretrain_here("--run_folder", run, "--resume")
    assert "resuming" in capsys.readouterr().err
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(tmp_path / "whole")], at_step
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (run, tmp_path / "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs), at_step


def test_sigterm_saves_and_resumes_exactly(tiny, tmp_path, free_port):
    common = ("--config", tiny, "--train.steps", "12", "--checkpoint.every", "100", "--optimizer", "muon")
    pretrain_here(*common, "--run_folder", tmp_path / "whole")
    run = tmp_path / "stopped"
    (process,) = start_script(1, free_port, SCRIPT, *common, "--run_folder", run, folder=tmp_path / "told")
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(rows(run)) < 3:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.002)
    process.terminate()
    process.join(60)
    assert (tmp_path / "told/status0").read_text() == "143"
    assert "saved; continue with --resume" in (tmp_path / "told/stderr0").read_text()
    pretrain_here("--run_folder", run, "--resume")
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(tmp_path / "whole")]


@pytest.mark.parametrize(
    ("change", "field"), [(("--train.seed", "5"), "seed"), (("--train.global_batch_size", "32"), "global_batch_size")]
)
def test_resume_refuses_other_data_order(change, field, tiny, tmp_path):
    run = tmp_path / "run"
    pretrain_here("--config", tiny, "--run_folder", run, "--train.steps", "2")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=field):
        pretrain_here("--run_folder", run, "--resume", "--train.steps", "4", *change)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_run_of_an_older_version_resumes(tiny, tmp_path):
    """Its config.yaml has options that have other names now, or none."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    pretrain_here("--config", tiny, "--run_folder", whole)
    pretrain_here("--config", tiny, "--run_folder", run)
    for path in (run / "checkpoints").glob("step-*"):
        if path.name > "step-00000004":
            shutil.rmtree(path)
    old = yaml.safe_load((run / "config.yaml").read_text())
    old["loss"] |= {"init_scale": 3.0, "init_bias": None}  # outdone by what the model came to
    old["optimizer"]["beta1"] = 0.9
    preprocess = old["data"].pop("preprocess")
    del preprocess["patches"]  # newer than these names
    old["data"] |= preprocess
    (run / "config.yaml").write_text(yaml.safe_dump(old))
    pretrain_here("--run_folder", run, "--resume")
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(whole)]
    assert yaml.safe_load((run / "config.yaml").read_text()) == yaml.safe_load(
        (whole / "config.yaml").read_text().replace(str(whole), str(run))
    )
    old["optimizer"]["beta1"] = 0.8
    (run / "config.yaml").write_text(yaml.safe_dump(old))
    with pytest.raises(UserError, match="optimizer.beta1 is 0.8, but is no option any more: it is always 0.9"):
        pretrain_here("--run_folder", run, "--resume")


def test_a_second_launch_is_refused(tiny, tmp_path):
    run = tmp_path / "run"
    with RunLock(run), pytest.raises(UserError, match=f"another process is training in {run}; wait"):
        pretrain_here("--config", tiny, "--run_folder", run)
    assert not list(run.iterdir())


def test_a_failed_start_leaves_nothing_in_the_way(tiny, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match="model.text.width 17 is not a multiple"):
        pretrain_here("--config", tiny, "--run_folder", run, "--model.text.width", "17")
    pretrain_here("--config", tiny, "--run_folder", run, "--train.steps", "1")


def test_accumulation_keeps_the_negatives(tiny, tmp_path):
    common = ("--config", tiny, "--model.image.dropout", "0")
    pretrain_here(*common, "--run_folder", tmp_path / "whole")
    pretrain_here(*common, "--run_folder", tmp_path / "parts", "--train.accumulate", "4")
    for a, b in zip(rows(tmp_path / "whole"), rows(tmp_path / "parts"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
