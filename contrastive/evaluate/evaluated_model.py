"""A model under evaluation, and its embeddings of any data: made on all ranks, kept in stores, read back whole.

N rows, E channels.
"""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from contrastive.data.record import BadSample, Source, some_have
from contrastive.data.sources import announce, open_source
from contrastive.distributed.collectives import rank, together, world_size
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
from contrastive.evaluate.embeddings import (
    EmbeddingSet,
    Space,
    TextEmbeddings,
    embed_texts,
    evaluating,
    image_batches,
    in_precision,
    usable_captions,
)
from contrastive.interop.bundle import weights_key
from contrastive.log import bar
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


def has_captions(source) -> bool:
    """Whether samples have captions of their own; prompts made of class names are none."""
    return not source.prompted and some_have(source, lambda index: usable_captions(source, index)[0])


def check_texts(bundle, source) -> None:
    """UserError unless `bundle` can embed texts and `source` has some."""
    if bundle.tokenizer is None:
        raise UserError(f"{bundle.path} has no text tower; it embeds images only")
    if not has_captions(source):
        raise UserError(f"{source.name} has no captions to embed as texts")


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
    fill = {"images": partial(_fill_images, num_workers=num_workers), "texts": _fill_texts}
    for part in parts:
        # Where files were deleted since, as a damaged one has to be, they are made again.
        missing = together(partial(store.missing, part))
        if store.is_complete(part) and not missing:
            continue
        mine = [shard for shard in missing if shard % world_size() == rank()]
        together(partial(fill[part], store, bundle, source, mine, **loading))
        together(partial(store.finish, part) if rank() == 0 else lambda: None)


def _fill_images(store: EmbeddingStore, bundle, source, shards: list[int], **loading) -> None:
    # One stream over all shards, so that batches are full and workers read ahead over their borders.
    indices = np.concatenate([np.empty(0, np.int64), *map(store.indices, shards)])
    with evaluating(bundle.model):
        samples = _samples(store, bundle, source, indices, **loading)
        for shard in shards:
            found = list(islice(samples, len(store.indices(shard))))
            good, left_out = ([sample for sample in found if len(sample) == size] for size in (3, 2))
            rows = [(index, key, _label(source, index)) for index, key, _ in good]
            features = np.stack([feature for *_, feature in good]) if good else None
            store.write("images", shard, rows, features, left_out)


def _samples(store: EmbeddingStore, bundle, source, indices: np.ndarray, **loading) -> Iterator[tuple]:
    """For each index in turn (index, key, features (E,)) of its image, or (reason, key) where it is left out."""
    asked, kinds = iter(indices.tolist()), {"space": store.options.space, "precision": store.options.precision}
    for batch in image_batches(bundle.model, source, bundle.preprocess, indices, **kinds, **loading):
        good, bad = zip(batch.index.tolist(), batch.keys, batch.features.numpy(), strict=True), iter(batch.bad)
        rows = {row[0]: row for row in good}
        for index in islice(asked, len(batch.index) + len(batch.bad)):
            yield rows[index] if index in rows else next(bad)  # both come in the order asked for


def _label(source, index: int) -> int | None:
    try:
        return source.label(index)
    except BadSample:
        return None


def _fill_texts(
    store: EmbeddingStore, bundle, source, shards: list[int], *, device, batch_size: int, progress: bool
) -> None:
    for shard in bar(shards, "embedding texts", shown=progress):
        rows, left_out = [], []
        for index in store.indices(shard).tolist():
            texts, faults = _texts_of(source, index)
            rows += [(index, caption, text) for caption, text in texts]
            left_out += [(fault, f"sample {index}") for fault in faults]
        texts = [text for *_, text in rows]
        with in_precision(store.options.precision, device):
            features = embed_texts(bundle.model, bundle.tokenizer, texts, device=device, batch_size=4 * batch_size)
        store.write("texts", shard, rows, features.numpy() if rows else None, left_out)


def _texts_of(source, index: int) -> tuple[list[tuple[int, str]], list[str]]:
    """The usable captions of a sample with their numbers, and what is wrong with the others."""
    try:
        texts, faults = usable_captions(source, index)
    except BadSample as fault:
        return [], [fault.reason]
    return texts, faults if texts or faults else ["missing_caption"]


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


def model_identity(bundle) -> dict:
    """Return what a store says of its model: 'path', 'key' (see `model_key`) and 'preprocess', its options."""
    preprocess = json.loads(json.dumps(_said(asdict(bundle.preprocess.config))))  # as config.json gives them back
    return {"path": str(getattr(bundle, "path", "")), "key": model_key(bundle), "preprocess": preprocess}


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
        json.dumps(_said(options), sort_keys=True, default=str),
        _tokenizer_key(bundle.tokenizer),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _said(options: dict) -> dict:
    """Return options without those of native images where a model has none: what was stored before is still its own."""
    of_native = ("native", "patch_size", "patches")
    kept = {name: value for name, value in options.items() if value or name not in of_native}
    return {name: _said(value) if isinstance(value, dict) else value for name, value in kept.items()}


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
