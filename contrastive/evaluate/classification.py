"""Accuracy of a classifier with a head of its own. N images, C classes."""

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from contrastive.errors import UserError
from contrastive.evaluate.embeddings import embed_images, pick_indices
from contrastive.evaluate.zero_shot import classification_metrics, labelled_indices


def classification(
    bundle,
    source,
    *,
    device: str | torch.device,
    batch_size: int = 256,
    num_workers: int = 0,
    limit: int | None = None,
    progress: bool = False,
) -> dict:
    """Classify the labelled images of `source` by the highest score.

    Args:
        bundle: anything with `model`, an ImageClassifier, and `preprocess`.
        limit: evaluate a fixed random subset of that many images.

    Returns:
        A dict that JSON can hold: 'acc1', 'acc5' (more than five classes), 'mean_per_class_recall' and 'chance'
        in percent, 'loss' in nats, 'num_images', 'num_classes', 'skipped' {reason: count}, 'confusion'.

    Raises:
        UserError: no labels, labels the model has no score for, or no readable image.

    With several ranks, call it on all of them; every rank returns the same.
    """
    num_classes = bundle.model.config.num_classes
    picked = pick_indices(len(source), limit)
    indices, labels, skipped = labelled_indices(source, picked, num_classes)
    loading = {"batch_size": batch_size, "num_workers": num_workers, "progress": progress}
    scored = embed_images(_Scores(bundle.model), source, bundle.preprocess, indices=indices, device=device, **loading)
    if len(scored.index) == 0:
        raise UserError(f"{source.name}: none of its {len(indices)} images could be read")
    # `indices` rises, so the label of a row is found by bisection.
    labels = torch.from_numpy(labels[np.searchsorted(indices, scored.index.numpy())])
    metrics, confusion = classification_metrics(scored.features, labels)
    return {
        **metrics,
        "chance": 100 / num_classes,
        "loss": nn.functional.cross_entropy(scored.features, labels).item(),
        "num_images": len(labels),
        "num_classes": num_classes,
        "skipped": dict(skipped + scored.skipped),
        "confusion": confusion.tolist(),
    }


def check_same_classes(own: Sequence[str] | None, owner: str, source) -> None:
    """Raise UserError where labels of `source` mean other classes than `own`, those of `owner`: a model, or other data.

    Where either does not name its classes, nothing can be said.
    """
    others = source.class_names
    if own is None or others is None or tuple(own) == tuple(others):
        return
    if len(own) != len(others):
        raise UserError(f"{source.name} has {len(others)} classes, but {owner} has {len(own)}")
    number = next(i for i, (a, b) in enumerate(zip(own, others, strict=True)) if a != b)
    raise UserError(
        f"class {number} is '{others[number]}' in {source.name}, but '{own[number]}' in {owner}; "
        "their labels mean different things"
    )


class _Scores(nn.Module):
    """A classifier whose 'embeddings' are its scores, so that one loop over images serves both."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.config = SimpleNamespace(embed_dim=model.config.num_classes)

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        # In float32, as the weights are: a run's own model, called, would use the precision of the run.
        return self.model.scores(pixels)
