"""Files of embeddings: shards that are whole or absent. N rows, E channels.

A shard is NAME.parquet with a row for each embedding; the embeddings are its column `embedding`, a list of E
numbers, or lie beside it in NAME.npy, (N, E). Its metadata holds the key of the store and what was left out.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from contrastive.errors import UserError

FileType = Literal["parquet", "npy"]
FEATURES = "embedding"


@dataclass(frozen=True)
class ShardHead:
    """What a shard says of itself."""

    key: str
    """Of the store it belongs to."""
    num_rows: int
    left_out: tuple[tuple[str, str], ...]
    """(reason, key of the sample) of what could not be embedded."""


def write_shard(
    path: Path,
    columns: Mapping[str, Sequence],
    features: np.ndarray,
    *,
    key: str,
    left_out: Sequence[tuple[str, str]],
    files: FileType,
) -> None:
    """Write a shard whole or not at all.

    Args:
        path: the .parquet file.
        columns: name to N values: integers (None where there is none) or text.
        features: (N, E) float32 or float16.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"key": pa.string(), "text": pa.string()}
    table = {name: pa.array(values, types.get(name, pa.int64())) for name, values in columns.items()}
    compression = dict.fromkeys(table, "zstd")
    if files == "npy":
        _write_whole(features_path(path), lambda file: np.save(file, features))
    else:
        flat = pa.array(np.ascontiguousarray(features).reshape(-1))
        table[FEATURES] = pa.FixedSizeListArray.from_arrays(flat, features.shape[1])
        compression[f"{FEATURES}.list.element"] = "none"  # noise does not shrink
    metadata = {"contrastive.key": key, "contrastive.left_out": json.dumps([list(fault) for fault in left_out])}
    made = pa.table(table).replace_schema_metadata(metadata)
    options = {"compression": compression, "use_dictionary": False, "write_page_checksum": True}
    _write_whole(path, lambda file: pq.write_table(made, file, **options))


def read_head(path: Path) -> ShardHead:
    """Read what a shard says of itself, without its rows; UserError when it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
        said = metadata.metadata or {}
        left_out = tuple((reason, key) for reason, key in json.loads(said[b"contrastive.left_out"]))
        return ShardHead(said[b"contrastive.key"].decode(), metadata.num_rows, left_out)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from None


def read_shard(path: Path, files: FileType, key: str) -> tuple[dict[str, list], np.ndarray]:
    """Read the columns and the (N, E) features of a shard; UserError when it is damaged or of another store."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, page_checksum_verification=True)
        if (table.schema.metadata or {}).get(b"contrastive.key") != key.encode():
            raise ValueError("it is of other embeddings")
        if files == "npy":
            features = np.load(features_path(path), allow_pickle=False)
        else:
            column = table.column(FEATURES).combine_chunks()
            features = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), column.type.list_size)
            table = table.drop_columns([FEATURES])
        if len(features) != len(table):
            raise ValueError(f"{len(features)} embeddings for {len(table)} rows")
    except (pa.ArrowException, OSError, ValueError, KeyError, EOFError) as error:
        raise _damaged(path, error) from None
    return table.to_pydict(), features


def features_path(path: Path) -> Path:
    """Where the features of an npy shard lie."""
    return path.with_suffix(".npy")


def write_json(path: Path, content: Mapping) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    _write_whole(path, lambda file: file.write(text.encode()))


def _write_whole(path: Path, write) -> None:
    # Of each process its own: several may write one cache at a time, and all write the same.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _damaged(path: Path, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"{path} is damaged ({reason}); delete it and embed again")
