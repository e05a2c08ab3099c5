"""Small shards for tests, and how they are refused."""

import io
import os
import tarfile

import pytest

from contrastive.data.record import BadSample
from contrastive.data.sources import open_source
from contrastive.errors import UserError


def write_tar(path, members, format=tarfile.USTAR_FORMAT):
    """Write (name, bytes) members; a TarInfo in place of a name is added as it is."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data) if info.isfile() else 0
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def pairs(*keys):
    return [(f"{key}.{suffix}", f"{suffix} of {key}".encode()) for key in keys for suffix in ("jpg", "txt")]


def refusal(source, index):
    with pytest.raises(BadSample) as caught:
        source[index]
    return caught.value.reason


def damaged(path, change):
    """Change the bytes of a shard; return the one line with which it is refused."""
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


def whole_shard(folder):
    """Write a shard of 20 samples; return its path and the offset of its last member's header."""
    path = write_tar(folder / "s-000007.tar", pairs(*(f"{index:03d}" for index in range(20))))
    with tarfile.open(path) as tar:
        return path, tar.getmembers()[-1].offset
