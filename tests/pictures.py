"""Small pictures and their files, for tests of decoding."""

import io
import struct
import zlib

import numpy as np

from contrastive.data.decode import decode

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
SMOOTH = np.stack(
    [
        np.add.outer(np.arange(48) * 2, np.arange(64)),
        np.add.outer(np.arange(48), np.arange(64)),
        np.full((48, 64), 90),
    ],
    axis=2,
).astype(np.uint8)


def encode(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(image, **options):
    decoded = decode(image, **options)
    assert decoded.shape[0] == 3 and decoded.dtype.is_signed is False
    return decoded.permute(1, 2, 0).numpy()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, bits, colour, rows, *extra):
    """A PNG by hand: `rows` are the raw scan lines, without filter bytes."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", body), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
