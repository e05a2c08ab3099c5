"""What the wheel and the sdist carry, and the files of a public project: one version in all of them."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import contrastive

ROOT = Path(__file__).resolve().parents[1]
CARRIED = {
    "contrastive/py.typed",
    "contrastive/words.md",
    "contrastive/configs/quickstart.yaml",
    "contrastive/configs/suites/standard.yaml",
    "contrastive/data/digits.csv.gz",
    "contrastive/data/classes/cifar10.txt",
    "contrastive/data/templates/photo.txt",
    "contrastive/interop/card.md.jinja",
}
CARRIED |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "contrastive" / "pages").iterdir() if path.is_file()}


def check_wheel(names: set[str]) -> None:
    assert names >= CARRIED
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"contrastive"}
    assert not [name for name in names if "__pycache__" in name]


def test_the_wheel_carries_what_it_needs_and_no_more():
    wheel = pytest.importorskip("hatchling.builders.wheel")
    check_wheel({one.distribution_path for one in wheel.WheelBuilder(str(ROOT)).recurse_included_files()})


@pytest.mark.slow
def test_wheel_and_sdist_are_built(tmp_path):
    pytest.importorskip("build")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    name = f"contrastive-{contrastive.__version__}"
    assert (wheel.name, sdist.name) == (f"{name}-py3-none-any.whl", f"{name}.tar.gz")
    with zipfile.ZipFile(wheel) as opened:
        check_wheel(set(opened.namelist()))
        commands = opened.read(f"{name}.dist-info/entry_points.txt").decode()
    assert "contrastive = contrastive.entry:main" in commands
    with tarfile.open(sdist) as opened:
        held = {member.name.removeprefix(f"{name}/") for member in opened}
    assert held >= {"pyproject.toml", "LICENSE", "CHANGELOG.md", "configs/quickstart.yaml", "tests/test_config.py"}


def test_one_version():
    newest = re.search(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert newest == str(citation["version"]) == contrastive.__version__
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}  # what the format asks for


def test_a_forge_runs_what_a_clone_runs():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())["jobs"]
    steps = [step.get("run", "").partition("#")[0].strip() for step in jobs["tests"]["steps"]]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"make lint", "make test"} <= {*steps}
    assert all(step.removeprefix("make ") in targets for step in steps if step.startswith("make "))
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    assert jobs["tests"]["strategy"]["matrix"]["python"][0] == oldest
    assert all(hook["language"] == "system" for hook in hooks())  # offline


def hooks() -> list[dict]:
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {repo["repo"] for repo in repos} == {"local"}
    return [hook for repo in repos for hook in repo["hooks"]]
