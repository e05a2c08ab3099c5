"""Embeddings of a source in memory: what every evaluation reads, and how a model makes them.

Every evaluation takes one way: images and texts are embedded, an EmbeddingSet holds them, scoring functions and probes
read nothing else. During training and in contrastive zero-shot the set is made in memory; a suite keeps it in a store
(evaluated_model.py), so that all its tasks share it. Images are embedded on every rank's share, texts in batches.

N images, M texts, E embed_dim.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from contrastive.data.captions import caption_fault
from contrastive.data.loader import eval_loader
from contrastive.data.record import BadSample, Source
from contrastive.distributed import collectives
from contrastive.errors import UserError
from contrastive.log import bar

if TYPE_CHECKING:
    from contrastive.data.stored_views import Views

T = TypeVar("T")
Space = Literal["projected", "pooled"]
"""'projected': after the projection, unit length: what zero-shot compares. 'pooled': before it, as it comes."""


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

    def chosen(self, places: torch.Tensor) -> "TextEmbeddings":
        """Return those at `places` (n,)."""
        texts = tuple(self.texts[place] for place in places.tolist())
        return TextEmbeddings(self.features[places], self.row[places], self.caption[places], texts)


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
    class_names: tuple[str, ...] | None
    skipped: Counter[str]
    """Number of samples left out, by reason."""
    space: Space = "projected"
    keys: tuple[str, ...] = ()
    """Of the samples, where a store has them."""
    heldout_labels: frozenset[int] = frozenset()
    """Classes that training never sees, where the source tells them apart."""
    templates: tuple[str, ...] | None = None
    """The source's own prompt templates."""
    own_names: tuple[str, ...] | None = None
    """What the data call the classes, where they were given other names."""
    texts: TextEmbeddings | None = None

    def labelled(self, task: str, num_classes: int | None = None) -> "EmbeddingSet":
        """Return the rows that have a label, without texts.

        Args:
            task: what needs labels, for messages.
            num_classes: labels have to be below; as many as the data name when None.

        Raises:
            UserError: no image, no label, or one out of range.
        """
        if len(self.labels) == 0:
            raise UserError(f"{self.name}: none of its images could be read")
        rows = (self.labels >= 0).nonzero()[:, 0]
        if len(rows) == 0:
            raise UserError(f"{self.name} has no class labels; {task} needs labelled data")
        if num_classes is None and self.class_names is not None:
            num_classes = len(self.class_names)
        check_labels(self.name, self.labels[rows], num_classes)
        if len(rows) == len(self.labels):
            return self
        return self._chosen(rows, skipped=self.skipped + Counter(missing_label=len(self.labels) - len(rows)))

    def first_captions(self) -> "EmbeddingSet":
        """Return the set with one caption of each image, the first that can be used."""
        texts = self.texts
        rows = [place for place in range(len(texts.row)) if place == 0 or texts.row[place] != texts.row[place - 1]]
        return replace(self, texts=texts.chosen(torch.tensor(rows, dtype=torch.int64)))

    def subset(self, limit: int | None) -> "EmbeddingSet":
        """Return a fixed random subset of `limit` images, with their texts; all when None."""
        if limit is None or limit >= len(self.index):
            return self
        rows = torch.from_numpy(pick_indices(len(self.index), limit))
        texts = self.texts
        if texts is not None:
            place = torch.full((len(self.index),), -1).scatter(0, rows, torch.arange(limit))[texts.row]
            kept = (place >= 0).nonzero()[:, 0]
            texts = replace(texts.chosen(kept), row=place[kept])
        return self._chosen(rows, texts=texts)

    def _chosen(self, rows: torch.Tensor, texts: TextEmbeddings | None = None, **changes) -> "EmbeddingSet":
        columns = {name: getattr(self, name)[rows] for name in ("features", "index", "labels")}
        keys = self.keys and tuple(self.keys[row] for row in rows.tolist())
        return replace(self, **columns, keys=keys, texts=texts, **changes)


def embed_source(bundle, source: Source, labels: dict[int, int], skipped: Counter[str], **loading) -> EmbeddingSet:
    """Embed the images of `source` at the indices that `labels` has.

    Args:
        bundle: anything with `model` and `preprocess`.
        labels: rising source indices to labels, -1 where there is none.
        skipped: samples that were left out before, by reason.
        loading: device, batch_size, num_workers, progress, as `embed_images` takes them.

    Raises:
        UserError: no image can be read.

    With several ranks, call it on all of them; every rank returns the same.
    """
    images = embed_images(bundle.model, source, bundle.preprocess, indices=list(labels), **loading)
    if len(images.index) == 0:
        raise UserError(f"{source.name}: none of its {len(labels)} images could be read")
    return EmbeddingSet(
        name=source.name,
        features=images.features,
        index=images.index,
        labels=torch.tensor([labels[index] for index in images.index.tolist()]),
        class_names=source.class_names,
        skipped=skipped + images.skipped,
        heldout_labels=source.heldout_labels,
        templates=source.templates,
        own_names=source.own_names,
    )


def answers_of(
    source: Source, limit: int | None, ask: Callable[[int], T], missing: str
) -> tuple[dict[int, T], Counter[str]]:
    """Return what `ask` says of each sample that it says something of, by index, and why the others are left out.

    Args:
        limit: ask of a fixed random subset of that many samples.
        ask: source index to a label or captions; None or an empty list counts as `missing`.
    """
    answers, skipped = {}, Counter()
    for index in pick_indices(len(source), limit).tolist():
        try:
            answer = ask(index)
        except BadSample as fault:
            skipped[fault.reason] += 1
            continue
        if answer is None or answer == []:
            skipped[missing] += 1
        else:
            answers[index] = answer
    return answers, skipped


def usable_captions(source: Source, index: int) -> tuple[list[tuple[int, str]], list[str]]:
    """Return the captions of a sample that can be used, with their numbers, and what is wrong with the others."""
    captions = source.captions(index)
    faults = [caption_fault(text) for text in captions]
    good = [(number, text) for number, (text, fault) in enumerate(zip(captions, faults, strict=True)) if fault is None]
    return good, [fault for fault in faults if fault]


def check_labels(name: str, labels: torch.Tensor, num_classes: int | None) -> None:
    """Raise UserError unless labels (N,) are in 0..C-1; every one is where C is None."""
    if num_classes is not None and (labels.min() < 0 or labels.max() >= num_classes):
        span = f"labels from {labels.min()} to {labels.max()}"
        raise UserError(f"{name} has {span}, but there are {num_classes} class names")


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


def in_precision(precision: Literal["fp32", "bf16"], device: str | torch.device) -> torch.autocast:
    """Compute in float32, or by autocast in bfloat16."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


class ImageEmbeddings(NamedTuple):
    """Embedded images in the order asked for, unreadable ones left out."""

    features: torch.Tensor
    """(N, E) float32 on the CPU."""
    index: torch.Tensor
    """(N,) int64, source indices."""
    keys: list[str]
    """N keys of the samples."""
    bad: list[tuple[str, str]]
    """(reason, key) of each image left out, in order."""

    @property
    def skipped(self) -> Counter[str]:
        """Number of images left out, by reason."""
        return Counter(reason for reason, _ in self.bad)


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
    precision: Literal["fp32", "bf16"] = "fp32",
    progress: bool = False,
    views: "Views | None" = None,
) -> Iterator[ImageEmbeddings]:
    """Embed the images at `indices` on this rank, a batch at a time; iterate within `evaluating(model)`.

    Features of space 'projected' are of unit length; 'pooled' ones are as the tower gives them. With K `views` of each
    image they are (N, K, E).
    """
    loader = eval_loader(source, preprocess, indices, batch_size, num_workers, views)
    options = {"normalize": False, "project": False} if space == "pooled" else {}
    for batch in bar(loader, "embedding images", shown=progress):
        features = torch.empty(0, 0)
        if len(batch["index"]):
            images = batch["image"].to(device, non_blocking=True)
            images = images.flatten(0, 1) if views else images
            with in_precision(precision, device):
                features = model.encode_image(preprocess.normalize(images), **options).float().cpu()
            features = features.unflatten(0, (-1, views.count)) if views else features
        yield ImageEmbeddings(features, batch["index"], batch["key"], batch["bad"])


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
    """Embed images of `source`, all or those at `indices`, L2-normalised.

    With several ranks each embeds a contiguous share and all get every row: call it on all of them.
    Unreadable images are left out and told in `bad`. `progress` shows a bar on the first rank.
    """
    share = own_share(source, indices)
    loading = {"device": device, "batch_size": batch_size, "num_workers": num_workers, "progress": progress}
    with evaluating(model):
        batches = list(image_batches(model, source, preprocess, share, **loading))
    features = [torch.empty(0, model.config.embed_dim), *(batch.features for batch in batches if len(batch.index))]
    index = [torch.empty(0, dtype=torch.int64), *(batch.index for batch in batches)]
    keys, bad = [], []
    for of_rank in collectives.gather_objects([(batch.keys, batch.bad) for batch in batches]):
        for names, faults in of_rank:
            keys += names
            bad += faults
    return ImageEmbeddings(_gather(torch.cat(features), device), _gather(torch.cat(index), device), keys, bad)


def own_share(source, indices: Sequence[int] | np.ndarray | None) -> np.ndarray:
    """Return which of these samples, all when None, are this rank's.

    Shares are contiguous, so that what the ranks make of them, one after the other, is in the order asked for.
    """
    indices = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
    world, rank = collectives.world_size(), collectives.rank()
    return indices[rank * len(indices) // world : (rank + 1) * len(indices) // world]


def embed_texts(
    model, tokenizer, texts: Sequence[str], *, device: str | torch.device, batch_size: int = 1024
) -> torch.Tensor:
    """Embed `texts`: (len(texts), E) float32 on the CPU, L2-normalised. Every rank embeds all of them."""
    features = [torch.empty(0, model.config.embed_dim)]
    with evaluating(model):
        for start in range(0, len(texts), batch_size):
            tokens = model.text_tower.pack(tokenizer(list(texts[start : start + batch_size])))
            features.append(model.encode_text(tokens.to(device)).float().cpu())
    return torch.cat(features)


def _gather(rows: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """Rows of every rank on the CPU; they travel on the device where the process group needs that."""
    if collectives.world_size() == 1:
        return rows
    on_device = dist.get_backend() == "nccl"
    return collectives.all_gather_rows(rows.to(device) if on_device else rows).cpu()
