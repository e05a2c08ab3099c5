"""Faults of shards: torn, altered, ambiguous and hostile ones."""

import json
import os
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from shard_writing import damaged, pairs, refusal, whole_shard, write_tar

from contrastive.data.sources import open_source
from contrastive.errors import UserError


@pytest.fixture
def shard(tmp_path):
    return whole_shard(tmp_path)


def test_row_19_cut_at_every_block_boundary(shard):
    path, last = shard
    with open(path, "rb") as file:
        whole = file.read()
    end_mark = last + 1024
    for size in (*range(512, end_mark + 1024, 512), end_mark - 500, last + 100):
        message = damaged(path, lambda _, size=size: whole[:size])
        offset = int(re.search(r"damaged at byte (\d+):", message).group(1))
        assert size - 1024 <= offset <= size + 512  # the member that was cut, or the missing header after it
    with open(path, "wb") as file:
        file.write(whole[: end_mark + 1024])  # the end mark alone, without padding, is a whole archive
    assert len(open_source(path)) == 20


def test_row_20_flipped_header_bit(shard):
    path, last = shard
    for place in (0, 124, 130, 148, 156, 257, 400):  # name, size, checksum, type, magic, prefix
        with open(path, "rb") as file:
            whole = bytearray(file.read())
        flipped = bytearray(whole)
        flipped[last + place] ^= 1
        message = damaged(path, lambda _, flipped=flipped: flipped)
        assert f"at byte {last}" in message
        with open(path, "wb") as file:
            file.write(whole)


def test_row_20_zeroed_sample(shard):
    path, last = shard

    def wipe(data):
        data[last - 2048 : last] = bytes(2048)

    assert f"at byte {last - 2048}: zeros where a header should be" in damaged(path, wipe)


def test_row_20_zeroed_tail(shard):
    path, _ = shard

    def wipe(data):
        data[1024:] = bytes(len(data) - 1024)

    assert "after the archive's end" in damaged(path, wipe)


def test_row_21_keys_that_repeat_across_shards_never_mix(tmp_path):
    write_tar(tmp_path / "x-0.tar", [("0.jpg", b"A"), ("0.txt", b"a"), ("1.jpg", b"B")])  # 1 lacks its caption
    write_tar(tmp_path / "x-1.tar", [("1.txt", b"c"), ("0.jpg", b"D"), ("0.txt", b"d")])  # 1 lacks its image
    source = open_source(f"{tmp_path}/x-*.tar")
    assert len(source) == 4
    assert (source[0].image, source[0].captions) == (b"A", ("a",))
    assert (source[1].image, source[1].captions) == (b"B", ())
    assert refusal(source, 2) == "missing_image"
    assert (source[3].image, source[3].captions) == (b"D", ("d",))
    assert len({source[index].key for index in (0, 1, 3)}) == 3


def test_row_22_members_that_cannot_be_paired_safely_are_refused(tmp_path):
    link = tarfile.TarInfo("link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = [
        *pairs("good"),
        ("twice.jpg", b"1"), ("twice.jpg", b"2"), ("twice.txt", b"t"),
        ("torn.jpg", b"1"), *pairs("between"), ("torn.txt", b"t"),
        (link, b""), ("link.txt", b"t"),
        *pairs("../../escape"),
    ]  # fmt: skip
    source = open_source(write_tar(tmp_path / "x.tar", members))
    reasons = [refusal(source, index) for index in (1, 2, 4, 5, 6)]
    assert reasons == ["duplicate_member", "duplicate_member", "duplicate_member", "not_a_file", "unsafe_name"]
    assert source[0].captions == ("txt of good",) and source[3].captions == ("txt of between",)
    assert sorted(os.listdir(tmp_path)) == [".contrastive-index", "x.tar"]
    assert sorted(os.listdir(tmp_path / ".contrastive-index")) == ["lock", "manifest.json", "x.tar.npz"]


def test_row_29_members_that_could_run_code_are_never_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    canary = b"cos\nsystem\n(S'touch canary'\ntR."  # a pickle that runs a command when it is loaded
    members = [
        ("a.jpg", b"A"), ("a.pkl", canary), ("a.pyd", canary), ("a.seg.png", b"mask"), ("a.txt", b"t"),
        ("b.pyd", canary), ("__meta__/m.json", b""),
    ]  # fmt: skip
    source = open_source(write_tar(tmp_path / "x.tar", members))
    assert len(source) == 1 and source[0].image == b"A" and source[0].captions == ("t",)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("command", ["pipe:touch canary", "pipe:touch canary; cat x.tar", "file::pipe://touch canary"])
def test_row_29_pipe_urls_are_refused(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not read; use local files"):
        open_source(command)
    assert not (tmp_path / "canary").exists()


def synthetic(folder, num_shards=40_000, samples=10_000):
    """A manifest of shards that do not exist."""
    folder.mkdir(parents=True)
    fields = [f"field_{number}" for number in range(15)]
    rng = np.random.default_rng(0)
    with open(folder / "manifest.json", "w") as file:
        head = {"format": "contrastive shard index", "version": 2, "shards_in": "https://data.example/laion"}
        file.write(json.dumps(head)[:-1] + ', "shards": [\n')
        for number in range(num_shards):
            row = {
                "name": f"{number:05d}.tar", "size": 400_000_000 + number, "mtime_ns": 0, "sha256": rng.bytes(32).hex(),
                "samples": samples, "captions": samples, "labels": 0, "label_names": 0, "of_json": 0,
                "lines": 0, "unlike": 3, "fields": fields, "texts": [".txt"],
                "refused": {"missing_image": {"count": 2, "keys": ["a"]}},
                "left_aside": {".avif": {"count": 2, "keys": ["a.avif"]}},
            }  # fmt: skip
            file.write(json.dumps(row) + (",\n" if number < num_shards - 1 else "\n"))
        file.write("]}\n")


OPEN = """
import json, resource, sys, time
from contrastive.data.sources import open_source
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.process_time()
source = open_source(sys.argv[1])
print(len(source), len(source.shard_sizes), source.remote, source.captioned, source.labelled, len(source.fingerprint))
seconds, kilobytes = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
started = time.process_time()
json.load(open(sys.argv[1] + "/manifest.json"))
print(seconds / (time.process_time() - started), kilobytes)
"""


def test_row_18_opening_400_million_samples_reads_no_shard(tmp_path):
    synthetic(tmp_path / "laion")
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(tmp_path / "laion")], capture_output=True, text=True, check=True
    )
    facts, cost = done.stdout.splitlines()
    assert facts == "400000000 40000 True True False 16"
    times_its_json, kilobytes = map(float, cost.split())
    # About 2.5; in seconds, one machine takes twice what another does.
    assert times_its_json < 5 and kilobytes < 400_000
    source = open_source(str(tmp_path / "laion"))
    with pytest.raises(UserError, match="00000.tar.npz: the index of this shard is missing"):
        source[0]
    with pytest.raises(IndexError):
        source[400_000_000]
