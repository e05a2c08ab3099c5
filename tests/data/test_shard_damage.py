"""No damaged shard goes unnoticed."""

import os

import pytest
from shard_writing import damaged, whole_shard, write_tar

from contrastive.data.shards.shard_source import _open_local
from contrastive.data.sources import open_source
from contrastive.errors import UserError


@pytest.fixture
def shard(tmp_path):
    return whole_shard(tmp_path)


def test_data_after_the_end(shard):
    path, _ = shard
    with open(path, "rb") as file:
        whole = file.read()
    assert "with data after them" in damaged(path, lambda data: whole + whole)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>" * 200, "is not a tar archive"),
        (b"", "is not a tar archive"),
        (b"\x1f\x8b" + b"x" * 600, "is compressed; unpack it"),
        (bytes(10240), "holds no sample"),
    ],
)
def test_not_a_shard(tmp_path, content, message):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_source(str(path))


def test_shard_without_images_or_captions(tmp_path):
    with pytest.raises(UserError, match="holds no sample"):
        open_source(write_tar(tmp_path / "x.tar", [("a.npy", b"x")]))
    with pytest.raises(UserError, match="neither captions nor labels"):
        open_source(write_tar(tmp_path / "y.tar", [("a.jpg", b"x")]))


def test_shard_changed_or_removed_after_indexing(shard):
    path, _ = shard
    source = open_source(path)
    with open(path, "ab") as file:
        file.write(bytes(512))
    _open_local.cache_clear()  # as in a new process
    with pytest.raises(UserError, match="was changed"):
        source[0]
    os.remove(path)
    with pytest.raises(UserError, match="can no longer be opened"):
        source[0]
