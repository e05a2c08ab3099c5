"""A model under evaluation, and its embeddings of any data: made on all ranks, kept in stores, read back whole.

N rows, E channels.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from contrastive.data.record import BadSample, Source, some_have
from contrastive.data.sources import open_source
from contrastive.distributed.collectives import rank, together, world_size
from contrastive.errors import UserError
from contrastive.evaluate.embedding_store import (
    EmbeddingStore,
    Part,
    StoreOptions,
    claim_store,
    find_store,
    model_key,
    read_shard,
    store_config,
    write_shard,
)
from contrastive.evaluate.embeddings import (
    EmbeddingSet,
    Space,
    TextEmbeddings,
    embed_texts,
    evaluating,
    image_batches,
    usable_captions,
)
from contrastive.log import bar
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
        for known in ((data, space, True), (data, space, texts)):  # a set with texts serves those who want none
            if known in self._sets:
                return self._sets[known]
        store = self.embed(data, space, texts)
        if store is None:
            found = self._given(data, space, texts)
        else:
            found = load_embeddings(store.folder, source=self.source(data), parts=_parts(texts))
        self._sets[data, space, texts] = found
        return found

    def embed(self, data: str, space: Space = "projected", texts: bool = False) -> EmbeddingStore | None:
        """Fill the store of `data`; call it on all ranks. None where `data` is a folder that scripts/embed.py wrote."""
        given = Path(data).expanduser()
        if given.is_dir() and find_store(given) is not None:
            return None
        source = self.source(data)
        options = StoreOptions(space=space, limit=self.limit)
        key = store_config(self.bundle, source, options, self.key)["key"]
        folder = self.cache / f"{folder_name(data)}-{key[:16]}"
        store = claim_store(folder, self.bundle, source, options, key_of_model=self.key)
        fill_store(store, self.bundle, source, _parts(texts), device=self.device, **self.loading)
        return store

    def _given(self, data: str, space: Space, texts: bool) -> EmbeddingSet:
        """The embeddings in the folder `data`, which has to be this model's."""
        folder = Path(data).expanduser()
        found = load_embeddings(folder, self.bundle, parts=_parts(texts), key_of_model=self.key)
        if found.space != space:
            raise UserError(f"{data} holds {found.space} features; the task uses {space} ones (space: {found.space})")
        return found.subset(self.limit)


def _parts(texts: bool) -> tuple[Part, ...]:
    return ("images", "texts") if texts else ("images",)


def has_captions(source) -> bool:
    """Whether samples have captions of their own; prompts made of class names are none."""
    return not source.prompted and some_have(source, lambda index: usable_captions(source, index)[0])


def fill_store(
    store: EmbeddingStore,
    bundle,
    source,
    parts: tuple[Part, ...],
    *,
    device: str | torch.device,
    batch_size: int = 256,
    num_workers: int = 0,
    progress: bool = False,
) -> None:
    """Embed what `store` lacks of `parts` ('images', 'texts'). Call it on all ranks.

    Shards that are there are left alone; one that a kill interrupted is made anew. Images and captions that
    cannot be used are left out, and counted by reason in config.json.

    Raises:
        UserError: texts of a model without a text tower, or of data without captions; see `EmbeddingStore.missing`.
    """
    if "texts" in parts:
        check_texts(bundle, source)
    loading = {"device": device, "batch_size": batch_size, "progress": progress}
    for part in parts:
        # Where files were deleted since, as a damaged one has to be, they are made again.
        if store.is_complete(part) and not together(partial(store.missing, part)):
            continue
        more = {"num_workers": num_workers} if part == "images" else {}
        together(partial(_fill, store, bundle, source, part, **loading, **more))
        together(partial(store.finish, part) if rank() == 0 else lambda: None)


def _fill(store: EmbeddingStore, bundle, source, part: Part, **loading) -> None:
    """Embed this rank's share of the missing shards: r, r + W, ..."""
    mine = [shard for shard in store.missing(part) if shard % world_size() == rank()]
    (_fill_images if part == "images" else _fill_texts)(store, bundle, source, mine, **loading)


def check_texts(bundle, source) -> None:
    """UserError unless `bundle` can embed texts and `source` has some."""
    if bundle.tokenizer is None:
        raise UserError(f"{bundle.path} has no text tower; it embeds images only")
    if not has_captions(source):
        raise UserError(f"{source.name} has no captions to embed as texts")


def _fill_images(store: EmbeddingStore, bundle, source, shards: list[int], **loading) -> None:
    # One stream over all shards, so that batches are full and workers read ahead over their borders.
    indices = [store.indices(shard) for shard in shards]
    with evaluating(bundle.model):
        samples = _samples(store, bundle, source, np.concatenate([np.empty(0, np.int64), *indices]), **loading)
        for number, wanted in zip(shards, indices, strict=True):
            found = list(islice(samples, len(wanted)))
            good, left_out = ([sample for sample in found if len(sample) == size] for size in (3, 2))
            index, keys, features = zip(*good, strict=True) if good else ((), (), ())
            columns = {"index": index, "key": keys, "label": [_label(source, place) for place in index]}
            _write(store, "images", number, columns, np.stack(features) if good else None, left_out)


def _samples(store: EmbeddingStore, bundle, source, indices: np.ndarray, **loading) -> Iterator[tuple]:
    """For each index in turn (index, key, features (E,)) of its image, or (reason, key) where it is left out."""
    options, asked = store.config["options"], iter(indices.tolist())
    kinds = {"space": options["space"], "precision": options["precision"]}
    for batch in image_batches(bundle.model, source, bundle.preprocess, indices, **kinds, **loading):
        good, bad = zip(batch.index.tolist(), batch.keys, batch.features.numpy(), strict=True), iter(batch.bad)
        rows = {row[0]: row for row in good}
        for index in islice(asked, len(batch.index) + len(batch.bad)):
            yield rows[index] if index in rows else next(bad)  # both come in the order asked for


def _fill_texts(
    store: EmbeddingStore, bundle, source, shards: list[int], *, device, batch_size: int, progress: bool
) -> None:
    for number in bar(shards, "embedding texts", shown=progress):
        rows, left_out = [], []
        for index in store.indices(number).tolist():
            texts, faults = _texts_of(source, index)
            rows += [(index, caption, text) for caption, text in texts]
            left_out += [(fault, f"sample {index}") for fault in faults]
        index, caption, text = zip(*rows, strict=True) if rows else ((), (), ())
        size = {"device": device, "batch_size": 4 * batch_size}
        with torch.autocast(
            torch.device(device).type, torch.bfloat16, enabled=store.config["options"]["precision"] == "bf16"
        ):
            features = embed_texts(bundle.model, bundle.tokenizer, text, **size)
        columns = {"index": index, "caption": caption, "text": text}
        _write(store, "texts", number, columns, features.numpy() if len(features) else None, left_out)


def _texts_of(source, index: int) -> tuple[list[tuple[int, str]], list[str]]:
    """The usable captions of a sample with their numbers, and what is wrong with the others."""
    try:
        texts, faults = usable_captions(source, index)
    except BadSample as fault:
        return [], [fault.reason]
    return texts, faults if texts or faults else ["missing_caption"]


def _label(source, index: int) -> int | None:
    try:
        return source.label(index)
    except BadSample:
        return None


def _write(
    store: EmbeddingStore, part: Part, number: int, columns: dict, features: np.ndarray | None, left_out: list
) -> None:
    dtype = np.dtype(store.config["options"]["dtype"])
    stored = np.empty((0, 1), dtype)  # a shard without a usable sample
    if features is not None:
        with np.errstate(over="ignore"):
            stored = features.astype(dtype)
        if (np.isinf(stored) & np.isfinite(features)).any():
            raise UserError(f"embeddings up to {np.abs(features).max():.3g} do not fit into float16; use float32")
    path = store.path(part, number)
    write_shard(path, columns, stored, key=store.key, left_out=left_out, files=store.config["options"]["files"])


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
    for part in parts:
        if not store.is_complete(part):
            begun = store.path(part, 0).exists()
            why = f"its {part} are unfinished; run" if begun else f"it has no {part}; run"
            raise UserError(f"{store.folder}: {why} scripts/embed.py with the same model, data and folder")
    said, columns, features = store.config["data"], *_rows(store, "images")
    labels = [-1 if label is None else label for label in columns["label"]]
    found = EmbeddingSet(
        name=said["name"] if source is None else source.name,
        features=features,
        index=torch.tensor(columns["index"], dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
        keys=tuple(columns["key"]),
        class_names=_tuple(said["class_names"]),
        space=store.config["options"]["space"],
        skipped=_counted(store, "images"),
        heldout_labels=frozenset(said["heldout_labels"]),
        templates=_tuple(said["templates"]) if source is None else source.templates,  # they may be newer
    )
    if "texts" not in parts:
        return found
    return replace(found, texts=_texts(store, found.index), skipped=found.skipped + _counted(store, "texts"))


def _tuple(values: list | None) -> tuple | None:
    return None if values is None else tuple(values)


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
