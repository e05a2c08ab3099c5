"""Small files that unpack to much, and files that run a command where they are unpickled."""

import functools
import gzip
import io
import zipfile
import zlib

import numpy as np
from texts import PICKLE


@functools.cache
def bomb(kind: str) -> bytes:
    """A small file that unpacks to 384 MB of zeros."""
    part, times = bytes(32_000_000), 12
    if kind == "gzip":
        return gzip.compress(part, 1) * times
    if kind == "zlib":
        packer = zlib.compressobj(1)
        return b"".join(packer.compress(part) for _ in range(times)) + packer.flush()
    packed = io.BytesIO()  # an array in an .npz
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (len(part) * times,)})
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as zipped, zipped.open(kind, "w") as file:
        file.write(head.getvalue())
        for _ in range(times):
            file.write(part)
    return packed.getvalue()


def torch_archive() -> bytes:
    """What torch.save writes, with a pickle that runs a command."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as zipped:
        zipped.writestr("archive/data.pkl", PICKLE)
        zipped.writestr("archive/version", "3\n")
    return packed.getvalue()


def object_array() -> bytes:
    """An .npy of objects, which NumPy unpickles where it is allowed to."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    return head.getvalue() + PICKLE
