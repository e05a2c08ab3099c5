"""The cells of the notebook in order: each compares its part with the package's module, and stops where they differ."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "vit_from_scratch.ipynb"


def run_cells(monkeypatch, steps=None):
    """Return the names that the cells leave; with `steps` it trains no longer."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    names = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            if steps:
                source = re.sub(r"STEPS, BATCH, POOL = \d+, \d+, \d+", f"STEPS, BATCH, POOL = {steps}, 16, 32", source)
            exec(compile(source, cell["id"], "exec"), names)
    return names


def test_each_part_is_the_packages_and_the_whole_trains(monkeypatch, capsys):
    names = run_cells(monkeypatch, steps=3)
    assert capsys.readouterr().out.count("as contrastive's") == 8 and len(names["losses"]) == 3


def test_nothing_of_the_machine_it_was_run_on_is_saved():
    text = NOTEBOOK.read_text()
    assert not re.search(r"/(home|root|tmp|work|Users)\b", text) and '"output_type": "error"' not in text


@pytest.mark.slow
def test_it_learns(monkeypatch, capsys):
    names = run_cells(monkeypatch)
    assert names["accuracy"] > 20 and names["losses"][-1] < names["losses"][0] / 1.5
