"""Small tables for tests."""

import gzip
import json


def written(folder, name, content):
    data = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(folder / name)


def records(folder, *values, column="caption"):
    rows = [{"image": f"{name}.jpg", column: value} for name, value in zip("abc", values, strict=False)]
    return written(folder, "x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
