"""Editors and type checkers know the public API: pyright takes its uses, and its names complete."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import contrastive

USES = Path(__file__).with_name("typing_uses.py")


def test_pyright_takes_the_uses():
    pytest.importorskip("pyright")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, USES]
    done = subprocess.run(command, capture_output=True, text=True, cwd=USES.parents[1])
    if not done.stdout.startswith("{"):
        pytest.skip(f"pyright does not run here: {done.stderr.strip().splitlines()[-1:]}")
    report = json.loads(done.stdout)
    assert [f"{one['range']['start']['line'] + 1}: {one['message']}" for one in report["generalDiagnostics"]] == []


def test_names_complete():
    names = dir(contrastive)
    assert {"create_model", "list_models", "load", "load_image_encoder", "losses", "models", "__version__"} <= {*names}
    assert all(hasattr(contrastive, name) for name in names)
    assert (Path(contrastive.__file__).parent / "py.typed").exists()
