"""Changes of PNG and JPEG by their parts, with sums and lengths that fit."""

import random
import struct
import zlib

from bombs import bomb
from texts import change_bytes


def change_png(data: bytes, rng: random.Random) -> bytes:
    chunks, place = [], 8
    while place < len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + size]))
        place += 12 + size
    what, chosen = rng.randrange(6), rng.randrange(len(chunks))
    kind, body = chunks[chosen]
    if what == 0:
        side = struct.pack(">II", *(rng.choice([0, 1, 9, 7000, 10**5, 2**31 - 1, 2**32 - 1]) for _ in range(2)))
        chunks[0] = (b"IHDR", side + chunks[0][1][8:])
    elif what == 1:
        chunks[0] = (b"IHDR", chunks[0][1][:8] + bytes(rng.choice([0, 1, 2, 3, 4, 6, 8, 16, 255]) for _ in range(5)))
    elif what == 2:
        chunks[chosen] = (kind, change_bytes(body, rng))
    elif what == 3:
        new = rng.choice([b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"tRNS", b"PLTE", b"acTL", b"fdAT", b"fcTL"])
        held = rng.choice([b"x\0\0" + bomb("zlib"), b"", b"x\0\0\0\0\0", rng.randbytes(26), b"II*\0" + b"\xff" * 40])
        chunks.insert(rng.randrange(1, len(chunks)), (new, held))
    elif what == 4:
        rng.choice([chunks.reverse, lambda: chunks.pop(chosen), lambda: chunks.insert(chosen, chunks[chosen])])()
    else:
        chunks[chosen] = (kind, body[: rng.randrange(len(body) + 1)])
    return data[:8] + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def change_jpeg(data: bytes, rng: random.Random) -> bytes:
    starts, place = [], 2
    while data[place + 1 : place + 2] not in (b"\xda", b""):
        starts.append(place)
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    start, what = rng.choice(starts), rng.randrange(4)
    size = int.from_bytes(data[start + 2 : start + 4], "big")
    body = data[start + 4 : start + 2 + size]
    if what == 0 and (frame := data.find(b"\xff\xc0")) > 0:
        sides = struct.pack(">HH", *(rng.choice([0, 1, 17, 7000, 65535]) for _ in range(2)))
        return data[: frame + 5] + sides + data[frame + 9 :]
    if what == 1:
        exif = b"Exif\0\0" + rng.choice([b"MM\0*", b"II*\0"]) + rng.randbytes(rng.choice([0, 4, 60])) + b"\xff" * 8
        return data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    if what == 2:
        return data[:start] + data[start + 2 + size :]
    changed = change_bytes(body, rng)[:65000]
    return data[: start + 2] + struct.pack(">H", len(changed) + 2) + changed + data[start + 2 + size :]
