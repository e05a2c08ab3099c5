"""Changes of binary files by their structure: sums and lengths are mended, so that readers go on to what is changed."""

import gzip
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable

import numpy as np
from bombs import bomb, object_array
from picture_changes import change_jpeg, change_png
from texts import (
    NAMES,
    RAW_JSON,
    SIZES,
    change_bytes,
    change_json,
    change_lines,
    change_text,
    change_yaml,
    tree_text,
)


def change_of(name: str, data: bytes) -> Callable[[bytes, random.Random], bytes] | None:
    """What changes a file of this kind; None where only its bytes can be changed."""
    suffix = name.rpartition(".")[2].lower()
    if data[:2] == b"\x1f\x8b":
        return lambda data, rng: _gzipped(name, data, rng)
    if data[:4] == b"PK\3\4":
        return change_npz
    if data[:6] == b"\x93NUMPY":
        return change_npy
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return change_png
    if data[:3] == b"\xff\xd8\xff":
        return change_jpeg
    if data[:4] == b"PAR1":
        return change_parquet
    if data[257:262] == b"ustar":
        return change_tar
    by_suffix = {"json": change_json, "jsonl": change_lines, "yaml": change_yaml, "safetensors": change_safetensors}
    by_suffix |= dict.fromkeys(("csv", "tsv", "txt"), change_text)
    return by_suffix.get(suffix)


# Containers


def change_safetensors(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    head, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if rng.random() < 0.2:
        return rng.choice(SIZES).to_bytes(8, "little") + data[8:]
    names, what = [name for name in head if name != "__metadata__"], rng.randrange(6)
    one, other = rng.choice(names), rng.choice(names)
    if what == 0:
        head[one]["data_offsets"] = head[other]["data_offsets"]
    elif what == 1:
        head[one]["data_offsets"][rng.randrange(2)] = rng.choice([*SIZES, -1])
    elif what == 2:
        head[one]["shape"] = rng.choice(
            [[], [0], [2**32, 2**32], [-1], head[one]["shape"][::-1], [1, *head[one]["shape"]], [2**63]]
        )
    elif what == 3:
        head[one]["dtype"] = rng.choice(["F64", "I64", "BOOL", "F16", "BF16", "U8", "F8_E4M3", "C64", "X", ""])
    elif what == 4 and body:
        start, end = head[one]["data_offsets"]
        fill = struct.pack("<f", rng.choice([float("nan"), float("inf"), 1e38, -1e38]))
        body = body[:start] + (fill * ((end - start) // 4 + 1))[: end - start] + body[end:]
    text = json.dumps(head).encode() if what < 5 else tree_text(head, rng, RAW_JSON).encode("utf-8", "replace")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def change_tar(data: bytes, rng: random.Random) -> bytes:
    members, place = [], 0
    while data[place : place + 512].strip(b"\0"):
        size = int(data[place + 124 : place + 135] or b"0", 8)
        end = place + 512 + -(-size // 512) * 512
        members.append((bytearray(data[place : place + 512]), data[place + 512 : place + 512 + size]))
        place = end
    what, chosen = rng.randrange(9), rng.randrange(len(members))
    head, body = members[chosen]
    if what == 0:
        head[156] = rng.choice(b"0123456789LKxgSVDNAM\0\xff")
    elif what == 1:
        head[:100] = rng.choice(NAMES).encode("utf-8", "surrogatepass")[:100].ljust(100, b"\0")
    elif what == 2:
        size = rng.choice(SIZES)
        head[124:136] = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    elif what == 3:
        members.insert(rng.randrange(len(members)), members[chosen])
    elif what == 4:
        del members[chosen]
    elif what == 5:
        rng.shuffle(members)
    elif what == 6:
        inner = head[:100].rstrip(b"\0").decode("utf-8", "replace")
        change = change_of(inner, body) or change_bytes
        members[chosen] = (head, change(body, rng))
    elif what == 7:
        key, value = rng.choice(["path", "size", "linkpath", "GNU.sparse.size", "x"]), str(rng.choice([*NAMES, *SIZES]))
        record = f" {key}={value}\n".encode("utf-8", "surrogatepass")
        pax = bytearray(head)
        pax[156] = rng.choice(b"xgLK")
        members.insert(chosen, (pax, str(rng.choice([len(record) + 3, 0, 2**63])).encode() + record))
    else:
        head[rng.randrange(512)] = rng.randrange(256)
        return data[: place - len(data)] if rng.random() < 0.1 else _tar_of(members, fixed=rng.random() < 0.7)
    return _tar_of(members, keep_size=what == 2)


def _tar_of(members, fixed: bool = True, keep_size: bool = False) -> bytes:
    made = b""
    for head, body in members:
        head = bytearray(head)
        if not keep_size:
            head[124:136] = b"%011o\0" % len(body)
        if fixed:
            head[148:156] = b" " * 8
            head[148:156] = b"%06o\0 " % sum(head)
        made += bytes(head) + body + bytes(-len(body) % 512)
    return made + bytes(-(len(made) + 1024) % 10240 + 1024)


def change_npz(data: bytes, rng: random.Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as zipped:
        members = {name: zipped.read(name) for name in zipped.namelist()}
    name = rng.choice(sorted(members))
    what, made = rng.randrange(20), io.BytesIO()
    if what == 0:
        return bomb(name)
    if what < 3:
        members[rng.choice(["../outside.npy", "/absolute.npy", name + "x"])] = members.pop(name)
    else:
        members[name] = change_npy(members[name], rng)
    with zipfile.ZipFile(made, "w") as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    return made.getvalue()


def change_npy(data: bytes, rng: random.Random) -> bytes:
    array, what = np.load(io.BytesIO(data)), rng.randrange(7)
    made = io.BytesIO()
    if what == 0:
        return object_array()
    if what == 1:
        shape = rng.choice([(2**40,), (2**62, 4), (-1,), (0,), (10**5, 10**5), (2**63,), ()])
        np.lib.format.write_array_header_1_0(made, {"descr": array.dtype.str, "fortran_order": False, "shape": shape})
        return made.getvalue() + array.tobytes()
    if what == 2:
        array = array.astype(rng.choice([np.float64, np.int8, np.uint64, np.bool_, "S3"]))
    elif what == 3:
        array = rng.choice([array[:-1], array[::-1], array.reshape(-1), array[None], np.concatenate([array, array])])
    elif what == 4 and array.dtype == np.uint8 and array.tobytes()[:1] == b"{":
        array = np.frombuffer(change_json(array.tobytes(), rng), np.uint8)
    elif array.size:
        array = array.copy()
        flat = array.reshape(-1)
        flat[rng.randrange(flat.size)] = (
            0 if array.dtype.kind in "US" else np.array(rng.choice([-1, *SIZES])).astype(array.dtype)
        )
    np.save(made, array)
    return made.getvalue()


def change_parquet(data: bytes, rng: random.Random) -> bytes:
    """Columns of other types, other metadata, or the bytes of the footer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    footer = int.from_bytes(data[-8:-4], "little")
    if footer > len(data):  # of an earlier change
        return change_bytes(data, rng)
    if rng.random() < 0.5:
        place = len(data) - 8 - footer
        if rng.random() < 0.2:
            return data[:-8] + (rng.choice(SIZES) & 0xFFFFFFFF).to_bytes(4, "little") + b"PAR1"
        return data[:place] + change_bytes(data[place:-8], rng)[:footer].ljust(footer, b"\0") + data[-8:]
    table = pq.read_table(io.BytesIO(data))
    rows, name = len(table), rng.choice(table.column_names)
    values = (
        [1], {"a": {"b": 1}}, b"\xff\xfe", "../x", "a\0b", float("nan"), -5, True, {"bytes": b"x", "path": "../../x"},
        {"bytes": None, "path": None}, [[[["deep"]]]], ["a", None, ""], "x" * 3_000_000,
    )  # fmt: skip
    odd = [pa.nulls(rows), pa.array(["a"] * rows).dictionary_encode(), *(pa.array([value] * rows) for value in values)]
    typed = ((2**63, pa.uint64()), (0, pa.timestamp("ns")), (10**30, pa.decimal128(38)))
    odd += [pa.array([value] * rows, kind) for value, kind in (*typed, ([("k", 1)], pa.map_(pa.string(), pa.int64())))]
    what = rng.randrange(5)
    if what == 0:
        table = table.rename_columns(
            [rng.choice([*NAMES[:3], "image", "label"]) if held == name else held for held in table.column_names]
        )
    elif what == 1:
        metadata = dict(table.schema.metadata or {}) or {
            b"huggingface": b'{"info": {"features": {"label": {"names": ["a"]}}}}'
        }
        key = rng.choice(sorted(metadata))
        try:
            metadata[key] = change_json(metadata[key], rng)
        except ValueError:
            metadata[key] = change_bytes(metadata[key], rng)
        table = table.replace_schema_metadata(metadata)
    elif what == 2:
        table = rng.choice(
            [table.slice(0, 0), table.slice(1), table.drop_columns([name]), pa.concat_tables([table] * 3)]
        )
    else:
        table = table.set_column(table.column_names.index(name), name, rng.choice(odd))
    made = io.BytesIO()
    pq.write_table(table, made)
    return made.getvalue()


def _gzipped(name: str, data: bytes, rng: random.Random) -> bytes:
    if data == bomb("gzip"):  # made by an earlier change
        return change_bytes(data, rng)
    if rng.random() < 0.1:
        return bomb("gzip")
    inner, held = name.removesuffix(".gz"), gzip.decompress(data)
    return gzip.compress((change_of(inner, held) or change_bytes)(held, rng))
