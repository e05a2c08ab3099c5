"""Small shards for tests, and why a sample of one is refused."""

import io
import tarfile

import pytest

from contrastive.data.record import BadSample


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
