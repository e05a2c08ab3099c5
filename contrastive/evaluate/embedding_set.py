"""Embeddings in memory, as evaluation reads them. N images, M texts, E channels."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from contrastive.errors import UserError
from contrastive.evaluate.embedding_files import read_shard
from contrastive.evaluate.embedding_store import EmbeddingStore, Part, find_store
from contrastive.evaluate.embeddings import Space, pick_indices


@dataclass(frozen=True)
class TextEmbeddings:
    """Captions of the images of an EmbeddingSet."""

    features: torch.Tensor
    """(M, E) float32."""
    row: torch.Tensor
    """(M,) int64: the image each belongs to, a row of the set."""
    caption: torch.Tensor
    """(M,) int64: which of the image's captions it is, from 0."""
    texts: tuple[str, ...]


@dataclass(frozen=True)
class EmbeddingSet:
    """What is known of the images of one source."""

    name: str
    """The data, for messages."""
    features: torch.Tensor
    """(N, E) float32."""
    index: torch.Tensor
    """(N,) int64, rising: place in the source."""
    labels: torch.Tensor
    """(N,) int64, -1 where there is none."""
    keys: tuple[str, ...]
    class_names: tuple[str, ...] | None
    space: Space
    skipped: Counter[str]
    """Number of samples left out, by reason."""
    heldout_labels: frozenset[int] = frozenset()
    """Classes that training never sees, where the source tells them apart."""
    templates: tuple[str, ...] | None = None
    """The source's own prompt templates."""
    texts: TextEmbeddings | None = None

    def labelled(self, task: str, class_names: Sequence[str] | None = None) -> "EmbeddingSet":
        """Return the rows that have a label.

        class_names: those that labels have to be among; the data's own when None.

        Raises:
            UserError: no image, no label, or one out of range.
        """
        if len(self.labels) == 0:
            raise UserError(f"{self.name}: none of its images could be read")
        has_label = self.labels >= 0
        if not has_label.any():
            raise UserError(f"{self.name} has no class labels; {task} needs labelled data")
        names = self.class_names if class_names is None else class_names
        if names is not None and int(self.labels.max()) >= len(names):
            span = f"labels up to {int(self.labels.max())}"
            raise UserError(f"{self.name} has {span}, but there are {len(names)} class names")
        if has_label.all():
            return self
        rows = has_label.nonzero()[:, 0]
        skipped = self.skipped + Counter(missing_label=len(self.labels) - len(rows))
        keys = tuple(self.keys[row] for row in rows.tolist())
        chosen = {name: getattr(self, name)[rows] for name in ("features", "index", "labels")}
        return replace(self, **chosen, keys=keys, skipped=skipped, texts=None)

    def subset(self, limit: int | None) -> "EmbeddingSet":
        """Return a fixed random subset of `limit` images, with their texts; all when None."""
        if limit is None or limit >= len(self.index):
            return self
        rows = torch.from_numpy(pick_indices(len(self.index), limit))
        texts = self.texts
        if texts is not None:
            place = torch.full((len(self.index),), -1).scatter(0, rows, torch.arange(limit))[texts.row]
            kept = (place >= 0).nonzero()[:, 0]
            wording = tuple(texts.texts[row] for row in kept.tolist())
            texts = TextEmbeddings(texts.features[kept], place[kept], texts.caption[kept], wording)
        chosen = {name: getattr(self, name)[rows] for name in ("features", "index", "labels")}
        return replace(self, **chosen, keys=tuple(self.keys[row] for row in rows.tolist()), texts=texts)


def load_embeddings(
    folder: Path | str,
    bundle=None,
    source=None,
    *,
    parts: tuple[Part, ...] = ("images",),
    key_of_model: str | None = None,
) -> EmbeddingSet:
    """Read what `scripts/embed.py` wrote.

    Args:
        bundle, source: the model and the data that the embeddings have to be of, where it matters.
        parts: ('images',), or ('images', 'texts') to have the captions' embeddings too.
        key_of_model: the bundle's `model_key` where it is known already.

    Raises:
        UserError: no embeddings there, unfinished or damaged ones, or those of another model or other data.
    """
    store = find_store(Path(folder))
    if store is None:
        raise UserError(f"no embeddings in {folder}; scripts/embed.py makes them")
    store.check(bundle, source, key_of_model)
    found = read_store(store, parts)
    if source is None:
        return found
    return replace(found, name=source.name, templates=source.templates)  # they may be newer


def read_store(store: EmbeddingStore, parts: tuple[Part, ...] = ("images",)) -> EmbeddingSet:
    """Read a store whose `parts` are complete; UserError otherwise."""
    for part in parts:
        if not store.is_complete(part):
            begun = store.path(part, 0).exists()
            why = f"its {part} are unfinished; run" if begun else f"it has no {part}; run"
            raise UserError(f"{store.folder}: {why} scripts/embed.py with the same model, data and folder")
    said, columns, features = store.config["data"], *_rows(store, "images")
    labels = [-1 if label is None else label for label in columns["label"]]
    found = EmbeddingSet(
        name=said["name"],
        features=features,
        index=torch.tensor(columns["index"], dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
        keys=tuple(columns["key"]),
        class_names=None if said["class_names"] is None else tuple(said["class_names"]),
        space=store.config["options"]["space"],
        skipped=_counted(store, "images"),
        heldout_labels=frozenset(said["heldout_labels"]),
        templates=None if said["templates"] is None else tuple(said["templates"]),
    )
    if "texts" not in parts:
        return found
    return replace(found, texts=_texts(store, found.index), skipped=found.skipped + _counted(store, "texts"))


def _texts(store: EmbeddingStore, images: torch.Tensor) -> TextEmbeddings:
    """Those of the images that could be embedded."""
    columns, features = _rows(store, "texts")
    index = torch.tensor(columns["index"], dtype=torch.int64)
    row = torch.searchsorted(images, index).clamp(max=max(0, len(images) - 1))
    known = (images[row] == index if len(images) else torch.zeros_like(index, dtype=torch.bool)).nonzero()[:, 0]
    texts = tuple(columns["text"][place] for place in known.tolist())
    return TextEmbeddings(features[known], row[known], torch.tensor(columns["caption"])[known], texts)


def _rows(store: EmbeddingStore, part: Part) -> tuple[dict[str, list], torch.Tensor]:
    """All columns, and the features (rows, E) in float32, of the shards in turn."""
    count = store.config[part]["embeddings"]
    names = {"images": ("index", "key", "label"), "texts": ("index", "caption", "text")}[part]
    columns: dict[str, list] = {name: [] for name in names}
    features, seen = np.empty((count, 1), np.float32), 0
    for shard in range(store.num_shards):
        held, rows = read_shard(store.path(part, shard), store.config["options"]["files"], store.key)
        if len(rows) == 0:
            continue
        if seen == 0:
            features = np.empty((count, rows.shape[1]), np.float32)
        if seen + len(rows) > count or rows.shape[1] != features.shape[1]:
            raise UserError(f"{store.path(part, shard)} does not fit the other shards; delete it and embed again")
        features[seen : seen + len(rows)] = rows
        seen += len(rows)
        for name in names:
            columns[name].extend(held[name])
    if seen != count:
        raise UserError(f"{store.folder}: {seen} {part} found, {count} were written; embed again")
    return columns, torch.from_numpy(features)


def _counted(store: EmbeddingStore, part: Part) -> Counter[str]:
    return Counter({reason: len(keys) for reason, keys in store.config[part]["left_out"].items()})
