"""What pyproject.toml declares is what is imported, and what is missing is said with the extra that brings it."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from contrastive.data.sources import open_source
from contrastive.errors import EXTRAS, UserError
from contrastive.evaluate.feature_probes import HeadTask
from contrastive.interop.formats.transformers_config import library_defaults

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAMES = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "open_clip": "open-clip-torch",
    "faiss": "faiss-cpu",
}
# Imported, and neither everyone's nor an extra's.
UNDECLARED = {
    "triton": "torch brings the version that goes with it, where it has one",
    "usearch": "what a search uses in the place of faiss, where that is what is installed",
}
# Declared, and imported by others.
UNSEEN = {
    "sentencepiece": "transformers reads the vocabularies of SigLIP and Gemma with it",
    "onnx": "torch's exporter writes with it",
    "onnxscript": "torch's exporter makes its graphs with it",
    "requests": "clip-benchmark imports it without asking for it",
    "s3fs": "fsspec's s3://",
    "gcsfs": "fsspec's gs://",
    "tensorboard": "accelerate's tracker",
    "wandb": "accelerate's tracker",
    "trackio": "accelerate's tracker",
}
IN_OWN_WORDS = {
    "clip_benchmark.py": "names its extra whatever of it is missing",
    "search.py": "either of two packages will do",
    "onnx_example.py": "goes into exported folders, and runs without this package",
}
BESIDE_USE = {"dev", "docs"}  # extras of those who change the package


def plain(requirement: str) -> str:
    """The name of a distribution as registries compare it."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def declared() -> dict[str, set[str]]:
    """Names of distributions, by extra; '' for what everyone gets."""
    parts = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    return {
        extra: {plain(one) for one in parts[extra]} - {PROJECT["name"]} for extra in parts if extra not in BESIDE_USE
    }


def imported() -> dict[str, set[Path]]:
    """Third-party packages that are imported anywhere in the package, in functions too, with the files that do."""
    found = {}
    for path in (ROOT / "contrastive").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"contrastive"}:
                found.setdefault(name, set()).add(path)
    return found


def test_what_is_imported_is_declared():
    of_extras = set.union(*(names for extra, names in declared().items() if extra))
    for name in imported().keys() - UNDECLARED:
        distribution = plain(NAMES.get(name, name))
        if distribution in declared()[""]:
            assert name not in EXTRAS, f"{name} is everyone's"
        else:
            assert distribution in of_extras, f"{name} is imported and declared nowhere"


def test_what_is_declared_is_imported():
    used = {plain(NAMES.get(name, name)) for name in imported()} | UNSEEN.keys()
    assert set.union(*declared().values()) - used == set()


def test_what_an_extra_brings_is_asked_for_by_its_name():
    for name, paths in imported().items():
        if name in UNDECLARED or plain(NAMES.get(name, name)) in declared()[""]:
            continue
        for path in paths:
            if path.name not in IN_OWN_WORDS:
                assert plain(NAMES.get(name, name)) in declared()[EXTRAS[name]]
                assert re.search(rf'needs\([^)]*"{name}"', path.read_text()), f"{path} imports {name} without needs()"


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("datasets", lambda: open_source("hf:someone/something")),
        ("sklearn", lambda: HeadTask("digits", "digits:test").check()),
        ("transformers", lambda: library_defaults("clip", "Vision")),
    ],
)
def test_what_is_missing_is_said_with_its_extra(monkeypatch, name, use):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"needs {name}, .* pip install 'contrastive\[{EXTRAS[name]}\]'"):
        use()
