"""A teacher's embeddings of views and captions, made on all ranks for `StoredViews`. K views, E embed_dim."""

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from contrastive.data.captions import caption_fault
from contrastive.data.record import BadSample, Source
from contrastive.data.stored_views import StoredViews, Views, claim_views, views_config
from contrastive.distributed.collectives import gather_objects, rank, together, world_size
from contrastive.errors import UserError
from contrastive.evaluate.embeddings import embed_texts, evaluating, image_batches, in_precision
from contrastive.evaluate.evaluated_model import check_texts, model_identity
from contrastive.interop.bundle import weights_key
from contrastive.log import bar


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
    loading = {"device": device, "num_workers": num_workers, "views": views}
    embed = partial(_shard, store, bundle, source, batch_size=batch_size, loading=loading)
    mine = [shard for shard in store.missing() if shard % world_size() == rank()]
    left_out = together(partial(_fill, store, bar(mine, "embedding views", shown=progress), embed))
    together(lambda: store.finish(source) if rank() == 0 else None)
    return store, sum(gather_objects(left_out), Counter())


def _fill(store: StoredViews, shards, embed) -> Counter[str]:
    left_out: Counter[str] = Counter()
    for shard in shards:
        *arrays, faults = embed(shard)
        store.write(shard, *arrays)
        left_out.update(faults)
    return left_out


def _shard(store: StoredViews, bundle, source: Source, shard: int, *, batch_size: int, loading: dict):
    """Return images (n, K, E), texts (m, E), starts (n + 1,) of a shard, and what was wrong with what is left out."""
    indices, faults = store.indices(shard), []
    dtype, precision, device = store.config["dtype"], store.config["precision"], loading["device"]
    images = np.full((len(indices), store.views.count, store.embed_dim), np.nan, dtype)
    samples = {"batch_size": -(-batch_size // store.views.count), "precision": precision, **loading}
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
