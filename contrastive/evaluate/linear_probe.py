"""Linear probe: logistic regression on frozen features, its weight decay swept as in CLIP (section A.3 of the paper).

N samples, C classes, E embed_dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from contrastive.errors import UserError
from contrastive.evaluate.classification import hit_figures, ranked
from contrastive.evaluate.logistic import MAX_ITERATIONS, LinearProbe, LogisticProblem, between, fit_logistic
from contrastive.evaluate.probe_input import ProbeInput, ProbeTask, counts
from contrastive.evaluate.tasks import TASKS
from contrastive.log import bar

LOWEST, HIGHEST, STEPS_PER_DECADE = -6, 6, 8
STEPS = (HIGHEST - LOWEST) * STEPS_PER_DECADE
COARSE = 2 * STEPS_PER_DECADE
ROUNDS = STEPS // COARSE + 1 + COARSE.bit_length() - 1
SWEEP_TOLERANCE = 1e-4
"""Of the fits that only choose the weight decay: near the peak, accuracies are a sample or two from the optimum's."""
VAL_SHARE = 0.2


class Sweep(NamedTuple):
    """What a sweep found: the fit of the best weight decay, and of all that were fitted."""

    best: LinearProbe
    accuracies: dict[float, float]
    """Validation accuracy in percent by weight decay, in rising order of the latter."""
    unconverged: tuple[float, ...]
    """Weight decays whose fit did not reach the tolerance."""


def weight_decay_at(step: int) -> float:
    """The value at a step, 0..96, of the grid from 1e-6 to 1e6."""
    return 10 ** (LOWEST + step / STEPS_PER_DECADE)


def sweep_weight_decay(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    val: torch.Tensor,
    val_labels: torch.Tensor,
    num_classes: int,
    *,
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float = SWEEP_TOLERANCE,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Sweep:
    """Choose the weight decay with the highest validation accuracy, coarse to fine.

    First 1e-6, 1e-4, 1e-2, 1, 1e2, 1e4 and 1e6; then the two neighbours of the best so far at one decade's distance,
    then at half of it, down to 8 steps per decade: at most 15 of the grid's 97 values. Among equals the largest wins.

    Args:
        train, val: features (N, E) and (M, E). Their labels (N,) and (M,) are int64 in 0..C-1.
    """
    problem = LogisticProblem(train, train_labels, num_classes, device)
    val = val.to(problem.rows.device)
    probes: dict[int, LinearProbe] = {}
    accuracies: dict[int, float] = {}
    for steps in bar(_steps(accuracies), "linear probe", ROUNDS, shown=progress):
        decays, starts = [weight_decay_at(step) for step in steps], [_guess(probes, step) for step in steps]
        fitted = problem.fit(decays, starts, max_iterations=max_iterations, tolerance=tolerance)
        for step, probe in zip(steps, fitted, strict=True):
            probes[step] = probe
            rank, _ = ranked(probe.scores(val), val_labels)
            accuracies[step] = 100 * (rank < 1).double().mean().item()
    return Sweep(
        probes[_best(accuracies)],
        {weight_decay_at(step): accuracies[step] for step in sorted(accuracies)},
        tuple(weight_decay_at(step) for step in sorted(probes) if not probes[step].converged),
    )


def linear_probe(
    given: ProbeInput, *, device: str | torch.device = "cpu", seed: int = 0, progress: bool = False
) -> dict:
    """Fit on train and validation features with the weight decay that is best for the latter, score on test.

    Args:
        given: its features (N, E) as the model gives them; they are neither scaled nor normalised here. The weight
            decay is chosen on its validation features; without them, on a fifth of the training images of each class,
            drawn by `seed`.

    Returns:
        A dict that JSON can hold but for 'predicted' (N,) int64: 'acc1', 'acc5' (more than five classes),
        'mean_per_class_recall', 'chance', 'val_acc1' in percent; 'weight_decay' (scikit-learn's 1 / C), 'iterations'
        and 'converged' of the last fit, 'sweep' {weight decay: validation accuracy}, 'unconverged' weight decays of the
        sweep, 'num_train' (with validation), 'num_test', 'num_classes'.

    Raises:
        UserError: no class has a second image to choose the weight decay on.
    """
    features, labels, parts = _parts(given, seed)
    found = sweep_weight_decay(*parts, given.num_classes, device=device, progress=progress)
    best = found.best
    # Only the sum of losses grows with the data; as with scikit-learn's C, the penalty stays.
    probe = fit_logistic(features, labels, given.num_classes, best.weight_decay, start=best, device=device)
    rank, predicted = ranked(probe.scores(given.test), given.test_labels)
    return {
        **hit_figures(rank, predicted, given.test_labels, given.num_classes),
        **counts(given),
        "predicted": predicted,
        "num_train": len(features),
        "val_acc1": found.accuracies[best.weight_decay],
        "weight_decay": best.weight_decay,
        "iterations": probe.iterations,
        "converged": probe.converged,
        "sweep": {_name(value): accuracy for value, accuracy in found.accuracies.items()},
        "unconverged": [_name(value) for value in found.unconverged],
    }


def _name(weight_decay: float) -> str:
    return f"{weight_decay:.4g}"


def _parts(given: ProbeInput, seed: int) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """All features to fit on at last and their labels; then training features, labels, validation features, labels."""
    if given.val is not None:
        parts = (given.train, given.train_labels, given.val, given.val_labels)
        return torch.cat([given.train, given.val]), torch.cat([given.train_labels, given.val_labels]), parts
    held = held_out(given.train_labels, seed)
    features, labels = given.train, given.train_labels
    return features, labels, (features[~held], labels[~held], features[held], labels[held])


def held_out(labels: torch.Tensor, seed: int) -> torch.Tensor:
    """Choose a fifth of each class for validation, rounded, at least one; none of a class with a single sample.

    Args:
        labels: (N,) int64.

    Returns:
        (N,) bool.
    """
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        places = (labels == label).nonzero().flatten()
        count = max(1, round(VAL_SHARE * len(places))) if len(places) > 1 else 0
        held[places[torch.randperm(len(places), generator=generator)[:count]]] = True
    if not held.any():
        raise UserError("no class has a second training sample to choose the weight decay on; give validation data")
    return held


def _steps(accuracies: dict[int, float]) -> Iterator[list[int]]:
    """The steps to fit next, coarse to fine; `accuracies` has those of the steps before."""
    # The strongest first, each the start of the next: where a decay is too weak to matter at this tolerance, the probe
    # then stays near one that it did matter to, not near the first steps from zero, which overfit.
    for step in range(STEPS, -1, -COARSE):
        yield [step]
    distance = COARSE // 2
    while distance:
        best = _best(accuracies)
        yield [step for step in (best - distance, best + distance) if 0 <= step <= STEPS]
        distance //= 2


def _best(accuracies: dict[int, float]) -> int:
    return max(accuracies, key=lambda step: (accuracies[step], step))


def _guess(probes: dict[int, LinearProbe], step: int) -> LinearProbe | None:
    """Where to begin: between the probes on both sides, which costs half the steps that the nearest one does."""
    below, above = [s for s in probes if s < step], [s for s in probes if s > step]
    if below and above:
        return between(probes[max(below)], probes[min(above)], weight_decay_at(step))
    return probes[min(above)] if above else None


@TASKS.register("linear_probe")
@dataclass(frozen=True)
class LinearProbeTask(ProbeTask):
    """Logistic regression by L-BFGS, its weight decay chosen on validation data (CLIP, appendix A.3)."""

    title = "linear probe"

    val: str | None = None
    """Data that the weight decay is chosen on; none: a part of `train`."""

    @property
    def data_used(self) -> tuple[str, ...]:
        return super().data_used + (() if self.val is None else (self.val,))

    def fit(self, given: ProbeInput, **how) -> dict:
        return linear_probe(given, **how)
