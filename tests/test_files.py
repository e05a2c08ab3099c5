import json
import os
import stat
import threading

import pytest
import torch
from safetensors.torch import save_file

from contrastive import files
from contrastive.errors import UserError
from contrastive.files import (
    cache_folder,
    claim_folder,
    locked,
    mend_folders,
    problem,
    read_json,
    sha256,
    write_folder,
    write_json,
    write_new_folder,
    write_whole,
)

CLAIM = {"record": "record.json", "of": "a test", "mend": "give another --out"}


@pytest.mark.parametrize("written", ["größe\n", "größe\n".encode(), lambda file: file.write("größe\n".encode())])
def test_a_file_is_written_whole_and_leaves_nothing_beside_it(tmp_path, written):
    path = tmp_path / "a.txt"
    write_whole(path, written)
    assert path.read_text("utf-8") == "größe\n"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")

    def fail(file):
        file.write(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_whole(path, fail)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_new_file_has_the_permissions_that_any_file_has(tmp_path):
    (tmp_path / "plain").write_text("")
    write_whole(tmp_path / "ours", "")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def content(text):
    return lambda folder: (folder / "a").write_text(text)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_is_replaced(can_exchange, tmp_path, monkeypatch):
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    for text in ("old", "new", "newer"):
        write_folder(tmp_path / "final", content(text))
        assert (tmp_path / "final" / "a").read_text() == text and problem(tmp_path / "final") is None
        assert os.listdir(tmp_path) == ["final"]


def test_no_moment_is_without_the_folder(tmp_path):
    write_folder(tmp_path / "final", content("0"))
    missed, done = [], threading.Event()

    def read():
        while not done.is_set():
            try:
                (tmp_path / "final" / "a").stat()
            except FileNotFoundError:
                missed.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(100):
            write_folder(tmp_path / "final", content(str(number)))
    finally:
        done.set()
        reader.join()
    assert not missed


def test_where_the_second_rename_fails_the_old_folder_comes_back(tmp_path, monkeypatch):
    write_folder(tmp_path / "final", content("old"))
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    rename = os.rename

    def fail(one, other):
        if ".tmp-" in str(one):
            raise OSError("gone")
        rename(one, other)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="gone"):
        write_folder(tmp_path / "final", content("new"))
    assert os.listdir(tmp_path) == ["final"] and (tmp_path / "final" / "a").read_text() == "old"


def test_what_a_kill_leaves_is_put_right(tmp_path):
    for name in ("final", ".old-step-1", ".old-step-2", "step-2"):
        write_folder(tmp_path / name, content(name))
    (tmp_path / ".tmp-final").mkdir()
    (tmp_path / ".tmp-final" / "half").touch()
    (tmp_path / ".old-theirs").mkdir()
    mend_folders(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".old-theirs", "final", "step-1", "step-2"]
    assert [(tmp_path / name / "a").read_text() for name in ("step-1", "step-2")] == [".old-step-1", "step-2"]


@pytest.mark.parametrize("write", [write_folder, write_new_folder])
@pytest.mark.parametrize(("umask", "mode"), [(0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
def test_files_are_for_those_that_the_umask_lets_read(write, umask, mode, tmp_path):
    def fill(folder):
        (folder / "deep").mkdir()
        save_file({"a": torch.zeros(3)}, folder / "deep" / "a.safetensors")  # which gives it to its owner alone
        (folder / "b").write_text("b")

    before = os.umask(umask)
    try:
        write(tmp_path / "final", fill)
    finally:
        os.umask(before)
    found = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "final").rglob("*") if path.is_file()}
    assert found == {mode}


def test_text_that_is_no_utf8_is_written_escaped(tmp_path):
    write_json(tmp_path / "a.json", {"name": "a\udcff"})
    assert json.loads((tmp_path / "a.json").read_text("utf-8"))["name"] == "a\udcff"


@pytest.mark.parametrize(
    ("written", "message"),
    [(None, "has no a.json"), ("{", "is not JSON"), ("[1]", "does not hold a JSON object"), ("[" * 10**5, "nested")],
)
def test_json_that_cannot_be_read_is_named(tmp_path, written, message):
    if written is not None:
        (tmp_path / "a.json").write_text(written)
    with pytest.raises(UserError, match=message):
        read_json(tmp_path / "a.json")


def test_a_folder_is_free_where_it_is_new_empty_or_holds_leftovers(tmp_path):
    assert claim_folder(tmp_path / "new" / "deep", **CLAIM) is None
    assert claim_folder(tmp_path, **CLAIM) is None
    (tmp_path / ".a.json.17.partial").touch()
    assert claim_folder(tmp_path, **CLAIM) is None
    (tmp_path / "begun").mkdir()
    assert claim_folder(tmp_path, **CLAIM) is None
    (tmp_path / "begun" / ".a.json.17.partial").touch()
    assert claim_folder(tmp_path, **CLAIM) is None
    (tmp_path / "begun" / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds files that are not of a test"):
        claim_folder(tmp_path, **CLAIM)


def test_a_folder_with_its_record_may_be_taken_again(tmp_path):
    write_json(tmp_path / "record.json", {"model": "m"})
    (tmp_path / "picture.png").touch()
    assert claim_folder(tmp_path, **CLAIM) == {"model": "m"}


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds files that are not of a test; give another --out"):
        claim_folder(tmp_path, **CLAIM)
    with pytest.raises(UserError, match=r"thesis.tex is a file; give another --out"):
        claim_folder(tmp_path / "thesis.tex", **CLAIM)
    with pytest.raises(UserError, match=r"cannot write to .*; give another --out"):
        claim_folder(tmp_path / "thesis.tex" / "below", **CLAIM)
    (tmp_path / "record.json").write_text("[]")
    with pytest.raises(UserError, match=r"record.json is not of a test; give another --out"):
        claim_folder(tmp_path, **CLAIM)


def test_only_files_that_go_with_the_record_count(tmp_path):
    (tmp_path / "thesis.tex").touch()
    assert claim_folder(tmp_path, **CLAIM, only=("table.md",)) is None
    (tmp_path / "table.md").touch()
    with pytest.raises(UserError, match=r"table.md is there without record.json; give another --out"):
        claim_folder(tmp_path, **CLAIM, only=("table.md",))


def test_a_lock_that_another_holds_is_said_at_once(tmp_path):
    with locked(tmp_path / "lock", "busy"), pytest.raises(UserError, match="busy"), locked(tmp_path / "lock", "busy"):
        pass
    with locked(tmp_path / "lock", "busy"):
        pass


def test_the_sum_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(str(tmp_path / "a")) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("CONTRASTIVE_CACHE", str(tmp_path / "cache"))
    assert cache_folder() == str(tmp_path / "cache")
    monkeypatch.setenv("CONTRASTIVE_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == str(tmp_path / ".cache" / "contrastive")
