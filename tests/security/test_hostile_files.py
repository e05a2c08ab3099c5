"""Whatever files hold, a reader gives a result, one clear line or counted bad samples: limits in sandbox.py."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.config import parse
from contrastive.data.class_joining import read_class_file
from contrastive.data.decode import decode
from contrastive.data.prompts import load_templates
from contrastive.data.record import BadSample
from contrastive.data.sources.beside import json_fields
from contrastive.errors import UserError, one_line
from contrastive.evaluate.suite import read_suite
from contrastive.files import read_json, read_yaml
from contrastive.train.contrastive_task import PretrainConfig

HERE = Path(__file__).resolve().parent
LEAST_READERS, LEAST_INPUTS = 45, 400

alike = settings(max_examples=60, derandomize=True, deadline=None, database=None)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("seconds", ["0.07", pytest.param("0.15", marks=pytest.mark.slow)])
def test_changed_files_do_no_harm(seconds, tmp_path):
    """So many seconds of CPU time a reader."""
    out = tmp_path / "found.json"
    command = [sys.executable, HERE / "long_run.py", "--seconds", seconds, "--json", out]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert out.exists(), done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert not found["harm"], "\n".join(map(str, found["harm"]))
    assert len(found["counts"]) >= LEAST_READERS and min(sum(c.values()) for c in found["counts"].values()) > 0
    assert sum(sum(count.values()) for count in found["counts"].values()) >= LEAST_INPUTS


def told(read, *arguments):
    """Read; a refusal is one line."""
    try:
        return read(*arguments)
    except BadSample:
        return None
    except UserError as error:
        assert str(error) == one_line(str(error)) and "\n" not in str(error)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("hypothesis")


@alike
@given(data=st.binary(max_size=300))
def test_any_bytes(place, data):
    told(decode, data)
    for name in ("x.json", "x.txt"):
        (place / name).write_bytes(data)
        for read in (read_json, read_class_file, lambda path: load_templates(str(path))):
            told(read, place / name)
    told(read_yaml, place / "x.json", "the file")


@alike
@given(value=VALUES)
def test_any_json(place, value):
    text = json.dumps(value)
    (place / "x.json").write_text(text)
    for read in (read_json, read_class_file, read_suite, lambda path: load_templates(str(path))):
        told(read, place / "x.json")
    with contextlib.suppress(ValueError):
        json_fields(text.encode())


@settings(alike, max_examples=25)
@given(name=st.sampled_from(["loss", "model", "train", "train.steps", "data.eval", "data.augment"]), value=VALUES)
def test_any_option(place, name, value):
    (place / "x.yaml").write_text(json.dumps({name: value}))
    told(lambda: parse(PretrainConfig, [], place / "x.yaml", prog="test", description=""))
