"""Zero-shot classification: images against the mean text embedding of each class (CLIP, section 3.1).

N images, C classes, E embed_dim.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from contrastive.data.prompts import default_templates, fill
from contrastive.data.record import BadSample
from contrastive.errors import UserError
from contrastive.evaluate.embeddings import check_text_tower, embed_images, embed_texts, pick_indices

HOW_TO_NAME = "--classes FILE, in a suite classes: FILE"


def zero_shot_classifier(
    model, tokenizer, class_names: Sequence[str], templates: Sequence[str], *, device, batch_size: int = 1024
) -> torch.Tensor:
    """Return (C, E) unit vectors: per class the renormalised mean of its filled templates' embeddings."""
    texts = [text for name in class_names for text in fill(templates, name)]
    features = embed_texts(model, tokenizer, texts, device=device, batch_size=batch_size)
    features = features.view(len(class_names), len(templates), -1)
    return F.normalize(F.normalize(features, dim=-1).mean(dim=1), dim=-1)


def classification_metrics(scores: torch.Tensor, labels: torch.Tensor) -> tuple[dict[str, float], torch.Tensor]:
    """Score a classifier; returns figures in percent and the confusion matrix.

    Args:
        scores: (N, C), higher is better.
        labels: (N,) int64 in 0..C-1.

    Returns:
        {'acc1', 'mean_per_class_recall'} and, for more than five classes, 'acc5'; recall is averaged over
        the classes that have images. Confusion (C, C) int64: row the true class, column the predicted one.

    Ties count against the model, and so do NaNs: one that gives every class the same score has 0 %.
    """
    if len(scores) == 0:
        raise ValueError("classification_metrics needs at least one image")
    num_classes = scores.shape[1]
    rank, predicted = ranked(scores, labels)
    cells = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    confusion = cells.view(num_classes, num_classes)
    counts = confusion.sum(dim=1)
    recall = confusion.diagonal()[counts > 0] / counts[counts > 0]
    metrics = {"acc1": _percent(rank < 1)}
    if num_classes > 5:
        metrics["acc5"] = _percent(rank < 5)
    metrics["mean_per_class_recall"] = 100 * recall.double().mean().item()
    return metrics, confusion


def ranked(scores: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many classes stand before the right one (N,), and the class predicted (N,); ties and NaNs as above."""
    own = scores.gather(1, labels[:, None])
    # Not strictly below: ties and NaNs are ahead of the right class. It counts itself once.
    rank = (~(scores < own)).sum(dim=1) - 1
    rivals = scores.nan_to_num(nan=float("inf")).scatter(1, labels[:, None], -float("inf"))
    return rank, torch.where(rank == 0, labels, rivals.argmax(dim=1))


def zero_shot(
    bundle,
    source,
    *,
    device: str | torch.device,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    limit: int | None = None,
    progress: bool = False,
) -> dict:
    """Classify the labelled images of `source` by their nearest class text.

    Args:
        bundle: anything with `model`, `preprocess` and `tokenizer`.
        class_names: one name per class index; the source's own when None.
        templates: prompts with '{}' for the name; those that fit the source when None.
        limit: evaluate a fixed random subset of that many images.

    Returns:
        A dict that JSON can hold: 'acc1', 'acc5' (more than five classes), 'mean_per_class_recall', 'chance'
        in percent; 'seen_acc1' and 'heldout_acc1' when the source has `heldout_labels`; 'num_images',
        'num_classes', 'skipped' {reason: count}, 'class_names', 'templates', 'per_class_recall' (None for a
        class without images), 'missing_classes', 'confusion'.

    Raises:
        UserError: no text tower, no labels, no class names, names that do not fit the labels, or no readable image.

    With several ranks, call it on all of them; every rank returns the same.
    """
    check_text_tower(bundle, "zero-shot classification")
    names = checked_class_names(source, class_names)
    templates = tuple(templates or default_templates(source, names))
    picked = pick_indices(len(source), limit)
    indices, labels, skipped = labelled_indices(source, picked, len(names))
    loading = {"batch_size": batch_size, "num_workers": num_workers, "progress": progress}
    embeddings = embed_images(bundle.model, source, bundle.preprocess, indices=indices, device=device, **loading)
    if len(embeddings.index) == 0:
        raise UserError(f"{source.name}: none of its {len(indices)} images could be read")
    # `indices` rises, so the label of a row is found by bisection.
    rows = np.searchsorted(indices, embeddings.index.numpy())
    return score_zero_shot(
        bundle,
        source,
        embeddings.features,
        torch.from_numpy(labels[rows]),
        class_names=names,
        templates=templates,
        skipped=skipped + embeddings.skipped,
        device=device,
    )


def score_zero_shot(
    bundle,
    source,
    features: torch.Tensor,
    labels: torch.Tensor,
    *,
    class_names: Sequence[str],
    templates: Sequence[str],
    skipped: Counter[str],
    device: str | torch.device,
) -> dict:
    """As `zero_shot`, of images that are embedded already.

    Args:
        source: may have `heldout_labels`.
        features: (N, E), unit length. labels: (N,) int64 in 0..C-1.
        skipped: number of samples left out, by reason.
    """
    classifier = zero_shot_classifier(bundle.model, bundle.tokenizer, class_names, templates, device=device)
    metrics, confusion = classification_metrics(features @ classifier.T, labels)
    return {
        **metrics,
        "chance": 100 / len(class_names),
        "num_images": len(labels),
        "num_classes": len(class_names),
        "skipped": dict(skipped),
        "class_names": list(class_names),
        "templates": list(templates),
        **_by_class(source, class_names, confusion),
    }


def checked_class_names(source, class_names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names to use; UserError when there are none or when they do not fit the source's."""
    own = source.class_names
    if class_names is None and own is None:
        raise UserError(
            f"{source.name} has no class names; give labelled data, or name the classes ({HOW_TO_NAME}). Captions "
            "without labels are evaluated by retrieval"
        )
    names = tuple(own if class_names is None else class_names)
    if own is not None and len(names) != len(own):
        raise UserError(f"{len(names)} class names given, but {source.name} has {len(own)} classes")
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times != 1:
        problem = f"the class name '{name}' stands {times} times" if times else "there are no class names"
        raise UserError(f"{source.name}: {problem}; each class needs its own ({HOW_TO_NAME})")
    return names


def labelled_indices(source, picked: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray, Counter[str]]:
    """Those of the `picked` indices that have a label, the labels, and why the others are left out."""
    found, skipped = [], Counter()
    for index in picked.tolist():
        try:
            label = source.label(index)
        except BadSample as fault:
            skipped[fault.reason] += 1
            continue
        if label is None:
            skipped["missing_label"] += 1
        else:
            found.append((index, label))
    if not found:
        raise UserError(
            f"{source.name} has no class labels, which classification is scored by. "
            "Captions without labels are evaluated by retrieval"
        )
    indices, labels = np.array(found, dtype=np.int64).T
    if labels.min() < 0 or labels.max() >= num_classes:
        span = f"labels from {labels.min()} to {labels.max()}"
        raise UserError(f"{source.name} has {span}, but there are {num_classes} class names")
    return indices, labels, skipped


def _by_class(source, names: Sequence[str], confusion: torch.Tensor) -> dict:
    """What the confusion matrix says of each class, and of those that training never saw."""
    counts, correct = confusion.sum(dim=1).tolist(), confusion.diagonal().tolist()
    return {
        **_heldout_metrics(source, correct, counts),
        "per_class_recall": [100 * c / n if n else None for c, n in zip(correct, counts, strict=True)],
        "missing_classes": [name for name, count in zip(names, counts, strict=True) if count == 0],
        "confusion": confusion.tolist(),
    }


def _heldout_metrics(source, correct: list[int], counts: list[int]) -> dict[str, float]:
    """Accuracy over the images of trained and of never trained classes, for sources that tell them apart."""
    heldout = source.heldout_labels
    metrics = {}
    for name, chosen in (
        ("seen_acc1", [label for label in range(len(counts)) if label not in heldout]),
        ("heldout_acc1", sorted(heldout)),
    ):
        total = sum(counts[label] for label in chosen)
        if heldout and total:
            metrics[name] = 100 * sum(correct[label] for label in chosen) / total
    return metrics


def _percent(hits: torch.Tensor) -> float:
    return 100 * hits.double().mean().item()
