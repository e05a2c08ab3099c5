"""Embeddings of a whole source: images on every rank's share, texts in batches. N images, E embed_dim."""

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from rich.progress import track
from torch import nn

from contrastive.data.loader import eval_loader
from contrastive.distributed import collectives
from contrastive.errors import UserError
from contrastive.log import console

Space = Literal["projected", "pooled"]
"""'projected': after the projection, unit length: what zero-shot compares. 'pooled': before it, as it comes."""
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class ImageEmbeddings:
    """What `embed_images` found, in the order of the indices asked for, unreadable images left out."""

    features: torch.Tensor
    """(N, E) float32 on the CPU, L2-normalised."""
    index: torch.Tensor
    """(N,) int64: the source index of each row."""
    bad: tuple[tuple[str, str], ...]
    """(reason, key) of each image left out."""

    @property
    def skipped(self) -> Counter[str]:
        """Number of images left out, by reason."""
        return Counter(reason for reason, _ in self.bad)


def pick_indices(num_samples: int, limit: int | None = None) -> np.ndarray:
    """Return `limit` source indices in rising order, all when None.

    They are a fixed random subset, not the first ones: sources sorted by class would lose classes.
    """
    if limit is None or limit >= num_samples:
        return np.arange(num_samples)
    rng = np.random.default_rng(0)
    if num_samples > 10_000_000:  # too many to permute
        return np.sort(rng.choice(num_samples, limit, replace=False, shuffle=False))
    return np.sort(rng.permutation(num_samples)[:limit])


def check_text_tower(bundle, task: str) -> None:
    """Raise UserError where the model, a classifier say, has no text tower, which `task` needs."""
    if bundle.tokenizer is None:
        name = getattr(bundle, "path", "the model")
        raise UserError(f"{name} has no text tower, which {task} needs")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inference without gradients in eval mode; each module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class ImageBatch(NamedTuple):
    """Embedded images, in the order asked for."""

    features: torch.Tensor
    """(b, E) float32 on the CPU."""
    index: torch.Tensor
    """(b,) int64, source indices."""
    keys: list[str]
    """b keys of the samples."""
    bad: list[tuple[str, str]]
    """(reason, key) of each image of the batch left out, in order."""


def image_batches(
    model,
    source,
    preprocess,
    indices: np.ndarray,
    *,
    device: str | torch.device,
    batch_size: int,
    num_workers: int,
    space: Space = "projected",
    precision: Precision = "fp32",
    progress: bool = False,
) -> Iterator[ImageBatch]:
    """Embed the images at `indices` on this rank, a batch at a time; iterate within `evaluating(model)`.

    Features of space 'projected' are of unit length; 'pooled' ones are as the tower gives them.
    """
    loader = eval_loader(source, preprocess, indices, batch_size=batch_size, num_workers=num_workers)
    num_batches = -(-len(indices) // batch_size)
    hidden = not (progress and collectives.rank() == 0 and console.is_terminal)
    options = {"normalize": False, "project": False} if space == "pooled" else {}
    in_bf16 = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
    for batch in track(loader, "embedding images", num_batches, console=console, disable=hidden, transient=True):
        features = torch.empty(0, 0)
        if len(batch["index"]):
            pixels = preprocess.normalize(batch["image"].to(device, non_blocking=True))
            with in_bf16:
                features = model.encode_image(pixels, **options).float().cpu()
        yield ImageBatch(features, batch["index"], batch["key"], batch["bad"])


def embed_images(
    model,
    source,
    preprocess,
    *,
    indices: Sequence[int] | np.ndarray | None = None,
    device: str | torch.device,
    batch_size: int = 256,
    num_workers: int = 0,
    progress: bool = False,
) -> ImageEmbeddings:
    """Embed images of `source`, all or those at `indices`.

    With several ranks each embeds a contiguous share and all get every row: call it on all of them.
    Unreadable images are left out and told in `bad`. `progress` shows a bar on the first rank.
    """
    indices = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
    world, rank = collectives.world_size(), collectives.rank()
    share = indices[rank * len(indices) // world : (rank + 1) * len(indices) // world]
    features = [torch.empty(0, model.config.embed_dim)]
    rows = [torch.empty(0, dtype=torch.int64)]
    bad: list[tuple[str, str]] = []
    loading = {"device": device, "batch_size": batch_size, "num_workers": num_workers, "progress": progress}
    with evaluating(model):
        for batch in image_batches(model, source, preprocess, share, **loading):
            bad.extend(batch.bad)
            if len(batch.index):
                features.append(batch.features)
                rows.append(batch.index)
    return ImageEmbeddings(
        _gather(torch.cat(features), device),
        _gather(torch.cat(rows), device),
        tuple(itertools.chain.from_iterable(collectives.gather_objects(bad))),
    )


def embed_texts(
    model, tokenizer, texts: Sequence[str], *, device: str | torch.device, batch_size: int = 1024
) -> torch.Tensor:
    """Embed `texts`: (len(texts), E) float32 on the CPU, L2-normalised. Every rank embeds all of them."""
    features = [torch.empty(0, model.config.embed_dim)]
    with evaluating(model):
        for start in range(0, len(texts), batch_size):
            tokens = tokenizer(list(texts[start : start + batch_size])).to(device)
            features.append(model.encode_text(tokens).float().cpu())
    return torch.cat(features)


def _gather(rows: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """Rows of every rank on the CPU; they travel on the device where the process group needs that."""
    if collectives.world_size() == 1:
        return rows
    on_device = dist.get_backend() == "nccl"
    return collectives.all_gather_rows(rows.to(device) if on_device else rows).cpu()
