"""Questions about one image, or about one text: which label fits, which images fit. What a page of them asks a model.

C labels, N images.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from contrastive.data.record import Source
from contrastive.errors import UserError
from contrastive.evaluate.classification import zero_shot_classifier
from contrastive.evaluate.embeddings import embed_texts, evaluating
from contrastive.evaluate.evaluated_model import EvaluatedModel
from contrastive.evaluate.search import nearest
from contrastive.interop.run_record import RunRecord
from contrastive.visualize.representations import match_probabilities
from contrastive.visualize.word_maps import as_seen, check_text

MOST_LABELS = 1000


@dataclass(frozen=True)
class LabelScores:
    """How labels fit an image; all are (C,)."""

    labels: tuple[str, ...]
    cosines: torch.Tensor
    shares: torch.Tensor
    """Softmax over the labels of scale · cosine: what chance gives is 1/C."""
    matches: torch.Tensor | None
    """Of a model trained with a bias: the probability that image and label belong together, each by itself."""


def labels_in(text: str) -> tuple[str, ...]:
    """Return the labels that stand in a text, one a line or between commas.

    Raises:
        UserError: none, or too many.
    """
    labels = tuple(dict.fromkeys(filter(None, (" ".join(part.split()) for part in re.split(r"[,;\n]", text)))))
    if not labels:
        raise UserError("type labels, as: cat, dog, bird")
    if len(labels) > MOST_LABELS:
        raise UserError(f"{len(labels)} labels; {MOST_LABELS} at most")
    return labels


def label_scores(bundle: Any, image: bytes, labels: Sequence[str], templates: Sequence[str]) -> LabelScores:
    """Compare an image with labels in prompts, as zero-shot classification does (CLIP, section 3.1).

    Args:
        bundle: anything with `model`, `preprocess` and `tokenizer`.
        image: the bytes of a file.

    Raises:
        UserError: an image that cannot be read.
    """
    model, preprocess = bundle.model, bundle.preprocess
    device = model.logit_scale.device
    pixels = preprocess.normalize(preprocess.collate([as_seen(image, preprocess)]).to(device))
    texts = zero_shot_classifier(model, bundle.tokenizer, labels, templates, device=device)
    with evaluating(model):
        cosines = model.encode_image(pixels).float().cpu() @ texts.T
        scale, bias = model.logit_scale.exp().cpu(), model.logit_bias
        shares = match_probabilities(cosines, scale, None)[0]
        matches = None if bias is None else match_probabilities(cosines, scale, bias.cpu())[0]
    return LabelScores(tuple(labels), cosines[0], shares, matches)


@dataclass(frozen=True)
class FoundImage:
    """An image that a search found: its place in the source, its key, and its cosine with the text."""

    index: int
    key: str
    cosine: float


def found_images(subject: EvaluatedModel, data: str, text: str, count: int) -> list[FoundImage]:
    """Return the images of `data` that are nearest to a text, the nearest first; at most `count`.

    Raises:
        UserError: a text that is empty, or too long for the model.
    """
    check_text(text, subject.bundle.tokenizer)
    images = subject.embeddings(data)
    query = embed_texts(subject.bundle.model, subject.bundle.tokenizer, [text], device=subject.device)
    best = nearest(query, images.features, count)
    rows = zip(best.rows[0].tolist(), best.scores[0].tolist(), strict=True)
    return [FoundImage(int(images.index[row]), images.keys[row], cosine) for row, cosine in rows]


def trained_on(bundle: Any) -> Source:
    """Return a source without samples, of the name of what the model was trained on as far as its run tells.

    `default_templates` goes by it where there is no other.
    """
    source, run = Source(), RunRecord.of(bundle.path)
    source.name = str(run.option("data.train")) if run else ""
    return source


def facts_of(bundle: Any) -> str:
    """Return in words how large a model is, what it sees, and what its loss made of a pair."""
    image, count = bundle.config.image, sum(parameter.numel() for parameter in bundle.model.parameters())
    size = f"{count / 1e6:,.0f} M" if count >= 1e7 else f"{count / 1e6:.1f} M"
    seen = f"{image.image_size}-pixel images, patches of {image.patch_size}"
    if image.native:
        most = bundle.preprocess.config.most_patches
        seen = f"images of any shape, {most} patches of {image.patch_size} at most"
    loss = "softmax" if bundle.model.logit_bias is None else "sigmoid"
    return f"{size} parameters, {seen}, {loss} loss"
