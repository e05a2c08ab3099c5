"""A folder of embeddings: what it holds, of which model and data, and which of its shards are still to come.

config.json             the model, the preprocessing and the data that the embeddings are of, counts, what was left out
images-00000.parquet    index, key, label, embedding   (or the embedding in images-00000.npy)
texts-00000.parquet     index, caption, text, embedding   (index: the sample; caption: which of its captions)

Shard n holds the samples from n * samples_per_shard on, of those that are embedded. A shard is whole or absent; its
metadata holds the key of the store and what was left out. N rows, E channels.
"""

import hashlib
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from contrastive.distributed.collectives import rank, together
from contrastive.errors import UserError
from contrastive.evaluate.embeddings import Space, pick_indices
from contrastive.files import check_writable, write_json, write_whole
from contrastive.interop.bundle import weights_key

FORMAT = "contrastive-embeddings-1"
CONFIG = "config.json"
FEATURES = "embedding"
SAMPLES_PER_SHARD = 4096
ABANDONED_AFTER = 3600  # seconds

Part = Literal["images", "texts"]
FileType = Literal["parquet", "npy"]


@dataclass(frozen=True)
class StoreOptions:
    """How embeddings are made and laid out."""

    space: Space = "projected"
    dtype: Literal["float32", "float16"] = "float32"
    files: FileType = "parquet"
    precision: Literal["fp32", "bf16"] = "fp32"
    limit: int | None = None
    samples_per_shard: int = SAMPLES_PER_SHARD


class EmbeddingStore:
    """A folder of embeddings; made by `claim_store`, or found by `find_store`."""

    def __init__(self, folder: Path, config: dict):
        self.folder, self.config = folder, config

    @property
    def key(self) -> str:
        """Of the model, the preprocessing, the data and how they were embedded."""
        return self.config["key"]

    @property
    def num_shards(self) -> int:
        return -(-len(self._picked) // self.config["options"]["samples_per_shard"])

    def indices(self, shard: int) -> np.ndarray:
        """Source indices of the samples of a shard."""
        size = self.config["options"]["samples_per_shard"]
        return self._picked[shard * size : (shard + 1) * size]

    @cached_property
    def _picked(self) -> np.ndarray:
        return pick_indices(self.config["data"]["num_samples"], self.config["options"]["limit"])

    def path(self, part: Part, shard: int) -> Path:
        return self.folder / f"{part}-{shard:05d}.parquet"

    def missing(self, part: Part) -> list[int]:
        """Numbers of the shards that are not written yet.

        Raises:
            UserError: a shard is of another store, or damaged.
        """
        absent = []
        for shard in range(self.num_shards):
            path = self.path(part, shard)
            files = [path, features_path(path)] if self.config["options"]["files"] == "npy" else [path]
            if not all(file.exists() for file in files):
                absent.append(shard)
            elif read_head(path).key != self.key:
                raise UserError(f"{path} is of other embeddings than {CONFIG} beside it; delete it and embed again")
        return absent

    def is_complete(self, part: Part) -> bool:
        return self.config.get(part) is not None

    def finish(self, part: Part) -> None:
        """Write down that all shards of `part` are there, with counts and what was left out, by reason."""
        heads = [read_head(self.path(part, shard)) for shard in range(self.num_shards)]
        left_out: dict[str, list[str]] = defaultdict(list)
        for head in heads:
            for reason, key in head.left_out:
                left_out[reason].append(key)
        self.config[part] = {"embeddings": sum(head.num_rows for head in heads), "left_out": dict(left_out)}
        write_json(self.folder / CONFIG, self.config)
        for partial in self.folder.glob(".*.partial"):  # of runs that were killed; another may be writing right now
            if time.time() - partial.stat().st_mtime > ABANDONED_AFTER:
                partial.unlink(missing_ok=True)

    def check(self, bundle=None, source=None, key_of_model: str | None = None) -> None:
        """Compare with a model and with data.

        key_of_model: the bundle's `model_key` where it is known already.

        Raises:
            UserError: the embeddings are of another model, of other preprocessing, or of other data.
        """
        if bundle is not None:
            said = self.config["model"]
            if said["key"] != (key_of_model or model_key(bundle)):
                raise UserError(
                    f"{self.folder} holds embeddings of another model ({said['path']}); embed the data with this one"
                )
            if said["preprocess"] != _plain(bundle.preprocess.config):
                raise UserError(f"{self.folder} holds embeddings of this model with other preprocessing; embed again")
        if source is not None and self.config["data"]["fingerprint"] != source.stored.fingerprint:
            said = self.config["data"]["name"]
            raise UserError(f"{self.folder} holds embeddings of other data ({said}), not of {source.name} as it is now")


def store_config(bundle, source, options: StoreOptions, key_of_model: str | None = None) -> dict:
    """Return what identifies a store of the embeddings of `source` by `bundle`, its 'key' included."""
    model = {"key": key_of_model or model_key(bundle), "preprocess": _plain(bundle.preprocess.config)}
    made = {name: getattr(options, name) for name in ("space", "dtype", "precision", "limit")}
    identity = [FORMAT, model, source.stored.fingerprint, made]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return {
        "format": FORMAT,
        "key": key,
        "model": {"path": str(getattr(bundle, "path", "")), **model},
        "data": {
            "name": source.name,
            "fingerprint": source.stored.fingerprint,
            "num_samples": len(source),
            "class_names": _listed(source.class_names),
            "heldout_labels": sorted(source.heldout_labels),
            "templates": _listed(source.templates),
        },
        "options": {**asdict(options), "normalized": options.space == "projected"},
    }


def claim_store(
    folder: Path, bundle, source, options: StoreOptions, *, key_of_model: str | None = None
) -> EmbeddingStore:
    """Begin a store in `folder`, or go on with one begun by the same model, data and options.

    With several ranks, call it on all of them: the first one begins it, the others find it begun.

    Raises:
        UserError: the folder holds something else, or embeddings of another model or data; on all ranks.
    """
    config = store_config(bundle, source, options, key_of_model)
    first = together(lambda: _claim(folder, bundle, source, config) if rank() == 0 else None)
    return first or _claim(folder, bundle, source, config)


def _claim(folder: Path, bundle, source, config: dict) -> EmbeddingStore:
    found = find_store(folder)
    if found is None:
        check_writable(folder, "choose another folder")
        if folder.exists() and any(not path.name.endswith(".partial") for path in folder.iterdir()):
            raise UserError(f"{folder} holds something else than embeddings; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, config)
        return EmbeddingStore(folder, config)
    found.check(bundle, source, config["model"]["key"])
    for name, value in config["options"].items():
        if found.config["options"].get(name) != value:
            held = found.config["options"].get(name)
            raise UserError(
                f"{folder} was begun with {name} {held}, not {value}; give the same again, or another folder"
            )
    return found


def find_store(folder: Path) -> EmbeddingStore | None:
    """Return the store in `folder`; None when there is none. UserError when its config.json is damaged."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError as error:
        raise UserError(f"{folder / CONFIG} is not valid JSON ({error})") from None
    written = config.get("format") if isinstance(config, dict) else None
    if not isinstance(written, str) or not written.startswith("contrastive-embeddings-"):
        return None
    if written != FORMAT:
        raise UserError(f"{folder} holds embeddings of format '{written}', this version reads '{FORMAT}'; embed again")
    return EmbeddingStore(folder, config)


def _plain(options) -> dict:
    """A dataclass as JSON gives it back."""
    return json.loads(json.dumps(asdict(options)))


def _listed(values) -> list | None:
    return None if values is None else list(values)


def model_key(bundle) -> str:
    """Return a sha256, in hex, over weights, architecture and tokenizer of `bundle`.

    The architecture counts because weights alone do not tell it: another number of heads fits the same tensors.
    The preprocessing is not in it; embeddings record it beside this key.
    """
    model = bundle.model
    options = asdict(model.config) if is_dataclass(model.config) else vars(model.config)
    parts = (
        weights_key(model),
        type(model).__name__,
        json.dumps(options, sort_keys=True, default=str),
        _tokenizer_key(bundle.tokenizer),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _tokenizer_key(tokenizer) -> str:
    """A sha256 over the files that the tokenizer saves; empty without one, or without its files."""
    if not tokenizer:
        return ""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(f"{path.relative_to(folder)}\n".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


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
        write_whole(features_path(path), lambda file: np.save(file, features))
    else:
        flat = pa.array(np.ascontiguousarray(features).reshape(-1))
        table[FEATURES] = pa.FixedSizeListArray.from_arrays(flat, features.shape[1])
        compression[f"{FEATURES}.list.element"] = "none"  # noise does not shrink
    metadata = {"contrastive.key": key, "contrastive.left_out": json.dumps([list(fault) for fault in left_out])}
    made = pa.table(table).replace_schema_metadata(metadata)
    options = {"compression": compression, "use_dictionary": False, "write_page_checksum": True}
    write_whole(path, lambda file: pq.write_table(made, file, **options))


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


def _damaged(path: Path, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"{path} is damaged ({reason}); delete it and embed again")
