"""Few-shot classification by ridge regression on frozen features (big_vision's evaluator fewshot_lsr; Dosovitskiy et
al. 2021, section 4.1).

N samples, C classes, E embed_dim, S shots.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from contrastive.errors import UserError
from contrastive.evaluate.classification import ranked
from contrastive.evaluate.evaluated_model import EvaluatedModel
from contrastive.evaluate.probe_input import ProbeInput, ProbeTask, counts, hit_figures, probe_device
from contrastive.evaluate.tasks import TASKS, Outcome
from contrastive.log import bar

SHOTS = (1, 5, 10, 25)
L2 = 2.0**10
BIAS = 100.0
"""The constant feature: so large that its weight is hardly penalised."""
LEAST_DEVIATION = 1e-5
BLOCK_ROWS = 4096


@TASKS.register("few_shot")
@dataclass(frozen=True)
class FewShot(ProbeTask):
    """Ridge regression on a few images of each class (big_vision's few-shot evaluator)."""

    title = "few-shot"

    shots: tuple[int, ...] = SHOTS
    """Training images of each class, S. A number that some class has fewer images than is left out."""
    seeds: int = 3
    """Draws of the training images, of seeds 0, 1, ...; fewer shots of a seed are the first of its more."""

    def check(self) -> None:
        if self.seeds < 1:
            raise UserError(f"few-shot needs at least one seed, got {self.seeds}")
        if not self.shots or min(self.shots) < 1:
            got = ", ".join(map(str, self.shots)) or "none"
            raise UserError(f"few-shot needs positive numbers of shots, got {got}")

    def fit(self, given: ProbeInput, device: str | torch.device = "cpu", progress: bool = False) -> dict:
        """Fit on S training images of each class, score on the whole test set; for each S and several draws.

        Args:
            given: its features (N, E) are whitened here by the mean and deviation of the drawn images.

        Returns:
            A dict that JSON can hold but for 'predicted' (N,) int64: in percent 'shot1_acc1' and 'shot1_std', ... mean
            and standard deviation (of the seeds) for each S; 'acc1', 'acc5' (more than five classes),
            'mean_per_class_recall': means for the most shots; 'chance'; 'shots' as used, 'left_out_shots', 'seeds',
            'l2', 'num_train', 'num_test', 'num_classes'. 'predicted' is that of the most shots and seed 0.

        Raises:
            UserError: no number of shots that every class has.
        """
        used = self._used(given)
        found, predicted = _draws(given, used, self.seeds, probe_device(device), progress)
        figures = {}
        for number, draws in found.items():
            accuracies = [figure["acc1"] for figure in draws]
            figures[f"shot{number}_acc1"] = np.mean(accuracies).item()
            figures[f"shot{number}_std"] = np.std(accuracies).item()
        most = found[used[-1]]
        return {
            **{name: np.mean([figure[name] for figure in most]).item() for name in most[0]},
            **figures,
            "shots": used,
            "left_out_shots": [number for number in self.shots if number not in used],
            "seeds": self.seeds,
            "l2": L2,
            **counts(given),
            "predicted": predicted,
        }

    def _used(self, given: ProbeInput) -> list[int]:
        images = torch.bincount(given.train_labels, minlength=given.num_classes)
        used = sorted({number for number in self.shots if number <= images.min()})
        if not used:
            raise UserError(
                f"class {images.argmin()} has {images.min()} training images, fewer than the least number of shots, "
                f"{min(self.shots)}; ask for fewer shots"
            )
        return used

    def headline(self, result: dict) -> tuple[str, ...]:
        return tuple(f"shot{number}_acc1" for number in result["shots"])

    def run(self, subject: EvaluatedModel) -> Outcome:
        outcome = super().run(subject)
        # A mean over draws, while 'predicted' is of one draw: no interval can be made around it from that.
        recall = replace(outcome.figures["mean_per_class_recall"], interval=None)
        return replace(outcome, figures={**outcome.figures, "mean_per_class_recall": recall})


def _draws(
    given: ProbeInput, used: Sequence[int], seeds: int, device: torch.device, progress: bool
) -> tuple[dict[int, list[dict[str, float]]], torch.Tensor]:
    """Figures of each draw by shots, and the classes (N,) predicted by seed 0 with the most shots."""
    found: dict[int, list[dict[str, float]]] = {number: [] for number in used}
    for seed in bar(range(seeds), "few-shot", shown=progress):
        drawn = draw(given.train_labels, given.num_classes, seed)
        for number in used:
            rows = torch.cat([places[:number] for places in drawn])
            train, labels = given.train[rows].to(device), given.train_labels[rows]
            rank, predicted = ranked(ridge_scores(train, labels, given.test, given.num_classes), given.test_labels)
            found[number].append(hit_figures(rank, predicted, given))
        if seed == 0:
            first = predicted
    return found, first


def draw(labels: torch.Tensor, num_classes: int, seed: int) -> list[torch.Tensor]:
    """For each class its places in `labels` (N,), in an order drawn by `seed`: as big_vision draws them."""
    generator = np.random.default_rng(seed)
    labels = labels.numpy()
    return [torch.from_numpy(generator.permutation(np.where(labels == label)[0])) for label in range(num_classes)]


def ridge_scores(
    train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, num_classes: int, l2: float = L2
) -> torch.Tensor:
    """Scores (N, C) of test features by the ridge regression of -1 and +1 on whitened training features (n, E).

    In float64: mean and deviation (plus 1e-5) of each feature are taken out, a constant feature of 100 is added, and
    the weights solve  (XᵀX + l2 I) W = XᵀY,  by whichever of XᵀX and XXᵀ is smaller.
    """
    device = train.device
    train = train.double()
    mean, deviation = train.mean(dim=0), train.std(dim=0, correction=0) + LEAST_DEVIATION

    def whitened(features: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad((features - mean) / deviation, (0, 1), value=BIAS)

    rows = whitened(train)
    targets = 2 * torch.nn.functional.one_hot(labels.to(device), num_classes).double() - 1
    if len(rows) >= rows.shape[1]:
        weights = _solve(rows.T @ rows, l2, rows.T @ targets)
    else:
        weights = rows.T @ _solve(rows @ rows.T, l2, targets)
    return torch.cat([(whitened(block.to(device).double()) @ weights).cpu() for block in test.split(BLOCK_ROWS)])


def _solve(matrix: torch.Tensor, l2: float, target: torch.Tensor) -> torch.Tensor:
    matrix.diagonal().add_(l2)
    return torch.cholesky_solve(target, torch.linalg.cholesky(matrix))
