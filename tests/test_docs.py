"""docs/architecture.md against the tree: what it names is there, and its two ways are as short as it says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "architecture.md").read_text("utf-8")


def way(title: str) -> list[str]:
    section = TEXT.partition(f"## {title}")[2].partition("\n## ")[0]
    return re.findall(r"^\d+\. `([^`]+)`", section, flags=re.MULTILINE)


@pytest.mark.parametrize("path", sorted({*re.findall(r"`((?:contrastive|scripts|tests)/[\w/]+\.py)`", TEXT)}))
def test_files_it_names_are_there(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize(("title", "most"), [("One image, from tar to gradient", 15), ("`--loss sigmoid`", 8)])
def test_ways_are_short(title, most):
    files = way(title)
    assert len(files) == len(set(files)) <= most
    assert len(files) > most // 2, "the list was not found"
    assert all((ROOT / file).is_file() for file in files)
