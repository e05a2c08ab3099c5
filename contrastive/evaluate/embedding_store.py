"""A folder of embeddings: what it holds, of which model and data, and which of its shards are still to come.

config.json             the model, the preprocessing and the data that the embeddings are of, counts, what was left out
images-00000.parquet    index, key, label, embedding   (or the embedding in images-00000.npy)
texts-00000.parquet     index, caption, text, embedding   (index: the sample; caption: which of its captions)

Shard n holds the samples from n * samples_per_shard on, of those that are embedded. A shard is whole or absent; its
metadata holds the key of the store and what was left out. N rows, E channels.
"""

import contextlib
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from contrastive.config import from_dict
from contrastive.distributed.collectives import rank, together
from contrastive.errors import UserError, reason_of
from contrastive.evaluate.embeddings import Space, pick_indices
from contrastive.files import check_writable, write_json, write_whole

FORMAT = "contrastive-embeddings-1"
CONFIG = "config.json"
FEATURES = "embedding"
COLUMNS = {"images": ("index", "key", "label"), "texts": ("index", "caption", "text")}
TEXT_COLUMNS = ("key", "text")
SAMPLES_PER_SHARD = 4096
MOST_TEXTS = 1000  # of a sample
MOST_SAMPLES = 2**34
ABANDONED_AFTER = 3600  # seconds

Part = Literal["images", "texts"]


@dataclass(frozen=True)
class StoreOptions:
    """How embeddings are made and laid out."""

    space: Space = "projected"
    dtype: Literal["float32", "float16"] = "float32"
    files: Literal["parquet", "npy"] = "parquet"
    precision: Literal["fp32", "bf16"] = "fp32"
    limit: int | None = None
    samples_per_shard: int = SAMPLES_PER_SHARD


class EmbeddingStore:
    """A folder of embeddings; made by `claim_store`, or found by `find_store`."""

    def __init__(self, folder: Path, config: dict):
        self.folder, self.config = folder, config
        made = {name: value for name, value in config["options"].items() if name in StoreOptions.__dataclass_fields__}
        self.options = from_dict(StoreOptions, made, f"{folder / CONFIG}: options")

    @property
    def key(self) -> str:
        """Of the model, the preprocessing, the data and how they were embedded."""
        return self.config["key"]

    @property
    def num_shards(self) -> int:
        return -(-len(self._picked) // self.options.samples_per_shard)

    def indices(self, shard: int) -> np.ndarray:
        """Source indices of the samples of a shard."""
        size = self.options.samples_per_shard
        return np.asarray(self._picked[shard * size : (shard + 1) * size])

    @cached_property
    def _picked(self) -> np.ndarray | range:
        count, limit = self.config["data"]["num_samples"], self.options.limit
        return range(count) if limit is None else pick_indices(count, limit)

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
            files = [path, path.with_suffix(".npy")] if self.options.files == "npy" else [path]
            if all(file.exists() for file in files):
                self._head(path)
            else:
                absent.append(shard)
        return absent

    def is_complete(self, part: Part) -> bool:
        return self.config.get(part) is not None

    def finish(self, part: Part) -> None:
        """Write down that all shards of `part` are there, with counts and what was left out, by reason."""
        count, left_out = 0, defaultdict(list)
        for shard in range(self.num_shards):
            num_rows, faults = self._head(self.path(part, shard))
            count += num_rows
            for reason, key in faults:
                left_out[reason].append(key)
        self.config[part] = {"embeddings": count, "left_out": dict(left_out)}
        write_json(self.folder / CONFIG, self.config)
        for partial in self.folder.glob(".*.partial"):  # of runs that were killed; another may be writing right now
            if time.time() - partial.stat().st_mtime > ABANDONED_AFTER:
                partial.unlink(missing_ok=True)

    def write(
        self,
        part: Part,
        shard: int,
        rows: Sequence[tuple],
        features: np.ndarray | None,
        left_out: Sequence[tuple[str, str]],
    ) -> None:
        """Write a shard whole or not at all.

        Args:
            rows: N values of each of the part's columns: integers (None where there is none) or text.
            features: (N, E); None without rows.
            left_out: (reason, key of the sample) of what could not be embedded.

        Raises:
            UserError: a value that float16 cannot hold.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        stored = self._as_stored(features)
        columns = zip(*rows, strict=True) if rows else ((),) * len(COLUMNS[part])
        table = {
            name: pa.array(values, pa.string() if name in TEXT_COLUMNS else pa.int64())
            for name, values in zip(COLUMNS[part], columns, strict=True)
        }
        compression = dict.fromkeys(table, "zstd")
        path = self.path(part, shard)
        if self.options.files == "npy":
            write_whole(path.with_suffix(".npy"), lambda file: np.save(file, stored))
        else:
            flat = pa.array(np.ascontiguousarray(stored).reshape(-1))
            table[FEATURES] = pa.FixedSizeListArray.from_arrays(flat, stored.shape[1])
            compression[f"{FEATURES}.list.element"] = "none"  # noise does not shrink
        metadata = {"contrastive.key": self.key, "contrastive.left_out": json.dumps(left_out)}
        made = pa.table(table).replace_schema_metadata(metadata)
        options = {"compression": compression, "use_dictionary": False, "write_page_checksum": True}
        write_whole(path, lambda file: pq.write_table(made, file, **options))

    def _as_stored(self, features: np.ndarray | None) -> np.ndarray:
        if features is None:  # a shard without a usable sample
            return np.empty((0, 1), self.options.dtype)
        with np.errstate(over="ignore"):
            stored = features.astype(self.options.dtype)
        if (np.isinf(stored) & np.isfinite(features)).any():
            raise UserError(f"embeddings up to {np.abs(features).max():.3g} do not fit into float16; use float32")
        return stored

    def read(self, part: Part) -> tuple[dict[str, list], np.ndarray]:
        """Return the columns, and the features (N, E) in float32, of all shards in turn.

        Raises:
            UserError: a shard is of another store, damaged or not there, or the part is not complete.
        """
        if not self.is_complete(part):
            begun = self.path(part, 0).exists()
            why = f"its {part} are unfinished; run" if begun else f"it has no {part}; run"
            raise UserError(f"{self.folder}: {why} contrastive embed with the same model, data and folder")
        columns: dict[str, list] = {name: [] for name in COLUMNS[part]}
        count, seen = sum(self._head(self.path(part, shard))[0] for shard in range(self.num_shards)), 0
        features = np.empty((count, 1), np.float32)
        for shard in range(self.num_shards):
            with damage_told(self.path(part, shard)):
                held, rows = self.read_shard(part, shard)
                if seen == 0 and len(rows):  # a shard without rows does not tell their width
                    features = np.empty((count, rows.shape[1]), np.float32)
                features[seen : seen + len(rows)] = rows
                seen += len(rows)
                for name, values in columns.items():
                    values.extend(held[name])
        return columns, features

    def read_shard(self, part: Part, shard: int) -> tuple[dict[str, list], np.ndarray]:
        """Return the columns and the (N, E) features, as stored, of a shard; see `damage_told` for what it raises."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.path(part, shard)
        table = pq.read_table(path, page_checksum_verification=True)
        self._left_out(table.schema.metadata)
        if self.options.files == "npy":
            features = np.load(path.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)  # as much as there is
        else:
            column = table.column(FEATURES).combine_chunks()
            features = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), column.type.list_size)
        if features.shape[:1] != (len(table),) or features.ndim != 2 or features.dtype.name != self.options.dtype:
            raise ValueError(f"{features.shape} embeddings of {features.dtype} for {len(table)} rows")
        kinds = [(name, pa.string() if name in TEXT_COLUMNS else pa.int64(), name == "label") for name in COLUMNS[part]]
        return table.select(COLUMNS[part]).cast(pa.schema([pa.field(*kind) for kind in kinds])).to_pydict(), features

    def _head(self, path: Path) -> tuple[int, list[tuple[str, str]]]:
        """The number of rows of a shard, and (reason, key) of what was left out, without reading its rows."""
        import pyarrow.parquet as pq

        with damage_told(path):
            metadata = pq.read_metadata(path)
            if not 0 <= metadata.num_rows <= self.options.samples_per_shard * MOST_TEXTS:
                raise ValueError(f"it says that it has {metadata.num_rows:,} rows")
            return metadata.num_rows, self._left_out(metadata.metadata)

    def _left_out(self, metadata: Mapping[bytes, bytes] | None) -> list[tuple[str, str]]:
        """What a shard's metadata say was left out; ValueError where they are of another store."""
        said = metadata or {}
        if said.get(b"contrastive.key") != self.key.encode():
            raise ValueError("it is of other embeddings")
        return json.loads(said[b"contrastive.left_out"])

    def check(self, model: Mapping | None, data: Mapping | None) -> None:
        """Compare with what `model_identity` and `data_identity` say of a model and of data.

        Raises:
            UserError: the embeddings are of another model, of other preprocessing, or of other data.
        """
        held = self.config["model"], self.config["data"]
        if model is not None and model["key"] != held[0]["key"]:
            raise UserError(
                f"{self.folder} holds embeddings of another model ({held[0]['path']}); embed the data with this one"
            )
        if model is not None and model["preprocess"] != held[0]["preprocess"]:
            raise UserError(f"{self.folder} holds embeddings of this model with other preprocessing; embed again")
        if data is not None and data["fingerprint"] != held[1]["fingerprint"]:
            raise UserError(
                f"{self.folder} holds embeddings of other data ({held[1]['name']}), not of {data['name']} as it is now"
            )


@contextlib.contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """What fails while a shard is read becomes a UserError in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Arrow's, NumPy's and those of values of other types
        raise UserError(f"{path} is damaged ({reason_of(error)}); delete it and embed again") from None


def store_config(model: Mapping, source, options: StoreOptions) -> dict:
    """Return what identifies a store of the embeddings of `source` by a model, its 'key' included.

    Args:
        model: what `model_identity` says of it.
    """
    made = {name: getattr(options, name) for name in ("space", "dtype", "precision", "limit")}
    said = {name: model[name] for name in ("key", "preprocess")}  # in any folder it is the same model
    identity = [FORMAT, said, source.stored.fingerprint, made]
    return {
        "format": FORMAT,
        "key": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        "model": dict(model),
        "data": data_identity(source),
        "options": {**asdict(options), "normalized": options.space == "projected"},
    }


def data_identity(source) -> dict:
    """Return what a store says of its data; the fingerprint tells it apart."""
    return {
        "name": source.name,
        "fingerprint": source.stored.fingerprint,
        "num_samples": len(source),
        "class_names": source.class_names,
        "own_names": source.own_names,
        "heldout_labels": sorted(source.heldout_labels),
        "templates": source.templates,
    }


def claim_store(folder: Path, config: dict) -> EmbeddingStore:
    """Begin the store that `store_config` identifies in `folder`, or go on with one begun by the same.

    With several ranks, call it on all of them: the first one begins it, the others find it begun.

    Raises:
        UserError: the folder holds something else, or embeddings of another model, data or options; on all ranks.
    """
    first = together(lambda: _claim(folder, config) if rank() == 0 else None)
    return first or _claim(folder, config)


def _claim(folder: Path, config: dict) -> EmbeddingStore:
    found = find_store(folder)
    if found is None:
        check_writable(folder, "choose another folder")
        if folder.exists() and any(not path.name.endswith(".partial") for path in folder.iterdir()):
            raise UserError(f"{folder} holds something else than embeddings; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, config)
        return EmbeddingStore(folder, config)
    found.check(config["model"], config["data"])
    for name, value in config["options"].items():
        held = found.config["options"].get(name)
        if held != value:
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
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / CONFIG} is not valid JSON ({error})") from None
    written = config.get("format") if isinstance(config, dict) else None
    if not isinstance(written, str) or not written.startswith("contrastive-embeddings-"):
        return None
    if written != FORMAT:
        raise UserError(f"{folder} holds embeddings of format '{written}', this version reads '{FORMAT}'; embed again")
    try:
        _check(config)
        return EmbeddingStore(folder, config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG} is damaged ({reason_of(error)}); delete it and embed again") from None


def _check(config: dict) -> None:
    """Raise ValueError, or what values of other types lead to, for a config that `store_config` does not write."""
    data, options = config["data"], config["options"]
    lists = [data["heldout_labels"], *(data[name] or [] for name in ("class_names", "own_names", "templates"))]
    reasons = [keys for part in COLUMNS if config.get(part) is not None for keys in config[part]["left_out"].values()]
    texts = [config["key"], config["model"]["key"], str(config["model"]["path"]), str(config["model"]["preprocess"])]
    texts += [data["name"], data["fingerprint"], *(name for names in lists[1:] for name in names)]
    if not all(isinstance(each, list) for each in (*lists, *reasons)) or not all(isinstance(x, str) for x in texts):
        raise ValueError("something else stands where names do")
    numbers, small = [*lists[0], data["num_samples"]], options["samples_per_shard"] < 1 or (options["limit"] or 0) < 0
    if not all(type(number) is int for number in numbers) or not 0 <= data["num_samples"] < MOST_SAMPLES or small:
        raise ValueError("numbers that are none of a data set")
