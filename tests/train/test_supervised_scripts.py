"""The commands of the README: a classifier from scratch, with the short flags, then its fine-tuning."""

import re
import subprocess
import sys

from launching import ACCELERATE, ROOT, environment, rows
from rank_processes import script_on_ranks

import contrastive

SMALL = ("width 16", "depth 1", "num_heads 2", "mlp_dim 32")


def test_train_then_finetune(tmp_path, free_port):
    model = [word for option in SMALL for word in f"--model.image.{option}".split()]
    vit, tuned = tmp_path / "vit", tmp_path / "tuned"
    short = ("--data", "digits", "--batch-size", "64", "--epochs=0.5", "--lr", "0.01", "--model", "tiny")
    command = [sys.executable, *ACCELERATE, ROOT / "scripts/train_classifier.py", *short, *model, "--run_folder", vit]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    said = done.stderr
    assert done.returncode == 0 and "parameters" in said, said
    assert "data.train digits:train: 1,442 samples" in said
    assert len(rows(vit)) == 11 and "classification/digits:test/acc1" in rows(vit, "eval")[-1]
    assert rows(vit)[-1]["lr"] < 0.01 == max(row["lr"] for row in rows(vit))
    more = ("--data", "digits", "--data.share", "0.1", "--train.steps", "2", "--batch_size", "64")
    words = (vit, *more, "--run_folder", tuned)
    status, said = script_on_ranks(1, free_port, ROOT / "scripts/finetune.py", *words, folder=tmp_path / "told")
    assert status == [0], said
    assert re.search(r"\(10 %\): 14\d samples", said) and f"starting from {vit}/final" in said
    assert contrastive.load(tuned).class_names == contrastive.load(vit).class_names
    assert (tuned / "report.html").read_text().count("classification") > 0
