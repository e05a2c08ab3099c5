"""A folder of embeddings: what it holds, of which model and data, and which of its shards are still to come.

config.json             the model, the preprocessing and the data that the embeddings are of, counts, what was left out
images-00000.parquet    index, key, label, embedding   (or the embedding in images-00000.npy)
texts-00000.parquet     index, caption, text, embedding   (index: the sample; caption: which of its captions)

Shard n holds the samples from n * samples_per_shard on, of those that are embedded.
"""

import hashlib
import json
import os
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from contrastive.distributed import collectives
from contrastive.errors import UserError
from contrastive.evaluate.embedding_files import FileType, features_path, read_head, write_json
from contrastive.evaluate.embeddings import Precision, Space, pick_indices
from contrastive.evaluate.model_key import model_key
from contrastive.evaluate.ranks import together

FORMAT = "contrastive-embeddings-1"
CONFIG = "config.json"
SAMPLES_PER_SHARD = 4096
ABANDONED_AFTER = 3600  # seconds

Part = Literal["images", "texts"]


@dataclass(frozen=True)
class StoreOptions:
    """How embeddings are made and laid out."""

    space: Space = "projected"
    dtype: Literal["float32", "float16"] = "float32"
    files: FileType = "parquet"
    precision: Precision = "fp32"
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
    first = together(lambda: _claim(folder, bundle, source, config) if collectives.rank() == 0 else None)
    return first or _claim(folder, bundle, source, config)


def _claim(folder: Path, bundle, source, config: dict) -> EmbeddingStore:
    found = find_store(folder)
    if found is None:
        _check_free(folder)
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


def _check_free(folder: Path) -> None:
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise UserError(f"cannot write to {folder}; choose another folder")
    if folder.exists() and any(not path.name.endswith(".partial") for path in folder.iterdir()):
        raise UserError(f"{folder} holds something else than embeddings; choose another folder")


def _plain(options) -> dict:
    """A dataclass as JSON gives it back."""
    return json.loads(json.dumps(asdict(options)))


def _listed(values) -> list | None:
    return None if values is None else list(values)
