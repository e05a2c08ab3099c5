"""The worked objective of docs/extending.md, run as it stands."""

import re

from launching import ROOT, rows

from contrastive.train.pretrain import PretrainConfig, pretrain
from contrastive.train.run import command


def test_the_example_learns(tiny, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "extending.md").read_text()
    (tmp_path / "my_objective.py").write_text(re.search(r"```python\n(# my_objective.py\n.*?)```", text, re.DOTALL)[1])
    monkeypatch.syspath_prepend(tmp_path)
    __import__("my_objective")
    words = ["--config", str(tiny), "--run_folder", str(tmp_path / "run"), "--objectives", "colour"]
    words += ["--train.steps", "40", "--optimizer.lr", "0.01"]
    command(PretrainConfig, pretrain, words, name="t", doc="", default_recipe=tiny, shown="")
    losses = [row["colour_loss"] for row in rows(tmp_path / "run")]
    assert len(losses) == 40 and sum(losses[-5:]) < 0.5 * sum(losses[:5])
