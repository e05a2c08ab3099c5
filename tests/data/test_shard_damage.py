"""No damaged shard goes unnoticed."""

import os
import re
import tarfile

import pytest
from shard_writing import pairs, write_tar

from contrastive.data.sources import open_source
from contrastive.data.sources.shards import _open_shard
from contrastive.errors import UserError

# Damage


@pytest.fixture
def shard(tmp_path):
    """A shard, its path, and the offset of its last member's header."""
    path = write_tar(tmp_path / "s-000007.tar", pairs(*(f"{index:03d}" for index in range(20))))
    with tarfile.open(path) as tar:
        return path, tar.getmembers()[-1].offset


def damaged(path, change):
    with open(path, "rb") as file:
        data = bytearray(file.read())
    changed = change(data)
    with open(path, "wb") as file:
        file.write(data if changed is None else changed)
    with pytest.raises(UserError) as caught:
        open_source(path)
    message = str(caught.value)
    assert os.path.basename(path) in message and "\n" not in message
    return message


def test_cut_at_every_block_boundary(shard):
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


def test_flipped_header_bit(shard):
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


def test_zeroed_sample(shard):
    path, last = shard

    def wipe(data):
        data[last - 2048 : last] = bytes(2048)

    assert f"at byte {last - 2048}: zeros where a header should be" in damaged(path, wipe)


def test_zeroed_tail(shard):
    path, _ = shard

    def wipe(data):
        data[1024:] = bytes(len(data) - 1024)

    assert "after the archive's end" in damaged(path, wipe)


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
    _open_shard.cache_clear()  # as in a new process
    with pytest.raises(UserError, match="was changed"):
        source[0]
    os.remove(path)
    with pytest.raises(UserError, match="can no longer be opened"):
        source[0]
