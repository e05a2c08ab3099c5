"""What `contrastive embed` writes, made on all ranks: a store of embeddings, in clip-retrieval's layout too, or views.

The layout of clip-retrieval (github.com/rom1504/clip-retrieval), which its index and its server read:

img_emb/img_emb_0.npy          (N, E) float16, of unit length
text_emb/text_emb_0.npy        (N, E) float16: of each image one caption, where captions are embedded
metadata/metadata_0.parquet    image_path, caption

Row n of the three is one sample. Files are numbered as the shards of the store, with as many digits for each. Views of
images, for `StoredViews`, have a teacher's embeddings. N rows, E channels, K views.
"""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from contrastive.data.captions import caption_fault
from contrastive.data.record import BadSample, Source, some_have
from contrastive.data.stored_views import StoredViews, Views, claim_views, views_config
from contrastive.distributed.collectives import gather_objects, rank, together, world_size
from contrastive.errors import UserError
from contrastive.evaluate.embedding_store import EmbeddingStore, Part, damage_told
from contrastive.evaluate.embeddings import embed_texts, evaluating, image_batches, in_precision, usable_captions
from contrastive.files import write_whole
from contrastive.interop.bundle import weights_key
from contrastive.log import bar

FOLDERS = {"images": ("img_emb", "image_path"), "texts": ("text_emb", "caption")}


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
            try:
                texts, faults = usable_captions(source, index)
            except BadSample as fault:
                texts, faults = [], [fault.reason]
            if not texts and not faults:
                faults = ["missing_caption"]
            rows += [(index, caption, text) for caption, text in texts]
            left_out += [(fault, f"sample {index}") for fault in faults]
        texts = [text for *_, text in rows]
        with in_precision(store.options.precision, device):
            features = embed_texts(bundle.model, bundle.tokenizer, texts, device=device, batch_size=4 * batch_size)
        store.write("texts", shard, rows, features.numpy() if rows else None, left_out)


def write_clip_retrieval(store: EmbeddingStore, parts: tuple[Part, ...]) -> int:
    """Write the embeddings of a store in its folder in that layout too; return the number of rows.

    Of an image the first caption that can be used is taken. With both parts, images without one are left out.

    Raises:
        UserError: features that are not of the projected space; or a shard that is damaged.
    """
    if store.options.space != "projected":
        raise UserError(f"{store.folder} holds {store.options.space} features; clip-retrieval searches projected ones")
    import pyarrow as pa
    import pyarrow.parquet as pq

    count, digits = 0, len(str(max(0, store.num_shards - 1)))
    for shard in range(store.num_shards):
        held = {}
        for part in parts:
            with damage_told(store.path(part, shard)):
                held[part] = store.read_shard(part, shard)
        columns, features = _aligned(held)
        size = len(next(iter(columns.values())))
        if size == 0:
            continue
        table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
        writers = {FOLDERS[part][0]: ("npy", partial(np.save, arr=rows)) for part, rows in features.items()}
        writers["metadata"] = "parquet", partial(pq.write_table, table)
        for name, (suffix, write) in writers.items():
            (store.folder / name).mkdir(exist_ok=True)
            write_whole(store.folder / name / f"{name}_{shard:0{digits}d}.{suffix}", write)
        count += size
    return count


def _aligned(held: dict[Part, tuple[dict[str, list], np.ndarray]]) -> tuple[dict[str, list], dict[Part, np.ndarray]]:
    """The columns of metadata and the features of each part, of the samples that have all parts, once each."""
    places: dict[Part, dict[int, int]] = {}
    for part, (columns, _) in held.items():
        places[part] = {}
        for place, index in enumerate(columns["index"]):
            places[part].setdefault(index, place)
    common = [index for index in next(iter(places.values())) if all(index in own for own in places.values())]
    columns, features = {}, {}
    for part, (said, rows) in held.items():
        chosen = [places[part][index] for index in common]
        name = {"images": "key", "texts": "text"}[part]
        columns[FOLDERS[part][1]] = [said[name][place] for place in chosen]
        features[part] = np.asarray(rows)[chosen].astype(np.float16)
    return columns, features


def embed_views(
    folder: Path,
    bundle,
    source: Source,
    views: Views,
    *,
    device: str,
    batch_size: int = 256,
    num_workers: int = 0,
    progress: bool = False,
    **options,
) -> tuple[StoredViews, Counter[str]]:
    """Write what `folder` lacks of the embeddings of all views and captions. Call it on all ranks.

    Args:
        options: dtype and precision, as in `StoreOptions`, and samples_per_shard.

    Returns:
        The folder, and how many images and captions were left out now, by reason.

    Raises:
        UserError: a teacher or data that will not do; a folder that holds something else.
    """
    check_texts(bundle, source)
    height, width = bundle.preprocess.config.size
    if height != width:
        raise UserError(f"{bundle.path} takes images of {height}×{width}; views are square")
    model = model_identity(bundle) | {"weights": weights_key(bundle.model)}
    scale = bundle.model.logit_scale.exp().item()
    config = views_config(model, bundle.model.config.embed_dim, scale, source, views, **options)
    begun = together(lambda: claim_views(folder, config) if rank() == 0 else None)
    store = begun or claim_views(folder, config)
    loading = {"device": device, "num_workers": num_workers, "batch_size": -(-batch_size // views.count)}
    mine = [shard for shard in store.missing() if shard % world_size() == rank()]

    def fill() -> Counter[str]:
        left_out: Counter[str] = Counter()
        for shard in bar(mine, "embedding views", shown=progress):
            *arrays, faults = _views_of(store, bundle, source, shard, **loading)
            store.write(shard, *arrays)
            left_out.update(faults)
        return left_out

    left_out = together(fill)
    together(lambda: store.finish(source) if rank() == 0 else None)
    return store, sum(gather_objects(left_out), Counter())


def _views_of(store: StoredViews, bundle, source: Source, shard: int, *, device: str, **loading):
    """Return images (n, K, E), texts (m, E), starts (n + 1,) of a shard, and what was wrong with what is left out."""
    indices, faults = store.indices(shard), []
    dtype, precision = store.config["dtype"], store.config["precision"]
    images = np.full((len(indices), store.views.count, store.embed_dim), np.nan, dtype)
    samples = {"device": device, "precision": precision, "views": store.views, **loading}
    with evaluating(bundle.model):
        for batch in image_batches(bundle.model, source, bundle.preprocess, np.asarray(indices), **samples):
            if len(batch.index):
                images[batch.index.numpy() - indices.start] = batch.features.numpy()
            faults += [reason for reason, _ in batch.bad]
    captions = [_captions(source, index) for index in indices]
    starts = np.cumsum([0, *map(len, captions)])
    flat = [text for texts in captions for text in texts]
    found = [caption_fault(text) for text in flat]
    good = [place for place, fault in enumerate(found) if fault is None]
    usable = [flat[place] for place in good]
    texts = np.full((len(flat), store.embed_dim), np.nan, dtype)
    with in_precision(precision, device):
        texts[good] = embed_texts(bundle.model, bundle.tokenizer, usable, device=device).numpy()
    return images, texts, starts, faults + [fault for fault in found if fault]


def _captions(source: Source, index: int) -> tuple[str, ...]:
    try:
        return source.captions(index)
    except BadSample:
        return ()
