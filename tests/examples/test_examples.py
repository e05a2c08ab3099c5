"""Each of examples/*.py from its first line to its last, at toy size; examples/*.ipynb too."""

import importlib.util
import json
from pathlib import Path

import pytest

from contrastive.losses import LOSSES

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL = {
    **{f"image.{name}": size for name, size in (("width", 16), ("depth", 1), ("num_heads", 2), ("mlp_dim", 16))},
    **{f"text.{name}": size for name, size in (("width", 16), ("num_heads", 2), ("mlp_dim", 16))},
}
TOY = [word for name, size in SMALL.items() for word in (f"--model.{name}", str(size))]
TOY += ["--model.embed_dim", "16", "--data.vocab_size", "300", "--batch_size", "16"]
SMALL_DATA = ["--data", "scenes:val", "--eval", "scenes:test", "--evaluation.limit", "4"]  # its tokenizer is quicker
STEPS = [*TOY, *SMALL_DATA, "--train.steps", "2"]


@pytest.fixture
def example():
    def load(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_your_own_photos(example, tmp_path, capsys):
    example("your_own_photos").main(None, tmp_path, *TOY, "--epochs", "1", number=32)
    assert "caption or class" in capsys.readouterr().out and (tmp_path / "run" / "search.html").exists()


def test_class_prompts(example, tmp_path, capsys):
    narrow = ["--epochs", "0.02", "--evaluation.limit", "4"]
    example("class_prompts").main("digits", tmp_path, *TOY, *narrow)
    result = json.loads(next((tmp_path / "run" / "zero_shot").glob("*/zero_shot.json")).read_text())
    assert result["num_images"] == 355 and "a scan of the digit {}" in result["templates"]


def test_linear_probe(example, tmp_path, capsys):
    accuracy = example("linear_probe").main(None, tmp_path, *STEPS)
    assert accuracy["pixels"] > 90 and accuracy["embeddings"] > 20


def test_captioner(example, tmp_path, capsys):
    example("captioner").main(tmp_path, *STEPS)
    assert capsys.readouterr().out.count(" was written as ") == 3


def test_own_loss(example, tmp_path, capsys):
    try:
        example("own_loss").main(tmp_path, *STEPS)
    finally:
        LOSSES._entries.pop("margin", None)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert abs(json.loads(rows[0])["loss"] - 15 * 0.3) < 2, "near chance at the first step"


def test_distillation(example, tmp_path, capsys):
    accuracy = example("distillation").main(tmp_path, *TOY, *SMALL_DATA, steps=2)
    assert set(accuracy) == {"teacher", "student_alone", "student_taught"}
    assert "distill_loss" in (tmp_path / "student_taught" / "metrics.jsonl").read_text()
