"""Filling a store: every rank embeds the missing ones among shards r, r + W, ... and writes each when it is done."""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from rich.progress import track

from contrastive.data.captions import caption_fault
from contrastive.data.record import BadSample
from contrastive.distributed import collectives
from contrastive.errors import UserError
from contrastive.evaluate.embedding_files import write_shard
from contrastive.evaluate.embedding_store import EmbeddingStore, Part
from contrastive.evaluate.embeddings import embed_texts, evaluating, image_batches
from contrastive.evaluate.ranks import together
from contrastive.log import console

PROBED = 100


def has_captions(source) -> bool:
    """Whether samples have captions of their own; prompts made of class names are none."""
    if source.prompted:
        return False
    for index in range(0, len(source), max(1, len(source) // PROBED)):
        try:
            if any(text.strip() for text in source.captions(index)):
                return True
        except BadSample:
            continue
    return False


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
        together(partial(store.finish, part) if collectives.rank() == 0 else lambda: None)


def _fill(store: EmbeddingStore, bundle, source, part: Part, **loading) -> None:
    """Embed this rank's share of the missing shards."""
    world, rank = collectives.world_size(), collectives.rank()
    mine = [shard for shard in store.missing(part) if shard % world == rank]
    (_fill_images if part == "images" else _fill_texts)(store, bundle, source, mine, **loading)


def check_texts(bundle, source) -> None:
    """UserError unless `bundle` can embed texts and `source` has some."""
    if bundle.tokenizer is None:
        raise UserError(f"{bundle.path} has no text tower; it embeds images only")
    if not has_captions(source):
        raise UserError(f"{source.name} has no captions to embed as texts")


@dataclass
class _Shard:
    """Rows of a shard on their way."""

    features: list[np.ndarray] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)


def _fill_images(store: EmbeddingStore, bundle, source, shards: list[int], **loading) -> None:
    options = store.config["options"]
    kinds = {"space": options["space"], "precision": options["precision"]}
    indices = [store.indices(shard) for shard in shards]
    share = np.concatenate(indices) if indices else np.empty(0, np.int64)
    place = np.repeat(np.arange(len(shards)), [len(part) for part in indices])  # which shard a sample goes to
    open_shards = {number: _Shard() for number in range(len(shards))}
    seen = 0
    with evaluating(bundle.model):
        for batch in image_batches(bundle.model, source, bundle.preprocess, share, **kinds, **loading):
            asked = slice(seen, seen + len(batch.index) + len(batch.bad))
            seen = asked.stop
            good = np.isin(share[asked], batch.index.numpy())  # bad ones come in the order asked for too
            for number in np.unique(place[asked]):
                here, shard = place[asked] == number, open_shards[number]
                rows = np.flatnonzero(here[good])
                shard.features.append(batch.features.numpy()[rows])
                shard.index.extend(batch.index[rows].tolist())
                shard.keys.extend(batch.keys[row] for row in rows)
                shard.left_out.extend(batch.bad[row] for row in np.flatnonzero(here[~good]))
                if seen == len(place) or place[seen] != number:
                    _write_images(store, source, shards[number], open_shards.pop(number))


def _write_images(store: EmbeddingStore, source, number: int, shard: _Shard) -> None:
    columns = {"index": shard.index, "key": shard.keys, "label": [_label(source, index) for index in shard.index]}
    rows = [features for features in shard.features if len(features)]
    _write(store, "images", number, columns, np.concatenate(rows) if rows else None, shard.left_out)


def _fill_texts(
    store: EmbeddingStore, bundle, source, shards: list[int], *, device, batch_size: int, progress: bool
) -> None:
    hidden = not (progress and collectives.rank() == 0 and console.is_terminal)
    for number in track(shards, "embedding texts", console=console, disable=hidden, transient=True):
        columns: dict[str, list] = {"index": [], "caption": [], "text": []}
        left_out = []
        for index in store.indices(number).tolist():
            texts, faults = _captions(source, index)
            left_out += [(fault, f"sample {index}") for fault in faults]
            for caption, text in texts:
                for name, value in zip(columns, (index, caption, text), strict=True):
                    columns[name].append(value)
        size = {"device": device, "batch_size": 4 * batch_size}
        with torch.autocast(
            torch.device(device).type, torch.bfloat16, enabled=store.config["options"]["precision"] == "bf16"
        ):
            features = embed_texts(bundle.model, bundle.tokenizer, columns["text"], **size)
        _write(store, "texts", number, columns, features.numpy() if len(features) else None, left_out)


def _captions(source, index: int) -> tuple[list[tuple[int, str]], list[str]]:
    """The usable captions of a sample with their numbers, and what is wrong with the others."""
    try:
        captions = source.captions(index)
    except BadSample as fault:
        return [], [fault.reason]
    if not captions:
        return [], ["missing_caption"]
    faults = [caption_fault(text) for text in captions]
    good = [(number, text) for number, (text, fault) in enumerate(zip(captions, faults, strict=True)) if fault is None]
    return good, [fault for fault in faults if fault]


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
