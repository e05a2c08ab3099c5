"""scripts/index.py: what it prints, what it refuses, and what it leaves alone."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shard_writing import pairs, write_tar
from web_server import WebServer

from contrastive.commands.index_command import main
from contrastive.data.shards.remote import copy_path
from contrastive.data.shards.shard_index import INDEX_FOLDER, read_index
from contrastive.data.sources import open_source
from contrastive.errors import UserError

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "index.py"


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.setenv("CONTRASTIVE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        write_tar(folder / f"{number}.tar", [*pairs(f"{number}-0", f"{number}-1"), ("x.txt", b"no image")])
    return folder


def altered(path):
    """Flip one byte of an image and keep size and time."""
    state = os.stat(path)
    data = bytearray(path.read_bytes())
    data[data.index(b"jpg of")] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_it_prints_totals_and_where_the_index_is(shards, capsys):
    main([f"{shards}/*.tar", "--workers", "2"])
    printed = capsys.readouterr().out
    assert "shards    3" in printed and "samples   9" in printed and "captioned 6" in printed
    assert "refused   3 (3 missing_image)" in printed and f"index     {shards}/{INDEX_FOLDER}" in printed
    assert all(len(entry.summary.sha256) == 64 for entry in read_index(shards / INDEX_FOLDER))
    main([f"{shards}/*.tar", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["refused"]) == (9, {"missing_image": 3})
    assert found["index"] == [f"{shards}/{INDEX_FOLDER}"]


def test_it_adds_the_sha256_that_training_did_not_need(shards, capsys):
    open_source(f"{shards}/*.tar")
    with pytest.raises(UserError, match="0.tar was indexed without a sha256.*2 more shards fail too"):
        main([f"{shards}/*.tar", "--verify", "--workers", "1"])
    main([f"{shards}/*.tar"])
    main([f"{shards}/*.tar", "--verify"])
    assert "every shard is as it was" in capsys.readouterr().err


@pytest.mark.parametrize("spec", ["{}/{{0..2}}.tar", "{}/.contrastive-index", "{}/.contrastive-index/manifest.json"])
def test_verify_finds_a_shard_altered_in_place(shards, spec):
    main([f"{shards}/*.tar"])
    index = (shards / INDEX_FOLDER / "manifest.json").read_bytes()
    altered(shards / "1.tar")
    with pytest.raises(UserError, match="1.tar was altered in place: its size is the same, its sha256 is not"):
        main([spec.format(shards), "--verify"])
    (shards / "1.tar").unlink()
    with pytest.raises(UserError, match="1.tar"):
        main([spec.format(shards), "--verify"])
    assert (shards / INDEX_FOLDER / "manifest.json").read_bytes() == index


def test_verify_does_not_mind_a_new_date(shards):
    main([f"{shards}/*.tar"])
    os.utime(shards / "1.tar", (1, 1))
    main([f"{shards}/*.tar", "--verify"])


def test_verify_needs_an_index(shards):
    with pytest.raises(UserError, match="3 shards have no index; run contrastive index without --verify"):
        main([f"{shards}/*.tar", "--verify"])


def test_remote_shards(shards, capsys):
    web = WebServer({f"{number}.tar": (shards / f"{number}.tar").read_bytes() for number in range(3)})
    try:
        spec = web.url + "/{0..2}.tar"
        main([spec])
        assert "samples   9" in capsys.readouterr().out
        main([spec, "--verify"])
        altered(Path(copy_path(f"{web.url}/1.tar")))
        with pytest.raises(UserError, match="1.tar: its local copy was altered and is deleted"):
            main([spec, "--verify"])
        main([spec, "--verify"])
        assert web.requests == {"0.tar": 1, "1.tar": 2, "2.tar": 1}
    finally:
        web.close()


def test_a_remote_shard_that_was_replaced_is_indexed_anew_when_forced(shards, tmp_path):
    web = WebServer({f"{number}.tar": (shards / f"{number}.tar").read_bytes() for number in range(3)})
    try:
        spec = web.url + "/{0..2}.tar"
        main([spec])
        os.unlink(copy_path(f"{web.url}/1.tar"))
        path = write_tar(tmp_path / "new.tar", pairs("new-0", "new-1", "new-2"))
        web.files["1.tar"] = Path(path).read_bytes()
        with pytest.raises(UserError, match="but .* when indexed") as caught:
            open_source(spec)[3]
        _, *told = shlex.split(re.search("`contrastive (.*)`", str(caught.value))[1])
        main([spec])  # sees nothing new
        assert len(open_source(spec)) == 9
        web.requests.clear()
        main(told)
        source = open_source(spec)
        assert len(source) == 9 and source[3].captions == ("txt of new-0",)
        assert web.requests == {"1.tar": 1}
    finally:
        web.close()


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"PK"), lambda path: path.unlink()])
def test_force_mends_a_damaged_index(shards, damage):
    main([f"{shards}/*.tar"])
    damage(shards / INDEX_FOLDER / "1.tar.npz")
    with pytest.raises(UserError, match="run contrastive index on the data with --force"):
        open_source(str(shards / INDEX_FOLDER))[3]
    main([f"{shards}/*.tar", "--force"])
    assert open_source(f"{shards}/*.tar")[3].captions == ("txt of 1-0",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "SPEC is missing"),
        (["{}/*.tar", "--verfy"], "unknown flag --verfy. Did you mean 'verify'"),
        (["{}/*.tar", "--verify", "--force"], "give --verify or --force, not both"),
        (["{}/0.tar", "{}/1.tar"], "this takes one value, not also .*/1.tar'; quote a pattern"),
        (["{}/*.tar", "--workers", "0"], "--workers is 0; it must be 1 or more"),
        (["{}/9.tar"], "no file or folder"),
        (["{}"], "data is no .tar shard; other data needs no index"),
        (["pipe:touch canary"], "'pipe:touch canary': not read"),
        (["ftp://host/x.tar"], "'ftp://host/x.tar': not read"),
    ],
)
def test_what_is_refused(shards, arguments, message, monkeypatch):
    monkeypatch.chdir(shards)
    with pytest.raises(UserError, match=message) as caught:
        main([argument.format(shards) for argument in arguments])
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(shards)) == ["0.tar", "1.tar", "2.tar"]


def test_a_mistake_is_one_line_and_status_2(shards):
    done = subprocess.run([sys.executable, SCRIPT, f"{shards}/9.tar"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("index.py: error: no file") and done.stderr.count("\n") == 1


def test_a_killed_build_goes_on(shards, tmp_path):
    """One shard comes slowly from a server; the build is killed while it waits for it."""
    web = WebServer({f"{number}.tar": (shards / f"{number}.tar").read_bytes() for number in range(3)})
    try:
        web.faults["2.tar"] = ["stall"]
        spec = web.url + "/{0..2}.tar"
        process = subprocess.Popen([sys.executable, SCRIPT, spec, "--workers", "1"], start_new_session=True)
        limit = time.monotonic() + 60
        while not web.requests["2.tar"] and time.monotonic() < limit:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not list((tmp_path / "cache" / "index").glob("*/manifest.json"))
        for number in (0, 1):
            os.unlink(copy_path(f"{web.url}/{number}.tar"))
        main([spec])
        assert web.requests == {"0.tar": 1, "1.tar": 1, "2.tar": 2}
        assert len(open_source(spec)) == 9
    finally:
        web.close()
