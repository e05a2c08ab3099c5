"""Rows of the fault matrix about checkpoints that are not as they were written."""

import shutil

import pytest
from launching import assert_same_run, pretrain_here
from tiny_run import TINY

from contrastive.errors import UserError
from contrastive.files import sha256

PAGE = 4096


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero_a_page(path):
    content = bytearray(path.read_bytes())
    content[-PAGE:] = bytes(min(PAGE, len(content)))
    path.write_bytes(content)


def remove(path):
    path.unlink()


DAMAGES = {truncate: "is damaged", zero_a_page: "is damaged", remove: "is missing"}
FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "config.json", "tokenizer/tokenizer.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 9 steps, with a checkpoint every 3."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.yaml").write_text(TINY)
    pretrain_here("--config", folder / "tiny.yaml", "--run_folder", folder / "run")
    return folder / "run"


@pytest.fixture
def run(whole, tmp_path):
    """The same, before its end."""
    shutil.copytree(whole, tmp_path / "run")
    for later in ("final", "checkpoints/step-00000009"):
        shutil.rmtree(tmp_path / "run" / later)
    (tmp_path / "run" / "report.html").unlink()
    return tmp_path / "run"


def resume_past(run, name, words, whole, capsys):
    """The newest, damaged in this file, is passed over aloud for the one before, with the same end."""
    capsys.readouterr()
    pretrain_here("--run_folder", run, "--resume")
    told = capsys.readouterr().err
    assert f"checkpoint passed over: step-00000006: {name} {words}" in told and "from step-00000003" in told
    assert_same_run(run, whole)


@pytest.mark.parametrize("name", FILES[:3])
def test_row_6_a_flipped_bit_in_the_newest(name, run, whole, capsys):
    flip_a_bit(run / "checkpoints" / "step-00000006" / name)
    resume_past(run, name, "is damaged", whole, capsys)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", FILES[:3])
def test_row_7_a_file_truncated_zeroed_or_missing(damage, name, run, whole, capsys):
    damage(run / "checkpoints" / "step-00000006" / name)
    resume_past(run, name, DAMAGES[damage], whole, capsys)


def test_row_8_all_bad_is_never_a_fresh_start(run):
    checkpoints = sorted((run / "checkpoints").iterdir())
    for checkpoint, damage in zip(checkpoints, (flip_a_bit, truncate, remove), strict=True):
        damage(checkpoint / "model.safetensors")
    before = {path: sha256(path) for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="all are damaged: step-00000006: .*; step-00000003: .*; step-00000000: "):
        pretrain_here("--run_folder", run, "--resume")
    assert before == {path: sha256(path) for path in run.rglob("*") if path.is_file()}
