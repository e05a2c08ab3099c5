"""The benchmarks' real commands at tiny sizes."""

import json
import runpy
import subprocess
import sys

import pytest
import torch
from launching import ROOT, environment


@pytest.mark.slow
def test_loss_measures_each_rival_and_says_why_it_left_one_out(tmp_path):
    flags = (
        "--batch 512 --dim 16 --loss sigmoid --ranks 2 --repeats 2 --device cpu --rivals ours open_clip siglip_kernel"
    )
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "loss.py"),
        *flags.split(),
        "--results",
        str(tmp_path / "rows"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    rows = {row["rival"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    assert list(rows) == ["ours", "open_clip", "siglip_kernel"]
    assert "siglip" in rows["siglip_kernel"]["error"]
    for row in (rows["ours"], rows["open_clip"]):
        assert 0 < row["ms_min"] <= row["ms_median"]
        assert row["share_of_matmul"] > 0
        assert set(row["errors"]) == {"loss", "image_grad", "text_grad", "scale_grad", "bias_grad"}
        assert row["max_error"] < 1e-5
        assert row["ranks_error"] < 1e-5
        assert len(row["peak_bytes_per_rank"]) == 2
        assert row["rival"] in done.stdout
    assert rows["open_clip"]["rival_version"].startswith("open_clip_torch ")
    # null where /proc/self/clear_refs may not be written
    assert all(peak is None or peak > 512 * 256 * 4 for peak in rows["open_clip"]["peak_bytes_per_rank"]), "no logits?"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dtyp", "bf16"], "unknown flag --dtyp. Did you mean 'dtype'"),
        (["--batch", "many"], "--batch is 'many'"),
        (["--batch", "7", "--ranks", "2"], "--batch 7 does not divide evenly among 2 ranks"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["loss.py", *flags])
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "benchmarks" / "loss.py"), run_name="__main__")
    told = capsys.readouterr().err
    assert stop.value.code == 2 and told.startswith(f"loss.py: error: {message}") and told.count("\n") == 1


def test_checkpoint_measures_a_save_beside_training_and_one_waited_for(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "saves"
    flags = ["--model", "siglip_vit_ti_32", "--rounds", "2", "--step_size", "16", "--folder", str(folder)]
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", *flags, "--results", str(tmp_path / "rows")])
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    threads = torch.get_num_threads()
    runpy.run_path(str(ROOT / "benchmarks" / "checkpoint.py"), run_name="__main__")
    torch.set_num_threads(threads)
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["gigabytes"] == pytest.approx(12e-9 * row["parameters"], rel=0.05)
    assert 0 < row["stall_seconds"] < row["waited_seconds"] and 0 < row["stall_share"] < 1
    assert row["stall_seconds"] < row["writing_seconds"] and row["step_ms"] > 0 and row["step_ms_beside"] > 0
    assert not folder.exists() and "stall_share" in capsys.readouterr().out


def test_health_says_what_a_step_pays(tmp_path):
    flags = ("--steps", "40", "--results", str(tmp_path / "rows"))
    command = [sys.executable, str(ROOT / "benchmarks" / "health.py"), *flags]
    env = environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["steps"] == 10 and min(row["ms"].values()) > 0 and 0 < row["alone_share"] < 0.2


@pytest.mark.slow
def test_distill_compares_students_with_and_without_a_teacher(tmp_path):
    (tmp_path / "tiny.yaml").write_text(
        """
model:
  embed_dim: 16
  image: {image_size: 16, patch_size: 8, width: 16, depth: 1, num_heads: 2, mlp_dim: 32}
  text: {context_length: 8, width: 16, depth: 1, num_heads: 2, mlp_dim: 32}
data: {vocab_size: 300}
train: {steps: 3, global_batch_size: 8}
"""
    )
    flags = ["--data", "scenes:val", "--dev", "scenes:val", "--config", str(tmp_path / "tiny.yaml"), "--views", "1"]
    flags += [
        "--seeds",
        "4",
        "--student=--model.image.mlp_dim 16",
        "--work",
        str(tmp_path / "work"),
    ]
    # A process of its own, as it forks: what tests before this one have left here would be in the forks.
    command = [sys.executable, ROOT / "benchmarks" / "distill.py", *flags, "--results", tmp_path / "rows"]
    env = environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    alone, taught = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert (alone["student"], taught["student"]) == ("alone", "taught")
    assert alone["parameters"] == taught["parameters"] < alone["teacher_parameters"]
    assert alone["cpu_seconds"] > 0 and taught["mean_recall"] > 0
    metrics = [json.loads(line) for line in (tmp_path / "work/taught-4/metrics.jsonl").read_text().splitlines()]
    assert any("distill_loss" in row for row in metrics)
    assert "teacher" in done.stdout


def test_native_measures_both_kinds_of_images(tmp_path, monkeypatch, capsys):
    flags = "--patches 8 --patch-size 4 --width 16 --depth 1 --num-heads 2 --batch 4 --turns 2"
    monkeypatch.setattr(sys, "argv", ["native.py", *flags.split(), "--results", str(tmp_path / "rows")])
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    runpy.run_path(str(ROOT / "benchmarks" / "native.py"), run_name="__main__")
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert 4 < row["tokens"] <= 8 and row["share"] > 0 and row["mixed_ms"] > 0
    assert str(row["share"]) in capsys.readouterr().out
