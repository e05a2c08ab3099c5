"""Faults of the network: retried where that may help, else one line that names the URL. Same data either way."""

import hashlib
import time

import pytest
from shard_writing import pairs, write_tar
from web_server import WebServer

from contrastive.data.shards import remote
from contrastive.data.shards.indexing import index_shards
from contrastive.data.shards.shard_source import _open_remote
from contrastive.data.sources import open_source
from contrastive.errors import UserError


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.setenv("CONTRASTIVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote, "TIMEOUT", 0.5)
    _open_remote.cache_clear()


@pytest.fixture
def web(tmp_path):
    """Three shards of 20 samples on a local server, indexed, without copies in the cache."""
    files = {}
    for number in range(3):
        path = write_tar(tmp_path / f"{number}.tar", pairs(*(f"{number}-{row}" for row in range(20))))
        with open(path, "rb") as file:
            files[f"{number}.tar"] = file.read()
    server = WebServer(files)
    urls = [f"{server.url}/{number}.tar" for number in range(3)]
    index_shards(urls, digest=True)
    for url in urls:
        (tmp_path / "cache" / "shards" / remote.copy_path(url)).unlink()
    server.requests.clear()
    yield server
    server.close()


def records(source):
    return [source[index] for index in range(len(source))]


@pytest.mark.parametrize(
    ("faults", "requests"),
    [
        ([], 1),
        ([503, 503], 3),
        ([500, 429, 408], 4),
        (["cut", "cut"], 3),
        (["stall"], 2),
        (["reset", "cut", 502], 4),
        (["slow"], 1),
    ],
)
def test_row_28_what_may_pass_is_tried_again_and_gives_the_same_samples(web, tmp_path, faults, requests):
    local = open_source(f"{tmp_path}/{{0..2}}.tar")
    web.faults["1.tar"] = list(faults)
    source = open_source(web.url + "/{0..2}.tar")
    assert not web.requests
    assert records(source) == records(local)
    assert source.fingerprint == local.fingerprint
    assert web.requests == {"0.tar": 1, "1.tar": requests, "2.tar": 1}


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "1.tar: the server answers 404 Not Found; there is no such file"),
        (403, "1.tar: the server answers 403 Forbidden; access is denied"),
        (401, "1.tar: the server answers 401 Unauthorized; it asks for credentials"),
    ],
)
def test_row_28_what_will_not_pass_fails_at_once(web, status, message):
    web.faults["1.tar"] = [status]
    source = open_source(web.url + "/{0..2}.tar")
    with pytest.raises(UserError, match=message) as caught:
        source[20]
    assert web.url in str(caught.value) and "\n" not in str(caught.value)
    assert web.requests == {"1.tar": 1}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (503, "the server answers 503"),
        ("cut", r"it was cut off after 15360 of 30720 bytes|it was cut off after \d+ of \d+ bytes"),
        ("stall", "nothing came for 0.5 s"),
    ],
)
def test_row_28_a_lasting_fault_ends_in_one_line(web, fault, reason, monkeypatch, tmp_path):
    monkeypatch.setattr(remote, "ATTEMPTS", 3)
    web.faults["0.tar"] = [fault] * 10
    source = open_source(web.url + "/{0..2}.tar")
    started = time.monotonic()
    with pytest.raises(UserError, match=f"0.tar: not downloaded after 3 attempts, at last because ({reason})"):
        source[0]
    assert time.monotonic() - started < 5
    assert web.requests == {"0.tar": 3}
    left = [path.name for path in (tmp_path / "cache" / "shards").iterdir() if path.suffix != ".lock"]
    assert left == []


def test_row_28_a_server_that_is_gone_ends_in_one_line(web, monkeypatch):
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    source = open_source(web.url + "/{0..2}.tar")
    web.close()
    with pytest.raises(UserError, match="0.tar: not downloaded after 2 attempts, at last because the connection"):
        source[0]


def test_row_28_waits_grow_up_to_a_limit(web, monkeypatch):
    waits = []
    monkeypatch.setattr(remote, "FIRST_WAIT", 8.0)
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    web.faults["0.tar"] = [503] * 10
    with pytest.raises(UserError):
        open_source(web.url + "/{0..2}.tar")[0]
    assert waits == [8, 16, 30, 30, 30]


def test_row_28_another_file_under_the_same_name_is_refused(web):
    source = open_source(web.url + "/{0..2}.tar")
    whole, command = web.files["0.tar"], f"run `contrastive index {web.url}/0.tar --force`"
    web.files["0.tar"] = whole + bytes(512)
    with pytest.raises(UserError, match=f"has {len(whole) + 512} bytes, but {len(whole)} when indexed; .*{command}"):
        source[0]
    assert web.requests == {"0.tar": 1}
    other = web.files["0.tar"] = whole[:600] + b"X" + whole[601:]
    found, known = (hashlib.sha256(data).hexdigest()[:12] for data in (other, whole))
    with pytest.raises(UserError, match=f"its sha256 begins with {found}, but {known} when indexed; .*{command}"):
        source[0]
    assert web.requests == {"0.tar": 3}  # a whole file is fetched once more, in case the way changed it
    web.files["0.tar"] = whole
    assert source[0].captions == ("txt of 0-0",)


def test_row_28_a_file_that_the_way_changed_is_fetched_again(web):
    source = open_source(web.url + "/{0..2}.tar")
    web.faults["0.tar"] = [503, "flip", "cut"]
    assert source[0].captions == ("txt of 0-0",)
    assert web.requests == {"0.tar": 4}
