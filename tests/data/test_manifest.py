"""The index of shards: made once, resumed, kept up to date, and all that training opens."""

import json
import os
import threading
import time

import pytest
from filelock import FileLock
from shard_writing import pairs, write_tar

from contrastive.data.shards import indexing
from contrastive.data.shards.indexing import index_shards
from contrastive.data.shards.shard_index import INDEX_FOLDER, IndexFolder, load_index, read_index
from contrastive.data.sources import open_source
from contrastive.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONTRASTIVE_CACHE", str(tmp_path / "cache"))
    load_index.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def shards(tmp_path):
    """A folder of five shards with 1 to 5 samples."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(5):
        write_tar(folder / f"{number}.tar", pairs(*(f"{number}-{row}" for row in range(number + 1))))
    return folder


@pytest.fixture
def walked(monkeypatch):
    """The shards whose headers are walked, in this process."""
    seen, walk = [], indexing.index_shard
    monkeypatch.setattr(
        indexing, "index_shard", lambda path, digest: seen.append(os.path.basename(path)) or walk(path, digest)
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    return seen


def test_the_second_opening_walks_no_shard(shards, walked):
    first = open_source(f"{shards}/*.tar")
    assert sorted(walked) == [f"{number}.tar" for number in range(5)]
    second = open_source(f"{shards}/*.tar")
    assert len(walked) == 5
    assert first.fingerprint == second.fingerprint
    assert [second[index] for index in range(15)] == [first[index] for index in range(15)]
    assert list(second.shard_sizes) == [1, 2, 3, 4, 5] and second.captioned and not second.labelled
    assert [entry.summary.sha256 for entry in read_index(shards / INDEX_FOLDER)] == [None] * 5


def test_folders_share_one_manifest_but_a_source_has_its_own_shards(shards, walked):
    open_source(f"{shards}/{{0..1}}.tar")
    source = open_source(f"{shards}/{{1..2}}.tar")
    assert walked == ["0.tar", "1.tar", "2.tar"]
    assert list(source.shard_sizes) == [2, 3] and source[0].captions == ("txt of 1-0",)
    assert len(open_source(f"{shards}/{INDEX_FOLDER}")) == 6


def test_a_changed_shard_is_indexed_anew_and_changes_the_fingerprint(shards, walked):
    before = open_source(f"{shards}/*.tar")
    write_tar(shards / "3.tar", pairs("other", "more"))
    after = open_source(f"{shards}/*.tar")
    assert walked[5:] == ["3.tar"]
    assert after.fingerprint != before.fingerprint and list(after.shard_sizes) == [1, 2, 3, 2, 5]
    assert after[6].captions == ("txt of other",)
    fewer = open_source(f"{shards}/{{0..3}}.tar")
    assert fewer.fingerprint != after.fingerprint


def test_an_interrupted_build_goes_on(shards, walked, monkeypatch):
    walk = indexing.index_shard

    def stopped(path, digest):
        if path.endswith("3.tar"):
            raise KeyboardInterrupt
        return walk(path, digest)

    with monkeypatch.context() as patched:
        patched.setattr(indexing, "index_shard", stopped)
        patched.setattr(IndexFolder, "add", lambda folder, rows: None)  # as a kill would
        with pytest.raises(KeyboardInterrupt):
            open_source(f"{shards}/*.tar")
    assert not (shards / INDEX_FOLDER / "manifest.json").exists()
    walked.clear()
    assert len(open_source(f"{shards}/*.tar")) == 15
    assert walked == ["3.tar", "4.tar"]


def test_one_damaged_shard_does_not_cost_the_others_their_index(shards, walked):
    for number in (1, 3):
        (shards / f"{number}.tar").write_bytes(b"<html>" * 200)
    with pytest.raises(UserError, match=r"1\.tar is not a tar archive .*\(1 more shards cannot be indexed either\)"):
        open_source(f"{shards}/*.tar")
    write_tar(shards / "1.tar", pairs("a"))
    write_tar(shards / "3.tar", pairs("b"))
    walked.clear()
    assert len(open_source(f"{shards}/*.tar")) == 1 + 1 + 3 + 1 + 5
    assert walked == ["1.tar", "3.tar"]


def test_processes_make_the_same_index(shards, tmp_path):
    entries = index_shards([f"{shards}/{number}.tar" for number in range(5)], digest=True, workers=3)
    assert [entry.summary.samples for entry in entries] == [1, 2, 3, 4, 5]
    assert all(len(entry.summary.sha256) == 64 for entry in entries)
    assert len(open_source(f"{shards}/*.tar")) == 15


def test_a_folder_that_is_not_to_be_written_to_is_left_alone(shards, cache):
    shards.chmod(0o555)
    try:
        assert len(open_source(f"{shards}/*.tar")) == 15
        assert not (shards / INDEX_FOLDER).exists()
        (folder,) = (cache / "index").iterdir()
        assert len(open_source(str(folder))) == 15
        assert open_source(str(folder / "manifest.json"))[14].captions == ("txt of 4-4",)
    finally:
        shards.chmod(0o755)


def test_a_moved_folder_keeps_its_index(shards, walked, tmp_path):
    open_source(f"{shards}/*.tar")
    shards.rename(tmp_path / "elsewhere")
    source = open_source(f"{tmp_path}/elsewhere/*.tar")
    assert len(walked) == 5 and source[0].captions == ("txt of 0-0",)


def test_processes_that_start_together_index_once(shards, walked, monkeypatch):
    written, add = [], IndexFolder.add
    monkeypatch.setattr(IndexFolder, "add", lambda folder, rows: written.append(len(rows)) or add(folder, rows))
    (shards / INDEX_FOLDER).mkdir()
    lock = FileLock(str(shards / INDEX_FOLDER / "lock"))
    with lock:
        opened = []
        threads = [threading.Thread(target=lambda: opened.append(open_source(f"{shards}/*.tar"))) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        assert not opened and not walked
    for thread in threads:
        thread.join(30)
    assert len(opened) == 2 and len(walked) == 5 and written == [5]


def test_counts_are_of_what_the_shards_hold(tmp_path):
    members = [
        ("a.jpg", b"A"), ("a.json", b'{"captions": ["x"], "width": 3, "label": 4}'),
        ("b.jpg", b"B"), ("b.json", b'{"caption": null, "label": "jay"}'),
        ("c.jpg", b"C"), ("c.cls", b"7"),
        ("d.jpg", b"D"), ("d.json", b"{broken"),
        ("e.txt", b"no image"),
        ("f.jpg", b"F"), ("f.jpg", b"G"),
    ]  # fmt: skip
    (entry,) = index_shards([write_tar(tmp_path / "x.tar", members)], digest=False)
    summary = entry.summary
    assert (summary.samples, summary.captions, summary.labels, summary.label_names) == (6, 1, 2, 1)
    assert summary.fields == ("caption", "captions", "label", "width")
    assert summary.refused == {
        reason: {"count": 1, "keys": [key]}
        for reason, key in (("bad_json", "d"), ("missing_image", "e"), ("duplicate_member", "f"))
    }


def test_a_shard_that_is_still_being_written_is_refused(tmp_path, monkeypatch):
    path, count = write_tar(tmp_path / "x.tar", pairs("a")), indexing._count

    def meanwhile(path, index):
        with open(path, "ab") as file:
            file.write(bytes(512))
        return count(path, index)

    monkeypatch.setattr(indexing, "_count", meanwhile)
    with pytest.raises(UserError, match="x.tar changed while it was read; index it when it is complete"):
        open_source(path)
    assert not (tmp_path / INDEX_FOLDER / "x.tar.npz").exists()


def test_weights_of_captions(tmp_path):
    members = [
        ("a.jpg", b"A"), ("a.json", b'{"captions": ["x", "y"], "weights": [1, 3], "alt": "z"}'),
        ("b.jpg", b"B"), ("b.json", b'{"captions": ["x", "y"], "weights": [1]}'),
    ]  # fmt: skip
    path = write_tar(tmp_path / "x.tar", members)
    assert open_source(path)[0].caption_weights == (1.0, 3.0)
    with pytest.raises(Exception, match="bad_weights"):
        open_source(path)[1]
    several = open_source(path, caption_column="captions=3,alt=1")[0]
    assert several.captions == ("x", "y", "z") and several.caption_weights == (1.5, 1.5, 1.0)
    with pytest.raises(UserError, match="no caption field 'dens' in the JSON"):
        open_source(path, caption_column="captions,dens")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", b"{", "cannot be read as an index of shards"),
        ("manifest.json", b'{"format": "other"}', "cannot be read as an index of shards .it is some other file"),
        ("2.tar.npz", b"PK", "2.tar.npz: the index of this shard is damaged"),
        ("2.tar.npz", None, "2.tar.npz: the index of this shard is missing; run contrastive index"),
    ],
)
def test_a_damaged_index_is_refused(shards, name, content, message):
    open_source(f"{shards}/*.tar")
    path = shards / INDEX_FOLDER / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_source(f"{shards}/{INDEX_FOLDER}")[3]


def test_names_that_are_no_file_names_do_not_meet(tmp_path):
    folder = IndexFolder(str(tmp_path), "https://host/data")
    names = ["0.tar", "0.tar?a=1", "0.tar?a=2", "0.tar_a_1", "../0.tar"]
    paths = [folder.index_path(name) for name in names]
    assert len(set(paths)) == len(names)
    assert {os.path.dirname(path) for path in paths} == {str(tmp_path)}


def test_a_manifest_of_something_else_is_left_to_others(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": "a web app"}')
    with pytest.raises(UserError, match="image"):
        open_source(str(tmp_path))


def test_an_index_of_another_state_of_the_shard_is_refused(shards):
    source = open_source(f"{shards}/*.tar")
    write_tar(shards / "2.tar", pairs("other"))
    open_source(f"{shards}/*.tar")
    with pytest.raises(UserError, match="2.tar.npz: the index of this shard is not the one that its manifest lists"):
        source[3]


def test_an_index_of_another_version_is_made_anew(shards, walked):
    open_source(f"{shards}/*.tar")
    path = shards / INDEX_FOLDER / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 0}))
    with pytest.raises(UserError, match="no index of shards of this version"):
        open_source(str(path))
    assert len(open_source(f"{shards}/*.tar")) == 15
