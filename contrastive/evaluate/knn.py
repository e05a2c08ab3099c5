"""Weighted nearest neighbours on frozen features (Wu et al. 2018; DINO, Caron et al. 2021, its eval_knn.py).

N test samples, M gallery (training) samples, C classes, E embed_dim.
"""

import itertools
from collections.abc import Sequence
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


@TASKS.register("knn")
@dataclass(frozen=True)
class Knn(ProbeTask):
    """Votes of the nearest training images, by cosine (DINO, appendix F.1)."""

    title = "kNN"

    k: tuple[int, ...] = NEIGHBOURS
    """Numbers of neighbours, each evaluated; of the default ones those above the gallery's size are left out."""
    temperature: float = 0.07

    def check(self) -> None:
        if not self.k or min(self.k) < 1:
            got = ", ".join(map(str, self.k)) or "none"
            raise UserError(f"kNN needs positive numbers of neighbours, got k = {got}")
        if not self.temperature > 0:
            raise UserError(f"the temperature is {self.temperature}; it has to be positive")

    def fit(self, given: ProbeInput, device: str | torch.device = "cpu", progress: bool = False) -> dict:
        """Classify each test sample by its k nearest gallery samples, each voting exp(cosine / temperature).

        Args:
            given: its training features, (M, E), are the gallery; normalised here, like the test features (N, E).

        Returns:
            A dict that JSON can hold but for 'predicted' (N,) int64: in percent 'k10_acc1', ... for each k, 'acc1',
            'acc5' (more than five classes) and 'mean_per_class_recall' of k = 20, or of the largest below where 20 is
            not among them, and 'chance'; 'k', the number those are of, 'temperature', 'left_out_k', 'num_train',
            'num_test', 'num_classes'. Ties count against the model; a right class without a vote is behind all others.

        Raises:
            UserError: a k above M.

        The N x M similarities are held in blocks of rows.
        """
        used = self._used(len(given.train))
        chosen = max((number for number in used if number <= USUAL), default=min(used))
        found = _ranked(given, used, self.temperature, probe_device(device), progress)
        return {
            **hit_figures(*found[chosen], given),
            **{f"k{number}_acc1": 100 * (rank < 1).double().mean().item() for number, (rank, _) in found.items()},
            "k": chosen,
            "left_out_k": [number for number in self.k if number not in used],
            "temperature": self.temperature,
            **counts(given),
            "predicted": found[chosen][1],
        }

    def _used(self, gallery: int) -> list[int]:
        numbers = sorted(set(self.k))
        if self.k == NEIGHBOURS:
            numbers = [number for number in numbers if number <= gallery]
            if not numbers:
                least = f"fewer than the least k, {NEIGHBOURS[0]}; give a smaller k"
                raise UserError(f"the gallery has {gallery} images, {least}")
        if numbers[-1] > gallery:
            wanted = f"k = {numbers[-1]} neighbours of a gallery of {gallery} images"
            raise UserError(f"{wanted}; give a k of at most {gallery}")
        return numbers

    def headline(self, result: dict) -> tuple[str, ...]:
        return (f"k{result['k']}_acc1",)


def _ranked(
    given: ProbeInput, used: Sequence[int], temperature: float, device: torch.device, progress: bool
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """By k, how many classes stand before the right one (N,), and the class predicted (N,)."""
    gallery, owners = F.normalize(given.train.to(device), dim=1), given.train_labels.to(device)
    size = max(1, BLOCK_ELEMENTS // max(len(gallery), max(used) * given.num_classes))
    found: dict[int, list] = {number: [] for number in used}
    blocks = list(zip(given.test.split(size), given.test_labels.split(size), strict=True))
    for block, labels in bar(blocks, "nearest neighbours", shown=progress):
        similarity, nearest = (F.normalize(block.to(device), dim=1) @ gallery.T).topk(max(used), dim=1)
        # Relative to the nearest one, which changes no order and cannot overflow.
        weights, classes = ((similarity - similarity[:, :1]) / temperature).exp(), owners[nearest]
        votes = similarity.new_zeros(len(block), given.num_classes)
        for before, number in itertools.pairwise((0, *used)):  # in rising order: each adds its further neighbours
            votes = votes.scatter_add(1, classes[:, before:number], weights[:, before:number])
            found[number].append(ranked(votes.cpu(), labels))
    return {number: tuple(map(torch.cat, zip(*parts, strict=True))) for number, parts in found.items()}
