"""Changes of valid files that an attacker, a bad disk or a bad program could have made, by the structure of the file.

`mutated` takes a folder as {path: bytes} and makes one to three changes, drawn from a seed alone.
"""

import random

from bombs import bomb, object_array, torch_archive
from structures import change_of
from texts import PICKLE, change_bytes

Files = dict[str, bytes]


def mutated(files: Files, rng: random.Random) -> Files:
    """Return the folder with one to three changes; each of one file, by its structure or as bytes, or of the folder."""
    files = dict(files)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not files:
            break
        name = rng.choice(sorted(files))
        if rng.random() < 0.08:
            _change_folder(files, name, rng)
            continue
        change = change_of(name, files[name]) if rng.random() < 0.75 else None
        try:
            files[name] = (change or change_bytes)(files[name], rng)
        except Exception:  # an earlier change has left nothing to take apart
            files[name] = change_bytes(files[name], rng)
    return files


def _change_folder(files: Files, name: str, rng: random.Random) -> None:
    data = files.pop(name)
    what = rng.randrange(7)
    if what == 0:
        files[f"{name}/inside"] = data  # a folder in its place
    elif what == 1:
        folder, slash, base = name.rpartition("/")
        odd = rng.choice(["a\nb", "\x1b[2J", "\udcff", "n" * 240, "two words", "%s%n", "{0..2}", "*"])
        files[folder + slash + rng.choice([odd + base, base + odd])] = data
    elif what == 2:
        files[name] = rng.choice(list(files.values()) or [data])
    elif what == 3:
        files[name] = rng.choice([b"", PICKLE, torch_archive(), object_array(), b"<html>404</html>", b"\0" * 4096])
    elif what == 4:
        files[name] = bomb("gzip")
    elif what == 5:
        stem = name.rpartition(".")[0] or name
        files[name], files[stem + rng.choice([".pkl", ".pt", ".bin", ".py", ".npy", ".txt", ".json"])] = data, PICKLE
