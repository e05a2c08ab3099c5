"""Weighted nearest neighbours on frozen features (Wu et al. 2018; DINO, Caron et al. 2021, its eval_knn.py).

N test samples, M gallery (training) samples, C classes, E embed_dim.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from contrastive.errors import UserError
from contrastive.evaluate.classification import ranked
from contrastive.evaluate.probe_input import ProbeInput, ProbeTask, counts, hit_figures, probe_device
from contrastive.evaluate.tasks import TASKS
from contrastive.log import bar

NEIGHBOURS = (10, 20, 100, 200)
USUAL = 20
"""The k that DINO reports."""
BLOCK_ELEMENTS = 2**26
"""Similarities held at once: 256 MB of float32."""


def knn(
    given: ProbeInput,
    *,
    k: Sequence[int] = NEIGHBOURS,
    temperature: float = 0.07,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> dict:
    """Classify each test sample by its k nearest gallery samples, each voting exp(cosine / temperature) for its class.

    Args:
        given: its training features, (M, E), are the gallery; normalised here, like the test features (N, E).
        k: numbers of neighbours, each evaluated. Of the default ones those above M are left out.

    Returns:
        A dict that JSON can hold but for 'predicted' (N,) int64: in percent 'k10_acc1', ... for each k, 'acc1', 'acc5'
        (more than five classes) and 'mean_per_class_recall' of k = 20, or of the largest below where 20 is not among
        them, and 'chance'; 'k', the number those are of, 'temperature', 'left_out_k', 'num_train', 'num_test',
        'num_classes'. Ties count against the model; a right class without a vote is behind all others.

    Raises:
        UserError: a k that is not positive or above M, or a temperature that is not positive.

    The N x M similarities are held in blocks of rows.
    """
    check_options(k, temperature)
    used = _checked_k(k, len(given.train))
    chosen = max((number for number in used if number <= USUAL), default=min(used))
    ranks, predicted = _ranked(given, used, chosen, temperature, probe_device(device), progress)
    return {
        **hit_figures(ranks[chosen], predicted, given),
        **{f"k{number}_acc1": 100 * (rank < 1).double().mean().item() for number, rank in ranks.items()},
        "k": chosen,
        "left_out_k": [number for number in k if number not in used],
        "temperature": temperature,
        **counts(given),
        "predicted": predicted,
    }


def check_options(k: Sequence[int], temperature: float) -> None:
    """Raise UserError for options of `knn` that no data can make right."""
    if not k or min(k) < 1:
        raise UserError(f"kNN needs positive numbers of neighbours, got k = {', '.join(map(str, k)) or 'none'}")
    if not temperature > 0:
        raise UserError(f"the temperature is {temperature}; it has to be positive")


def _checked_k(k: Sequence[int], gallery: int) -> list[int]:
    numbers = sorted(set(k))
    if tuple(k) == NEIGHBOURS:
        numbers = [number for number in numbers if number <= gallery]
        if not numbers:
            raise UserError(
                f"the gallery has {gallery} images, fewer than the least k, {NEIGHBOURS[0]}; give a smaller k"
            )
    if numbers[-1] > gallery:
        raise UserError(f"k = {numbers[-1]} neighbours of a gallery of {gallery} images; give a k of at most {gallery}")
    return numbers


def _ranked(
    given: ProbeInput, used: Sequence[int], chosen: int, temperature: float, device: torch.device, progress: bool
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """By k, how many classes stand before the right one (N,); and the class predicted (N,) by the `chosen` k."""
    ranks: dict[int, list[torch.Tensor]] = {number: [] for number in used}
    predictions = []
    size = max(1, BLOCK_ELEMENTS // max(len(given.train), max(used) * given.num_classes))
    blocks = given.test_labels.split(size)
    votes_of_blocks = bar(
        _votes(given, used, temperature, device, size), "nearest neighbours", len(blocks), shown=progress
    )
    for votes, labels in zip(votes_of_blocks, blocks, strict=True):
        for number in used:
            rank, predicted = ranked(votes[number].cpu(), labels)
            ranks[number].append(rank)
            if number == chosen:
                predictions.append(predicted)
    return {number: torch.cat(parts) for number, parts in ranks.items()}, torch.cat(predictions)


def _votes(
    given: ProbeInput, used: Sequence[int], temperature: float, device: torch.device, size: int
) -> Iterator[dict[int, torch.Tensor]]:
    """For each block of `size` test samples, the votes (n, C) by k."""
    gallery, owners = F.normalize(given.train.to(device), dim=1), given.train_labels.to(device)
    for block in given.test.split(size):
        similarity, nearest = (F.normalize(block.to(device), dim=1) @ gallery.T).topk(max(used), dim=1)
        # Relative to the nearest one, which changes no order and cannot overflow.
        weights, classes = ((similarity - similarity[:, :1]) / temperature).exp(), owners[nearest]
        votes, total, before = {}, similarity.new_zeros(len(block), given.num_classes), 0
        for number in used:  # in rising order: each adds its further neighbours
            total = total.scatter_add(1, classes[:, before:number], weights[:, before:number])
            votes[number], before = total, number
        yield votes


@TASKS.register("knn")
@dataclass(frozen=True)
class Knn(ProbeTask):
    """Votes of the nearest training images, by cosine (DINO, appendix F.1)."""

    title = "kNN"

    k: tuple[int, ...] = NEIGHBOURS
    """Numbers of neighbours; acc1 is of 20 where it is among them."""
    temperature: float = 0.07

    def check(self) -> None:
        check_options(self.k, self.temperature)

    def fit(self, given: ProbeInput, **how) -> dict:
        return knn(given, k=self.k, temperature=self.temperature, **how)

    def headline(self, result: dict) -> tuple[str, ...]:
        return (f"k{result['k']}_acc1",)
