import json
import os
import stat

import pytest

from contrastive.errors import UserError
from contrastive.files import cache_folder, claim_folder, locked, read_json, sha256, write_json, write_whole

CLAIM = {"record": "record.json", "of": "a test", "mend": "give another --out"}


@pytest.mark.parametrize("content", ["größe\n", "größe\n".encode(), lambda file: file.write("größe\n".encode())])
def test_a_file_is_written_whole_and_leaves_nothing_beside_it(tmp_path, content):
    path = tmp_path / "a.txt"
    write_whole(path, content)
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


def test_text_that_is_no_utf8_is_written_escaped(tmp_path):
    write_json(tmp_path / "a.json", {"name": "a\udcff"})
    assert json.loads((tmp_path / "a.json").read_text("utf-8"))["name"] == "a\udcff"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no a.json"), ("{", "is not JSON"), ("[1]", "does not hold a JSON object"), ("[" * 10**5, "nested")],
)
def test_json_that_cannot_be_read_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.json").write_text(content)
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
