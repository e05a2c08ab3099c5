"""A model under evaluation: its embeddings of any data, made once and kept."""

from pathlib import Path

import torch

from contrastive.data.record import Source
from contrastive.data.sources import open_source
from contrastive.errors import UserError
from contrastive.evaluate.embedding_cache import fill_store, load_embeddings
from contrastive.evaluate.embedding_store import (
    EmbeddingStore,
    StoreOptions,
    claim_store,
    find_store,
    model_key,
    store_config,
)
from contrastive.evaluate.embeddings import EmbeddingSet, Space
from contrastive.results import folder_name


class EvaluatedModel:
    """A loaded model, and the folder that its embeddings are kept in.

    Data is named as `open_source` reads it, or is a folder that scripts/embed.py wrote.

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
        self.key = model_key(bundle)
        self.loading = loading
        self._sources = {} if sources is None else sources
        self._sets: dict[tuple[str, Space, bool], EmbeddingSet] = {}

    @property
    def progress(self) -> bool:
        """Whether to show bars."""
        return self.loading.get("progress", False)

    def source(self, data: str) -> Source:
        """Return the opened data."""
        if data not in self._sources:
            self._sources[data] = open_source(data)
        return self._sources[data]

    def embeddings(self, data: str, space: Space = "projected", texts: bool = False) -> EmbeddingSet:
        """Return the embeddings of `data`, made now where they are not kept yet.

        Raises:
            UserError: data that cannot be opened; a folder of another model's embeddings, or of the other space.
        """
        for known in ((data, space, True), (data, space, texts)):
            if known in self._sets:
                return self._sets[known]
        found = self._given(data, space, texts) or self._own(data, space, texts)
        self._sets[data, space, texts] = found
        return found

    def embed(self, data: str, space: Space = "projected", texts: bool = False) -> EmbeddingStore | None:
        """Fill the store of `data`; call it on all ranks. None for data that is embedded already."""
        if is_store(data):
            return None
        source = self.source(data)
        parts = ("images", "texts") if texts else ("images",)
        options = StoreOptions(space=space, limit=self.limit)
        key = store_config(self.bundle, source, options, self.key)["key"]
        folder = self.cache / f"{folder_name(data)}-{key[:16]}"
        store = claim_store(folder, self.bundle, source, options, key_of_model=self.key)
        fill_store(store, self.bundle, source, parts, device=self.device, **self.loading)
        return store

    def _own(self, data: str, space: Space, texts: bool) -> EmbeddingSet:
        store, source = self.embed(data, space, texts), self.source(data)
        parts = ("images", "texts") if texts else ("images",)
        return load_embeddings(store.folder, source=source, parts=parts)

    def _given(self, data: str, space: Space, texts: bool) -> EmbeddingSet | None:
        """The embeddings in the folder `data`, if it is one of embeddings."""
        if not is_store(data):
            return None
        parts = ("images", "texts") if texts else ("images",)
        found = load_embeddings(Path(data).expanduser(), self.bundle, parts=parts, key_of_model=self.key)
        if found.space != space:
            raise UserError(f"{data} holds {found.space} features; the task uses {space} ones (space: {found.space})")
        return found.subset(self.limit)


def is_store(data: str) -> bool:
    """Whether `data` is a folder that scripts/embed.py wrote."""
    folder = Path(data).expanduser()
    return folder.is_dir() and find_store(folder) is not None
