"""README.md and docs/: each block runs as written, in order, a page in a folder with small stand-ins; links resolve.

What cannot run here says so in a comment before the block (`<!-- not run: needs 8 GPUs -->`); its flags are parsed.
"""

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from doc_blocks import LANGUAGES, PAGES, ROOT, Block, Session, blocks
from yaml import YAMLError

from contrastive.errors import UserError

RUN = """
model:
  embed_dim: 16
  image: {image_size: 32, patch_size: 8, width: 16, depth: 2, num_heads: 2, mlp_dim: 32, pool: average}
  text: {context_length: 24, width: 16, depth: 1, num_heads: 2, mlp_dim: 32}
loss: {name: sigmoid, duplicates: positive}
data: {train: pairs.csv, vocab_size: 300}
train: {steps: 4, global_batch_size: 16}
checkpoint: {every: 2}
"""
SLOW = ("scaling.md", "evaluation.md")  # of half a minute and a quarter


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT)).removeprefix("docs/")


def pages():
    """Those with code; the slow ones are marked."""
    marked = [(page, [pytest.mark.slow] if page.name in SLOW else []) for page in PAGES if blocks(page)]
    return [pytest.param(page, id=name_of(page), marks=marks) for page, marks in marked]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A folder with what the pages speak of: runs, a model of transformers, tables, a photograph. Not to be changed."""
    from contrastive.commands.export_command import main as export
    from contrastive.commands.pretrain_command import main as pretrain
    from contrastive.data.sources import open_source

    folder = tmp_path_factory.mktemp("stand-ins")
    (folder / "photos").mkdir()
    scenes = open_source("scenes:val")
    for table, chosen in (("pairs.csv", range(64)), ("dev.csv", range(64, 88))):
        with (folder / table).open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["filepath", "title"])
            for index in chosen:
                record, path = scenes[index], f"photos/{index}.png"
                save(record.image, folder / path)
                rows.writerows([path, caption] for caption in record.captions[:2])
    shutil.copy(folder / "photos" / "0.png", folder / "photo.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("run.yaml").write_text(RUN)
        pretrain(["--config", "run.yaml", "--run_folder", "runs/mine"])
        shutil.copytree("runs/mine", "runs/other")
        pretrain(["--config", "run.yaml", "--model.image.native", "--run_folder", "runs/native"])
        export(["runs/mine", "--to", "transformers", "models/siglip"])
    return folder


def save(image, path: Path) -> None:
    from PIL import Image

    Image.fromarray(image).save(path)


@pytest.fixture
def session(stand_ins, tmp_path, monkeypatch):
    """A page's folder; what its components registered is forgotten afterwards."""
    from contrastive.data.sources import SOURCES
    from contrastive.evaluate.tasks import TASKS
    from contrastive.losses import LOSSES
    from contrastive.objectives import OBJECTIVES

    folder = tmp_path / "page"
    shutil.copytree(stand_ins, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    threads, page = torch.get_num_threads(), Session(monkeypatch)
    torch.set_num_threads(1)
    yield page
    torch.set_num_threads(threads)
    for registry in (SOURCES, TASKS, LOSSES, OBJECTIVES):  # which the program's own modules are entered in once
        for name in registry.names():
            if registry.get(name).__module__ in page.modules:
                del registry._entries[name]
    for name in page.modules:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("page", pages())
def test_blocks_run_as_written(page, session):
    for block in blocks(page):
        try:
            session.run(block)
        except Exception as error:
            raise AssertionError(f"{block.where}: {block.code}") from error


WRONG = [
    ("sh", "contrastive pretrain --data pairs.csv --los sigmoid", "it takes hours"),
    ("sh", "accelerate launch scripts/pretrain.py --los sigmoid", "it takes hours"),
    ("sh", "accelerate launch scripts/pretrain.py --loss sigmoid", None),
    ("sh", "contrastive zero-shot runs/none --data digits:test", None),
    ("sh", "contrastive trian", None),
    ("sh", "make nothing", "it takes hours"),
    ("python", "import contrastive\ncontrastive.laod('runs/mine')", None),
    ("python", "print(", "it takes hours"),
    ("yaml", "a: {", None),
]


@pytest.mark.parametrize(("language", "code", "why"), WRONG, ids=[code for _, code, _ in WRONG])
def test_what_is_wrong_is_seen(session, language, code, why):
    with pytest.raises((UserError, AssertionError, ImportError, AttributeError, SyntaxError, YAMLError)):
        session.run(Block(ROOT / "README.md", 1, language, code, why))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_can_be_told_apart(page):
    text = page.read_text("utf-8")
    unknown = [block.where for block in blocks(page) if block.language not in LANGUAGES]
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?<=\n\n)    \S.*", outside)
    assert not unknown and not indented, "code is fenced, with its language"
    assert text.count("<!-- not run:") == sum(block.not_run is not None for block in blocks(page)), "right before it"


def test_links_of_the_readme():
    text = (ROOT / "README.md").read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert len(links) > 10 and [link for link in links if not (ROOT / link).exists()] == []
    assert len(text.splitlines()) <= 200


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    """Links, anchors and references resolve (strict); and nothing in a page is fetched from elsewhere."""
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fetched = r"""<(?:script|img|iframe)[^>]*\bsrc=["']?(?:https?:)?//|<link[^>]*(?:stylesheet|preconnect)[^>]*//"""
    built = list(tmp_path.rglob("*.html"))
    assert len(built) > 20 and [page.name for page in built if re.search(fetched, page.read_text("utf-8"))] == []
