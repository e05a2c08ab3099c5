"""Changes of bytes, of JSON and YAML, and of lines: the values that stand for attacks, and where they are put."""

import json
import random
import re
from itertools import islice

import yaml

# A pickle that makes the file 'canary' in the working folder when it is loaded.
PICKLE = b"cos\nsystem\n(S'touch canary'\ntR."
SIZES = (0, 1, 2**7, 2**15 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
NAMES = (
    "../outside.txt", "/absolute/outside.txt", "../../../../outside/canary", "a\0b", "n" * 300, "a\nb", "\x1b[31mred",
    "\udcff",
    "\ud800", "", ".", "..", "con", "a/" * 200 + "b", "~/x", "file:///etc/passwd", "pipe:touch canary", "-rf", "{0..9}",
)  # fmt: skip
VALUES = (
    None, True, False, -1, 0, 1, 7, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, 1e308, -0.0, float("nan"), float("inf"),
    "x" * 100_000, "1e999", [], {}, [[]], {"": {}}, [None] * 1000, ["a", 1], {"a": None}, *NAMES,
)  # fmt: skip
# Written in place of a value as they stand: no value of Python's gives these.
RAW_JSON = (
    "[" * 10_000 + "]" * 10_000,
    '{"a":' * 10_000 + "1" + "}" * 10_000,
    "9" * 5000,
    "NaN",
    "-Infinity",
    '"\\ud800"',
)
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
RAW_YAML = (
    "[" * 3000 + "]" * 3000, "!!python/object/apply:os.system ['touch canary']", "&x [*x]", "*unknown", "2001-13-45",
    "!!binary 'x'", "!!set {a, b}", "{<<: {a: 1}}", "{? [a] : b}", "{1: 2}", "1:30", "0o17", ".nan", "2001-01-01",
)  # fmt: skip


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, wipe, double, or write a number where any length may stand."""
    held, size = bytearray(data), len(data)
    if not size:
        return rng.randbytes(20)
    place, length = rng.randrange(size), rng.choice((1, 4, 64, 512, 4096))
    # Where headers are, most is decided.
    place = min(place, rng.randrange(256)) if rng.random() < 0.4 else place
    what = rng.randrange(8)
    if what == 0:
        for _ in range(rng.choice((1, 1, 8))):
            held[rng.randrange(size) if rng.random() < 0.3 else place] ^= 1 << rng.randrange(8)
    elif what == 1:
        del held[place:]
    elif what == 2:
        start = place - place % 512
        held[start : start + length] = bytes(len(held[start : start + length]))
    elif what == 3:
        del held[place : place + length]
    elif what == 4:
        held[place:place] = held[place : place + length]
    elif what == 5:
        held[place:place] = rng.choice(
            [rng.randbytes(length), b"\0" * length, b"\xff" * length, PICKLE, b"\n", b"\xef\xbb\xbf"]
        )
    elif what == 6:
        held += rng.choice([b"\0" * 1024, rng.randbytes(100), data[:4096], PICKLE])
    else:
        order, width = rng.choice(("little", "big")), rng.choice((1, 2, 4, 8))
        held[place : place + width] = (rng.choice(SIZES) & (256**width - 1)).to_bytes(width, order)
    return bytes(held)


# JSON and YAML


def change_json(data: bytes, rng: random.Random) -> bytes:
    return tree_text(json.loads(data), rng, RAW_JSON).encode("utf-8", "surrogatepass")


def change_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines() or [b"{}"]
    place = rng.randrange(len(lines))
    lines[place] = change_json(lines[place], rng) if rng.random() < 0.7 else change_bytes(lines[place], rng)
    return b"\n".join(lines) + b"\n"


def change_yaml(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.05:
        return LAUGHS.encode() + data
    if rng.random() < 0.2:
        return change_text(data, rng)
    return tree_text(yaml.safe_load(data), rng, RAW_YAML).encode("utf-8", "surrogatepass")


def tree_text(tree: object, rng: random.Random, raw: tuple[str, ...]) -> str:
    """The tree with one change, as JSON, which is YAML too."""
    holder = {"": tree}
    places = list(islice(_places(holder), 10_000))
    if len(places) == 10_000:
        raise ValueError("an earlier change has put a bomb there")
    # The deeper ones are many; those at the top decide what is read at all.
    container, key = rng.choice(places[: rng.choice((3, 20, len(places)))])
    value, what = container[key], rng.randrange(9)
    if what == 0 and container is not holder:
        container.pop(key)
    elif what == 1:
        container[key] = {"a": value} if rng.random() < 0.5 else [value]
    elif what == 2:
        other, name = rng.choice(places)
        container[key] = json.loads(json.dumps(other[name]))
    elif what == 3 and isinstance(container, dict) and container is not holder:
        container[rng.choice([*NAMES, key + "x", key.upper()])] = container.pop(key) if rng.random() < 0.7 else value
    elif what == 4 and type(value) in (int, float):
        container[key] = rng.choice([value + 1, value - 1, -value, value * 2, float(value), str(value), 2**31, 0])
    elif what == 5:
        container[key] = "@raw@"
    elif what == 6 and isinstance(value, list):
        container[key] = rng.choice([value * 2, value[::-1], value[:-1], value + [rng.choice(VALUES)], value * 300])
    elif what == 7 and isinstance(container, dict) and isinstance(key, str) and key:
        container[key] = "@twice@"
        chosen = json.dumps(value), json.dumps(rng.choice(VALUES))
        twice = f"{chosen[0]}, {json.dumps(key)}: {chosen[1]}"
        return json.dumps(holder[""]).replace('"@twice@"', twice)
    else:
        container[key] = rng.choice(VALUES)
    text = json.dumps(holder[""], ensure_ascii=rng.random() < 0.7)
    return text.replace('"@raw@"', rng.choice(raw))


def _places(holder):
    todo = [holder]
    while todo:
        container = todo.pop(0)
        for key in list(container) if isinstance(container, dict) else range(len(container)):
            yield container, key
            if isinstance(container[key], dict | list):
                todo.append(container[key])


# Text


def change_text(data: bytes, rng: random.Random) -> bytes:
    """Change a line, or a value of a line of a table."""
    lines = data.split(b"\n")
    place = rng.randrange(len(lines)) if rng.random() < 0.7 else 0
    odd = rng.choice(
        [str(rng.choice(VALUES)), rng.choice(NAMES), '"', "'", '""', '"a', '["a', "['a', 'b']", "{}", ",", "\t"]
    )
    odd = odd.encode("utf-8", rng.choice(["surrogatepass", "replace"]))
    cells, what = re.split(rb"([,\t])", lines[place]), rng.randrange(9)
    if what < 3:
        cells[rng.randrange(len(cells))] = odd
        lines[place] = b"".join(cells)
    elif what == 3:
        lines[place] += odd
    elif what == 4:
        lines.insert(place, rng.choice([lines[-1], lines[place], odd, b"", b"#", b"x" * 2_000_000]))
    elif what == 5:
        del lines[place]
    elif what == 6:
        return rng.choice([data.decode("utf-8", "replace").encode(code) for code in ("utf-16", "utf-8-sig", "utf-7")])
    elif what == 7:
        return data.replace(
            rng.choice([b"\n", b",", b"a", b" "]), rng.choice([b"\r", b"\r\n", b"\0", b'"', b"\t", b";", b"\xff"])
        )
    else:
        rng.shuffle(lines)
    return b"\n".join(lines)
