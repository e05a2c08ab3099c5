"""Image-text retrieval, both ways (Karpathy and Fei-Fei 2015). N images, M texts, E embed_dim."""

from collections import Counter
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import torch

from contrastive.errors import UserError
from contrastive.evaluate.embeddings import (
    EmbeddingSet,
    TextEmbeddings,
    answers_of,
    check_text_tower,
    embed_source,
    embed_texts,
    usable_captions,
)

RECALL_AT = (1, 5, 10)
BLOCK_ELEMENTS = 2**24
"""Similarities held at once: 64 MB of float32."""


class Ranks(NamedTuple):
    """The place, from 0, of each image's nearest own text among all texts, and of each text's image."""

    images: torch.Tensor
    """(N,) int64."""
    texts: torch.Tensor
    """(M,) int64."""
    text_image: torch.Tensor
    """(M,) int64, the image row each text belongs to."""


def retrieval_ranks(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    text_image: torch.Tensor,
    device: str | torch.device = "cpu",
) -> Ranks:
    """Rank all texts for each image and all images for each text.

    Args:
        image_features: (N, E), every image with at least one text.
        text_features: (M, E).
        text_image: (M,) int64, the image row each text belongs to.
        device: where the similarities are computed.

    Texts of the same image do not count against each other. Ties, and NaNs, count against the model: one that embeds
    everything alike has every right one last. The N x M matrix is never held, only blocks of rows.
    """
    num_images, num_texts = len(image_features), len(text_features)
    if num_texts == 0 or not torch.bincount(text_image, minlength=num_images).all():
        raise ValueError("retrieval_ranks needs at least one text for each image")
    images, texts, owners = image_features.to(device), text_features.to(device), text_image.to(device)
    each_image = torch.arange(num_images, device=owners.device)
    of_images, of_texts = _ranks(images, each_image, texts, owners), _ranks(texts, owners, images, each_image)
    return Ranks(of_images.cpu(), of_texts.cpu(), text_image)


def retrieval_metrics(of: Ranks) -> dict[str, float]:
    """Return recall at 1, 5 and 10 in percent and the median rank (1 is best), both ways.

    Returns:
        'image_to_text_r1', ..., 'text_to_image_r10', 'image_to_text_median_rank' and 'text_to_image_median_rank'. A
        recall whose k takes in every candidate is left out: it would say 100 % of any model.

    Image to text is a hit when any text of the image is among the first k.
    """
    metrics = {}
    for way, ranks, candidates in (
        ("image_to_text", of.images, len(of.texts)),
        ("text_to_image", of.texts, len(of.images)),
    ):
        for k in RECALL_AT:
            if k < candidates:
                metrics[f"{way}_r{k}"] = 100 * (ranks < k).double().mean().item()
        metrics[f"{way}_median_rank"] = float(np.median(ranks.numpy())) + 1
    return metrics


def chance_recall(text_image: torch.Tensor, num_images: int) -> dict[str, float]:
    """Expected recall of a random order in percent, by the names `retrieval_metrics` uses.

    Image to text: 1 - C(M - c, k) / C(M, k) for an image with c of the M texts, averaged over images.
    """
    num_texts = len(text_image)
    own = torch.bincount(text_image, minlength=num_images).double()
    chance = {}
    for k in RECALL_AT:
        if k < num_texts:
            miss = torch.ones_like(own)
            for drawn in range(k):
                miss *= (num_texts - own - drawn).clamp(min=0) / (num_texts - drawn)
            chance[f"image_to_text_r{k}"] = 100 * (1 - miss.mean().item())
        if k < num_images:
            chance[f"text_to_image_r{k}"] = 100 * k / num_images
    return chance


def retrieval(
    bundle,
    source,
    *,
    device: str | torch.device,
    captions: Literal["first", "all"] = "first",
    limit: int | None = None,
    **loading,
) -> dict:
    """Retrieve captions by image and images by caption within `source`.

    Args:
        captions: 'first' uses one caption per image, 'all' uses every one. Name it beside the figures: they
            are not comparable with each other.
        bundle, limit, loading: as of `zero_shot`; figures rise as the set shrinks.

    Returns:
        The figures of `retrieval_metrics`, and 'chance' {name: percent}, 'captions', 'num_images',
        'num_texts', 'duplicate_texts' (texts whose wording another one has too: they tie, and ties count
        against the model), 'skipped' {reason: count}.

    Raises:
        UserError: no text tower, or fewer than two readable images with captions.

    With several ranks, call it on all of them; every rank returns the same.
    """
    check_text_tower(bundle, "retrieval")
    texts_of, skipped = answers_of(source, limit, lambda index: usable_captions(source, index)[0], "missing_caption")
    if not texts_of:
        raise UserError(f"{source.name} has no captions; retrieval needs images with captions")
    found = embed_source(bundle, source, dict.fromkeys(texts_of, -1), skipped, device=device, **loading)
    number = 1 if captions == "first" else None
    rows = [(row, *said) for row, index in enumerate(found.index.tolist()) for said in texts_of[index][:number]]
    row, caption, texts = zip(*rows, strict=True)
    features = embed_texts(bundle.model, bundle.tokenizer, texts, device=device)
    images = replace(found, texts=TextEmbeddings(features, torch.tensor(row), torch.tensor(caption), texts))
    return score_retrieval(images, captions, device)[0]


def score_retrieval(
    images: EmbeddingSet, captions: Literal["first", "all"], device: str | torch.device
) -> tuple[dict, Ranks]:
    """As `retrieval`, of images and captions that are embedded already; images without a caption take no part."""
    texts = images.texts if captions == "all" else images.first_captions().texts
    with_text, text_image = torch.unique(texts.row, return_inverse=True)
    if len(with_text) < 2:
        raise UserError(f"{images.name}: retrieval needs at least 2 readable images with captions")
    features = images.features[with_text]
    ranks = retrieval_ranks(features, texts.features, text_image, device)
    skipped = images.skipped + Counter(missing_caption=len(images.index) - len(with_text))
    result = {
        **retrieval_metrics(ranks),
        "chance": chance_recall(text_image, len(features)),
        "captions": captions,
        "num_images": len(features),
        "num_texts": len(text_image),
        "duplicate_texts": len(texts.texts) - len(set(texts.texts)),
        "skipped": dict(skipped),
    }
    return result, ranks


def _ranks(
    queries: torch.Tensor, query_image: torch.Tensor, candidates: torch.Tensor, candidate_image: torch.Tensor
) -> torch.Tensor:
    """How many candidates of other images are at least as near to each query as the nearest of its own image.

    Args:
        queries: (n, E), of the images `query_image` (n,). candidates: (m, E), of the images `candidate_image` (m,).
    """
    rows = max(1, BLOCK_ELEMENTS // len(candidates))
    ranks = []
    for block, images in zip(queries.split(rows), query_image.split(rows), strict=True):
        scores = block @ candidates.T
        own = candidate_image[None, :] == images[:, None]
        best = scores.masked_fill(~own, -float("inf")).amax(dim=1, keepdim=True)
        # Not strictly below, so that ties and NaNs count as ahead.
        ranks.append((~(scores < best) & ~own).sum(dim=1))
    return torch.cat(ranks)
