"""The worked example of docs/extending.md, run as it stands: a loss registered from outside the package."""

import re

import pytest
from launching import ROOT, rows
from rank_processes import script_on_ranks

CONFIG = """
model:
  embed_dim: 16
  image: {image_size: 16, patch_size: 8, width: 16, depth: 1, num_heads: 2, mlp_dim: 32}
  text: {context_length: 8, width: 16, depth: 1, num_heads: 2, mlp_dim: 32}
data: {train: "digits:train", eval: ["digits:test"], vocab_size: 300}
train: {steps: 60, global_batch_size: 16, log_every: 1}
evaluation: {every: 60, limit: 40}
"""


@pytest.fixture
def script(tmp_path):
    """Write the files of the example, each a block that begins with its name, and return the script."""
    text = (ROOT / "docs" / "extending.md").read_text()
    for name in ("my_loss.py", "train_mine.py"):
        (tmp_path / name).write_text(re.search(rf"```python\n(# {name}\n.*?)```", text, re.DOTALL)[1])
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return tmp_path / "train_mine.py"


@pytest.fixture
def train(script, tmp_path, free_port):
    """Run the script; returns its exit status, and what it wrote to stderr."""

    def train(*flags):
        words = ("--config", tmp_path / "tiny.yaml", "--run_folder", tmp_path / "run", *flags)
        (status,), told = script_on_ranks(1, free_port, script, *words, folder=tmp_path / "told")
        return status, told

    return train


def test_the_example_trains(script, train):
    flags = "--loss margin --loss.margin 0.3 --train.accumulate 2 --optimizer.lr 0.005"
    status, told = train(*flags.split())
    assert status == 0, told
    losses = [row["loss"] for row in rows(script.parent / "run")]
    assert len(losses) == 60 and sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert "margin: 0.3" in (script.parent / "run" / "config.yaml").read_text()


def test_its_options_are_checked_like_any_others(train):
    status, told = train("--loss", "margin", "--loss.margim", "0.3")
    assert status != 0 and "Did you mean 'loss.margin'?" in told
    status, told = train("--loss", "margins")
    assert status != 0 and "Did you mean 'margin'?" in told
