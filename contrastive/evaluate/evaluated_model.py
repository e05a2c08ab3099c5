"""A model under evaluation, and its embeddings of any data: made on all ranks, kept in stores, read back whole.

N rows, E channels.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from contrastive.data.record import Source
from contrastive.data.sources import announce, open_source
from contrastive.errors import UserError
from contrastive.evaluate.embedding_store import (
    EmbeddingStore,
    Part,
    StoreOptions,
    claim_store,
    data_identity,
    find_store,
    store_config,
)
from contrastive.evaluate.embedding_writing import fill_store, model_identity
from contrastive.evaluate.embeddings import EmbeddingSet, Space, TextEmbeddings
from contrastive.results import folder_name


class EvaluatedModel:
    """A loaded model, and the folder that its embeddings are kept in.

    Data is named as `open_source` reads it, or is a folder that contrastive embed wrote.

    Args:
        name: in tables and messages.
        cache: folder of the embeddings, one folder in it for each data set, by the store's key.
        sources: opened data by specification, shared by models.
        limit: use a fixed random subset of that many images of each data set.
        loading: batch_size, num_workers, progress.
    """

    def __init__(
        self,
        name: str,
        bundle,
        cache: Path,
        *,
        device: str | torch.device,
        sources: dict[str, Source] | None = None,
        limit: int | None = None,
        **loading,
    ):
        self.name, self.bundle, self.cache, self.device, self.limit = name, bundle, cache, device, limit
        self.identity = model_identity(bundle)
        self.loading = loading
        self._sources = {} if sources is None else sources
        self._sets: dict[tuple[str, Space, bool], EmbeddingSet] = {}

    @property
    def key(self) -> str:
        """See `model_key`."""
        return self.identity["key"]

    @property
    def progress(self) -> bool:
        """Whether to show bars."""
        return self.loading.get("progress", False)

    @property
    def reading(self) -> dict[str, Any]:
        """How pictures are read where their embeddings do not serve: device, limit and loading."""
        return {"device": self.device, "limit": self.limit, **self.loading}

    def source(self, data: str) -> Source:
        """Return the opened data."""
        if data not in self._sources:
            self._sources[data] = open_source(data)
            announce(self._sources[data])
        return self._sources[data]

    def embeddings(self, data: str, space: Space = "projected", texts: bool = False) -> EmbeddingSet:
        """Return the embeddings of `data`, made now where they are not kept yet.

        Raises:
            UserError: data that cannot be opened; a folder of another model's embeddings, or of the other space.
        """
        for known in ((data, space, True), (data, space, texts)):  # a set with texts serves those who want none
            if known in self._sets:
                return self._sets[known]
        store = self.embed(data, space, texts)
        if store is None:
            found = load_embeddings(Path(data).expanduser(), self.identity, parts=_parts(texts))
            if found.space != space:
                held = f"{data} holds {found.space} features"
                raise UserError(f"{held}; the task uses {space} ones (space: {found.space})")
            found = found.subset(self.limit)
        else:
            found = load_embeddings(store.folder, source=self.source(data), parts=_parts(texts))
        self._sets[data, space, texts] = found
        return found

    def embed(self, data: str, space: Space = "projected", texts: bool = False) -> EmbeddingStore | None:
        """Fill the store of `data`; call it on all ranks. None where `data` is a folder of embeddings."""
        given = Path(data).expanduser()
        if given.is_dir() and find_store(given) is not None:
            return None
        source = self.source(data)
        config = store_config(self.identity, source, StoreOptions(space=space, limit=self.limit))
        store = claim_store(self.cache / f"{folder_name(data)}-{config['key'][:16]}", config)
        fill_store(store, self.bundle, source, _parts(texts), device=self.device, **self.loading)
        return store


def _parts(texts: bool) -> tuple[Part, ...]:
    return ("images", "texts") if texts else ("images",)


def load_embeddings(
    folder: Path | str, model: Mapping | None = None, source=None, *, parts: tuple[Part, ...] = ("images",)
) -> EmbeddingSet:
    """Read what `contrastive embed` wrote.

    Args:
        model, source: the `model_identity` and the data that the embeddings have to be of, where it matters.
        parts: ('images',), or ('images', 'texts') to have the captions' embeddings too.

    Raises:
        UserError: no embeddings there, unfinished or damaged ones, or those of another model or other data.
    """
    store = find_store(Path(folder))
    if store is None:
        raise UserError(f"no embeddings in {folder}; contrastive embed makes them")
    store.check(model, None if source is None else data_identity(source))
    said, held = store.config["data"], {part: store.read(part) for part in parts}
    columns, features = held["images"]
    index = torch.tensor(columns["index"], dtype=torch.int64)
    members = ("class_names", "own_names", "templates")
    # The source's own may be newer.
    names = {name: said.get(name) if source is None else getattr(source, name) for name in members}
    left_out = [Counter({r: len(keys) for r, keys in store.config[part]["left_out"].items()}) for part in parts]
    return EmbeddingSet(
        name=said["name"] if source is None else source.name,
        features=torch.from_numpy(features),
        index=index,
        labels=torch.tensor([-1 if label is None else label for label in columns["label"]], dtype=torch.int64),
        keys=tuple(columns["key"]),
        **{name: value and tuple(value) for name, value in names.items()},
        space=store.options.space,
        skipped=sum(left_out, Counter()),
        heldout_labels=frozenset(said["heldout_labels"]),
        texts=_texts(index, *held["texts"]) if "texts" in parts else None,
    )


def _texts(images: torch.Tensor, columns: dict[str, list], features: np.ndarray) -> TextEmbeddings:
    """Those of the images (N,), by source index, that could be embedded."""
    rows = {index: row for row, index in enumerate(images.tolist())}
    known = torch.tensor([place for place, index in enumerate(columns["index"]) if index in rows], dtype=torch.int64)
    row = torch.tensor([rows.get(index, -1) for index in columns["index"]], dtype=torch.int64)
    caption = torch.tensor(columns["caption"], dtype=torch.int64)
    return TextEmbeddings(torch.from_numpy(features), row, caption, columns["text"]).chosen(known)
