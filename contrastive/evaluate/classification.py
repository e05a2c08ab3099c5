"""Classification of labelled images: by their nearest class text (zero-shot), or by a classifier's own head.

N images, C classes, E embed_dim.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from contrastive.data.class_joining import IN_ORDER, members_under, pairs_of
from contrastive.data.class_sets import ClassSet
from contrastive.data.prompts import default_templates, fill
from contrastive.data.record import Source
from contrastive.errors import UserError
from contrastive.evaluate.embeddings import (
    EmbeddingSet,
    answers_of,
    check_labels,
    check_text_tower,
    embed_source,
    embed_texts,
)
from contrastive.log import say

HOW_TO_NAME = "--classes FILE, in a suite classes: FILE"


def zero_shot_classifier(
    model, tokenizer, class_names: Sequence[str], templates: Sequence[str], *, device: str | torch.device
) -> torch.Tensor:
    """Return (C, E) unit vectors: per class the renormalised mean of its filled templates' embeddings."""
    texts = [text for name in class_names for text in fill(templates, name)]
    features = embed_texts(model, tokenizer, texts, device=device)
    features = features.view(len(class_names), len(templates), -1)
    return F.normalize(F.normalize(features, dim=-1).mean(dim=1), dim=-1)


def classification_metrics(scores: torch.Tensor, labels: torch.Tensor) -> tuple[dict[str, float], torch.Tensor]:
    """Score a classifier; returns figures in percent and the confusion matrix.

    Args:
        scores: (N, C), higher is better.
        labels: (N,) int64 in 0..C-1.

    Returns:
        Those of `hit_figures`. Confusion (C, C) int64: row the true class, column the predicted one.

    Ties count against the model, and so do NaNs: one that gives every class the same score has 0 %.
    """
    if len(scores) == 0:
        raise ValueError("classification_metrics needs at least one image")
    num_classes = scores.shape[1]
    rank, predicted = ranked(scores, labels)
    cells = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    figures = hit_figures(rank, predicted, labels, num_classes, recall=torch.float32)
    return figures, cells.view(num_classes, num_classes)


def hit_figures(
    rank: torch.Tensor,
    predicted: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    *,
    recall: torch.dtype = torch.float64,
) -> dict[str, float]:
    """'acc1', 'acc5' for more than five classes, and 'mean_per_class_recall' over the classes that have samples.

    Args:
        rank: (N,), how many classes stand before the right one.
        predicted: (N,), the class chosen; labels: (N,), the right one.
        recall: what each class's is rounded to before the mean.
    """
    right = predicted == labels
    figures = {"acc1": 100 * right.double().mean().item()}
    if num_classes > 5:
        figures["acc5"] = 100 * ((rank < 5) | right).double().mean().item()
    hits, totals = per_class_counts(predicted, labels, num_classes)
    there = totals > 0
    figures["mean_per_class_recall"] = 100 * (hits[there] / totals[there].to(recall)).double().mean().item()
    return figures


def per_class_counts(predicted: torch.Tensor, labels: torch.Tensor, num_classes: int) -> tuple[torch.Tensor, ...]:
    """(C,) samples of each class that were predicted right, and (C,) samples of each class."""
    right = torch.bincount(labels[predicted == labels], minlength=num_classes)
    return right, torch.bincount(labels, minlength=num_classes)


def ranked(scores: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many classes stand before the right one (N,), and the class predicted (N,).

    Ties and NaNs are as `classification_metrics` says.
    """
    own = scores.gather(1, labels[:, None])
    # Not strictly below: ties and NaNs are ahead of the right class. It counts itself once.
    rank = (~(scores < own)).sum(dim=1) - 1
    rivals = scores.nan_to_num(nan=float("inf")).scatter(1, labels[:, None], -float("inf"))
    return rank, torch.where(rank == 0, labels, rivals.argmax(dim=1))


def zero_shot(
    bundle,
    source: Source,
    *,
    device: str | torch.device,
    class_names: Sequence[str] | ClassSet | None = None,
    templates: Sequence[str] | None = None,
    limit: int | None = None,
    **loading,
) -> dict:
    """Classify the labelled images of `source` by their nearest class text (CLIP, section 3.1).

    Args:
        bundle: anything with `model`, `preprocess` and `tokenizer`.
        class_names: a name for each class, joined to the source's own by name (see `join`); its own when None.
        templates: prompts with '{}' for the name; those that fit the source when None.
        limit: evaluate a fixed random subset of that many images.
        loading: batch_size, num_workers, progress, as `embed_images` takes them.

    Returns:
        A dict that JSON can hold: 'acc1', 'acc5' (more than five classes), 'mean_per_class_recall', 'chance'
        in percent; 'seen_acc1' and 'heldout_acc1' when the source has `heldout_labels`; 'num_images',
        'num_classes', 'skipped' {reason: count}, 'class_names', 'own_names' (what the data call those classes, where
        they were given other names), 'templates', 'per_class_recall' (None for a class without images),
        'missing_classes', 'confusion'.

    Raises:
        UserError: no text tower, no labels, no class names, names that do not fit the labels, or no readable image.

    With several ranks, call it on all of them; every rank returns the same.
    """
    check_text_tower(bundle, "zero-shot classification")
    names = names_to_use(source, class_names)["class_names"]
    images = embed_labelled(bundle, source, len(names), device=device, limit=limit, **loading)
    return score_zero_shot(bundle, images, class_names=names, templates=templates, device=device)


def score_zero_shot(
    bundle,
    images: EmbeddingSet,
    *,
    class_names: Sequence[str] | ClassSet | None = None,
    templates: Sequence[str] | None = None,
    device: str | torch.device,
) -> dict:
    """As `zero_shot`, of images that are embedded already and a model that has a text tower."""
    images = replace(images, **names_to_use(images, class_names))
    names = images.class_names
    images = images.labelled("zero-shot classification", len(names))
    templates = templates or default_templates(images)
    classifier = zero_shot_classifier(bundle.model, bundle.tokenizer, names, templates, device=device)
    return told_of(images, images.features @ classifier.T, templates)


def told_of(images: EmbeddingSet, scores: torch.Tensor, templates: Sequence[str]) -> dict:
    """Return what `zero_shot` does, of labelled images (N) and their scores (N, C) of the classes that they name."""
    names = images.class_names
    metrics, confusion = classification_metrics(scores, images.labels)
    counts, correct = confusion.sum(dim=1), confusion.diagonal()
    heldout = torch.zeros(len(names), dtype=torch.bool)
    heldout[sorted(images.heldout_labels)] = True
    told_apart = {}  # classes that training never saw, from the others
    for name, chosen in (("seen_acc1", ~heldout), ("heldout_acc1", heldout)):
        if heldout.any() and counts[chosen].any():
            told_apart[name] = 100 * correct[chosen].sum().item() / counts[chosen].sum().item()
    by_class = list(zip(names, correct.tolist(), counts.tolist(), strict=True))
    return {
        **metrics,
        "chance": 100 / len(names),
        **_counted(images, len(names)),
        "class_names": list(names),
        **({"own_names": list(images.own_names)} if images.own_names else {}),
        "templates": list(templates),
        **told_apart,
        "per_class_recall": [100 * right / count if count else None for _, right, count in by_class],
        "missing_classes": [name for name, _, count in by_class if not count],
        "confusion": confusion.tolist(),
    }


def classification(bundle, source: Source, *, device: str | torch.device, limit: int | None = None, **loading) -> dict:
    """Classify the labelled images of `source` by the highest score of the model's own head.

    As `zero_shot`, of an ImageClassifier; the result has no texts and nothing by class but 'confusion', and the 'loss'
    in nats.

    Raises:
        UserError: no labels, labels the model has no score for, or no readable image.
    """
    num_classes = bundle.model.config.num_classes
    # In float32, as the weights are: a run's own model, called, would use the precision of the run.
    model = ScoringModel(bundle.model, num_classes, bundle.model.scores)
    scorer = SimpleNamespace(model=model, preprocess=bundle.preprocess)
    images = embed_labelled(scorer, source, num_classes, device=device, limit=limit, **loading)
    metrics, confusion = classification_metrics(images.features, images.labels)
    return {
        **metrics,
        "chance": 100 / num_classes,
        "loss": nn.functional.cross_entropy(images.features, images.labels).item(),
        **_counted(images, num_classes),
        "confusion": confusion.tolist(),
    }


class ScoringModel(nn.Module):
    """A model whose 'embeddings' of images are scores of classes (B, C), so that one loop over images serves all."""

    def __init__(self, model: nn.Module, num_classes: int, scores: Callable[[Any], torch.Tensor]):
        super().__init__()
        self.model, self.encode_image = model, scores
        self.config = SimpleNamespace(embed_dim=num_classes)


def embed_labelled(
    bundle, source: Source, num_classes: int, *, device: str | torch.device, limit: int | None = None, **loading
) -> EmbeddingSet:
    """The images of `source` that have a label, which has to be below `num_classes`."""
    labels, skipped = answers_of(source, limit, source.label, "missing_label")
    if not labels:
        raise UserError(
            f"{source.name} has no class labels, which classification is scored by. "
            "Captions without labels are evaluated by retrieval"
        )
    check_labels(source.name, torch.tensor(list(labels.values())), num_classes)
    return embed_source(bundle, source, labels, skipped, device=device, **loading)


def names_to_use(data: Source | EmbeddingSet, class_names: Sequence[str] | ClassSet | None = None) -> dict[str, Any]:
    """Return the members of `data` under the names to use (see `members_under`); UserError where there are none."""
    if class_names is None and data.class_names is None:
        raise UserError(
            f"{data.name} has no class names; name the classes of its labels ({HOW_TO_NAME}). Captions without labels "
            "are evaluated by retrieval"
        )
    if class_names is not None and not isinstance(class_names, ClassSet):
        _check_each_once(data.name, class_names)
        class_names = ClassSet("class_names", "", tuple(class_names), tuple(class_names))
    members, how = members_under(data, class_names)
    _check_each_once(data.name, members["class_names"])
    if how == IN_ORDER and isinstance(data, EmbeddingSet):  # once, and not while the data are opened
        say(f"{data.name}: class names {how}{pairs_of(members['own_names'], members['class_names'])}")
    return members


def _check_each_once(of: str, names: Sequence[str]) -> None:
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times != 1:
        problem = f"the class name '{name}' stands {times} times" if times else "there are no class names"
        raise UserError(f"{of}: {problem}; each class needs its own ({HOW_TO_NAME})")


def _counted(images: EmbeddingSet, num_classes: int) -> dict:
    return {"num_images": len(images.labels), "num_classes": num_classes, "skipped": dict(images.skipped)}
