"""Remote shards: whole copies in a bounded cache that processes share."""

import fcntl
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest
from filelock import FileLock
from shard_writing import pairs, write_tar
from torch.utils.data import DataLoader
from web_server import WebServer

from contrastive.data.shards import remote
from contrastive.data.shards.indexing import index_shards
from contrastive.data.shards.remote import copy_path, open_copy
from contrastive.data.shards.shard_source import _open_remote
from contrastive.data.sources import open_source
from contrastive.errors import UserError

SIZE = 10_000_000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONTRASTIVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    _open_remote.cache_clear()
    yield tmp_path / "cache"
    _open_remote.cache_clear()


@pytest.fixture
def web(tmp_path):
    (tmp_path / "data").mkdir()
    files = {}
    for number in range(4):
        path = write_tar(tmp_path / "data" / f"{number}.tar", pairs(*(f"{number}-{row}" for row in range(5))))
        files[f"{number}.tar"] = Path(path).read_bytes()
    server = WebServer(files)
    yield server
    server.close()


def cached(web):
    return [name for name in sorted(web.files) if os.path.exists(copy_path(f"{web.url}/{name}"))]


def test_shards_without_an_index_are_refused_with_the_command(web):
    spec = web.url + "/{0..3}.tar"
    with pytest.raises(UserError, match="4 of its 4 shards have no index yet; run `contrastive index 'http"):
        open_source(spec)
    assert not web.requests


def test_indexing_downloads_each_shard_once(web, tmp_path):
    urls = [f"{web.url}/{number}.tar" for number in range(4)]
    entries = index_shards(urls, digest=True, workers=2)
    assert [entry.summary.samples for entry in entries] == [5] * 4
    source = open_source(web.url + "/{0..3}.tar")
    assert source.remote and [source[index].captions for index in (0, 19)] == [("txt of 0-0",), ("txt of 3-4",)]
    assert index_shards(urls, digest=True) == entries
    assert web.requests == dict.fromkeys(web.files, 1)


def test_a_damaged_remote_shard_is_named_by_its_url(web):
    web.files["2.tar"] = web.files["2.tar"][:1536]
    with pytest.raises(UserError, match=f"^{web.url}/2.tar is damaged at byte"):
        index_shards([f"{web.url}/{number}.tar" for number in range(4)], digest=True)
    assert cached(web) == ["0.tar", "1.tar", "3.tar"]


def test_class_names_beside_remote_shards(web, tmp_path, capsys):
    members = [("a.jpg", b"A"), ("a.cls", b"1"), ("b.jpg", b"B"), ("b.cls", b"0")]
    web.files["labelled/0.tar"] = Path(write_tar(tmp_path / "l.tar", members)).read_bytes()
    url = f"{web.url}/labelled/0.tar"
    index_shards([url], digest=True)
    assert "has labels but no classes.json or classnames.txt" in capsys.readouterr().err
    assert open_source(url).class_names is None
    web.files["labelled/classnames.txt"] = b"jay\nwren\n"
    shutil.rmtree(tmp_path / "cache" / "index")
    index_shards([url], digest=True)
    source = open_source(url, prompts="plain")
    assert source.class_names == ("jay", "wren") and source[0].captions == ("wren",)
    assert source.remote and list(source.shard_sizes) == [2]  # whatever the captions


def test_a_copy_evicted_while_it_is_opened_is_fetched_anew(web, monkeypatch):
    (url,) = big_files(web, 1)
    fetch(url)
    flock, gone = fcntl.flock, []

    def evicted(descriptor, operation):
        if not gone:
            gone.append(os.unlink(copy_path(url)))
        return flock(descriptor, operation)

    monkeypatch.setattr(remote.fcntl, "flock", evicted)
    fetch(url)
    assert web.requests["big0"] == 2 and os.path.exists(copy_path(url))


@pytest.mark.parametrize("spec", ["/*.tar", "/x.csv", "/x.parquet"])
def test_what_a_web_server_cannot_give(web, spec):
    with pytest.raises(UserError, match="a glob works on local files only|only .tar shards are read from afar"):
        open_source(web.url + spec)


def test_a_store_of_fsspec(web, tmp_path):
    folder = f"file://{tmp_path}/data"
    index_shards([f"{folder}/{number}.tar" for number in range(4)], digest=True)
    source = open_source(folder + "/{0..3}.tar")
    for number in range(4):
        (tmp_path / "data" / f"{number}.tar").unlink()  # what is read are the copies
    assert source[19].captions == ("txt of 3-4",)
    with pytest.raises(UserError, match="4.tar: there is no such file"):
        index_shards([f"{folder}/4.tar"], digest=True)


def test_a_store_that_hangs_or_stumbles_is_tried_again(web, monkeypatch):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/0.tar", web.files["0.tar"])
    calls, info = [], memory.info

    def stumbling(path, **options):
        calls.append(path)
        if len(calls) == 1:
            raise RuntimeError("slow down")
        if len(calls) == 2:
            time.sleep(1)
        return info(path, **options)

    monkeypatch.setattr(type(memory), "info", lambda self, path, **options: stumbling(path, **options))
    monkeypatch.setattr(remote, "TIMEOUT", 0.3)
    (entry,) = index_shards(["memory://bucket/0.tar"], digest=True, workers=1)
    assert entry.summary.samples == 5 and len(calls) >= 3


def test_a_missing_package_is_named(monkeypatch):
    with pytest.raises(UserError, match="s3://bucket/0.tar: .*s3fs.*: pip install 'contrastive.remote.'"):
        index_shards(["s3://bucket/0.tar"], digest=True, workers=1)


# The cache


def wait_until(condition):
    limit = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


def big_files(web, count):
    for number in range(count):
        web.files[f"big{number}"] = bytes([number]) * SIZE
    return [f"{web.url}/big{number}" for number in range(count)]


def fetch(url, size=None):
    os.close(open_copy(url, size))


def test_the_least_recently_used_is_evicted(web, monkeypatch):
    monkeypatch.setenv("CONTRASTIVE_CACHE_GB", "0.035")
    monkeypatch.setattr(remote, "FRESH_SECONDS", 0.0)
    urls = big_files(web, 5)
    for url in urls[:3]:
        fetch(url)
        time.sleep(0.02)
    fetch(urls[0])
    time.sleep(0.02)
    fetch(urls[3])
    assert [name for name in cached(web) if "big" in name] == ["big0", "big2", "big3"]


def test_what_is_open_or_fresh_is_not_evicted(web, monkeypatch, capsys):
    monkeypatch.setenv("CONTRASTIVE_CACHE_GB", "0.025")
    monkeypatch.setattr(remote, "_warned", False)
    urls = big_files(web, 5)
    fetch(urls[0])
    fetch(urls[1])
    fetch(urls[2])
    assert cached(web)[-3:] == ["big0", "big1", "big2"]  # all fresh: rather too full than without what is needed
    assert "more than the 0.025 GB of CONTRASTIVE_CACHE_GB" in capsys.readouterr().err
    monkeypatch.setattr(remote, "FRESH_SECONDS", 0.0)
    held = open_copy(urls[1])
    os.utime(copy_path(urls[1]), (1, 1))  # the least recently used of all
    fetch(urls[3])
    assert [name for name in cached(web) if "big" in name] == ["big1", "big3"]
    os.unlink(copy_path(urls[1]))  # and what is gone stays readable where it is open
    assert os.pread(held, 3, SIZE - 3) == b"\1\1\1"
    os.close(held)


def test_downloads_under_way_count_and_dead_ones_go(web, monkeypatch):
    monkeypatch.setenv("CONTRASTIVE_CACHE_GB", "0.025")
    monkeypatch.setattr(remote, "FRESH_SECONDS", 0.0)
    urls = big_files(web, 2)
    fetch(urls[0])
    dead = Path(copy_path(f"{web.url}/dead") + ".part")
    dead.write_bytes(bytes(SIZE))
    os.utime(dead, (1, 1))
    fetch(urls[1])
    assert not dead.exists()
    dead.write_bytes(bytes(SIZE))
    os.utime(dead, (1, 1))
    with FileLock(str(dead.with_suffix(".lock"))):  # now it is alive
        assert not remote._evict(str(dead))
    assert dead.exists() and [name for name in cached(web) if "big" in name] == ["big0", "big1"]


def test_a_shard_larger_than_the_cache_is_refused(web, monkeypatch):
    monkeypatch.setenv("CONTRASTIVE_CACHE_GB", "0.005")
    (url,) = big_files(web, 1)
    with pytest.raises(UserError, match="a shard of 10000000 bytes does not fit; raise CONTRASTIVE_CACHE_GB"):
        fetch(url)


@pytest.mark.parametrize("text", ["0", "-1", "many", "nan", "inf"])
def test_a_limit_that_is_none(text, monkeypatch):
    monkeypatch.setenv("CONTRASTIVE_CACHE_GB", text)
    with pytest.raises(UserError, match=f"CONTRASTIVE_CACHE_GB is '{text}'"):
        remote.cache_limit()


def test_a_copy_of_another_size_is_fetched_anew(web):
    (url,) = big_files(web, 1)
    fetch(url)
    Path(copy_path(url)).write_bytes(b"short")
    fetch(url, SIZE)
    assert os.path.getsize(copy_path(url)) == SIZE and web.requests["big0"] == 2


def test_a_download_under_way_has_its_room_reserved(web, monkeypatch):
    (url,) = big_files(web, 1)
    web.faults["big0"] = ["slow"]
    remote.prefetch([(url, SIZE, None)])
    part = Path(copy_path(url) + ".part")
    wait_until(lambda: part.exists() and part.stat().st_size == SIZE)
    assert part.stat().st_size == SIZE and web.requests["big0"] == 1
    time.sleep(0.1)
    assert part.stat().st_size == SIZE
    fetch(url)
    assert Path(copy_path(url)).read_bytes() == bytes(SIZE) and web.requests["big0"] == 1


def test_processes_share_one_download(web):
    (url,) = big_files(web, 1)
    web.faults["big0"] = ["slow"] * 4
    context = multiprocessing.get_context("fork")
    racers = [context.Process(target=fetch, args=(url,)) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(30)
    assert [racer.exitcode for racer in racers] == [0] * 4
    assert web.requests["big0"] == 1


def test_loader_workers_share_downloads_with_the_process_that_prefetches(web, tmp_path):
    index_shards([f"{web.url}/{number}.tar" for number in range(4)], digest=True)
    for name in cached(web):
        os.unlink(copy_path(f"{web.url}/{name}"))
    web.requests.clear()
    web.faults = {name: ["slow"] for name in ("0.tar", "1.tar", "2.tar", "3.tar")}
    source = open_source(web.url + "/{0..3}.tar")
    source.prefetch(range(4))
    loader = DataLoader(source, batch_size=None, num_workers=2, multiprocessing_context="fork")
    local = open_source(f"{tmp_path}/data/{{0..3}}.tar")
    assert list(loader) == [local[index] for index in range(20)]
    assert web.requests == {"0.tar": 1, "1.tar": 1, "2.tar": 1, "3.tar": 1}


@pytest.mark.parametrize(("ranks", "fetched"), [(1, ["1.tar", "3.tar"]), (2, ["3.tar"])])
def test_prefetching_fills_the_cache_in_order_and_within_half_of_it(web, monkeypatch, ranks, fetched):
    """The half is shared by the ranks of a machine."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    index_shards([f"{web.url}/{number}.tar" for number in range(4)], digest=True)
    for name in cached(web):
        os.unlink(copy_path(f"{web.url}/{name}"))
    web.requests.clear()
    size = len(web.files["0.tar"])
    monkeypatch.setenv("CONTRASTIVE_CACHE_GB", str(5 * size / 1e9))
    source = open_source(web.url + "/{0..3}.tar")
    source.prefetch([3, 1, 0])
    wait_until(lambda: len(cached(web)) == len(fetched))
    time.sleep(0.1)
    assert cached(web) == fetched
    assert source[5].captions == ("txt of 1-0",) and web.requests == {"3.tar": 1, "1.tar": 1}


def test_prefetching_leaves_faults_to_the_reader(web, monkeypatch):
    index_shards([f"{web.url}/{number}.tar" for number in range(4)], digest=True)
    source = open_source(web.url + "/{0..3}.tar")
    for _ in range(3):  # more often than there are threads
        os.unlink(copy_path(f"{web.url}/0.tar"))
        web.faults["0.tar"] = [404]
        source.prefetch([0])
        wait_until(lambda: not web.faults["0.tar"])
        time.sleep(0.05)
        assert cached(web) == ["1.tar", "2.tar", "3.tar"]
        os.close(open_copy(f"{web.url}/0.tar"))
    assert source[0].captions == ("txt of 0-0",)
    os.unlink(copy_path(f"{web.url}/1.tar"))
    source.prefetch([1])
    wait_until(lambda: "1.tar" in cached(web))
