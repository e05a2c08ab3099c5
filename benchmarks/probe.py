"""The linear probe with its whole sweep of weight decays, ours beside scikit-learn's: time, accuracy, convergence.

    python benchmarks/probe.py                                  # 10,000 x 512, 10 classes, on this machine's cores
    python benchmarks/probe.py --features embeddings.npz        # train, train_labels, test, test_labels
    python benchmarks/probe.py --rivals ours sklearn sklearn_all --device cuda

Every rival's row goes to results/probe.jsonl.

ours         contrastive.evaluate.linear_probe
sklearn      LogisticRegression(C=1/λ, max_iter=1000), its lbfgs and its tolerance, one fit for each λ that our search
             visited, on the same split; then a fit on training and validation data with the best λ it found itself
sklearn_all  the same for all 97 values of the grid, which is what no search costs

Rivals take turns, so that the machine's drift hits all alike; median and minimum over the rounds. `seconds_sweep`: all
fits that choose λ, with their validation accuracies. `seconds`: that, the last fit and the test scores.

Features are synthetic, made to resemble CLIP's: unit length, in a narrow cone, most variance along few directions,
classes that overlap along those (a probe gets about 87 % right). A fifth of the training features is the validation
split.

Convergence: `probability_difference` is the largest difference of a test sample's class probabilities from the exact
optimum at the rival's own λ (scikit-learn in float64 with tol=1e-10), and `objective_excess` how far the objective is
above its minimum, relative to it.
"""

import os
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rows import RESULTS, append

from contrastive.evaluate.linear_probe import held_out, linear_probe, sweep_weight_decay, weight_decay_at
from contrastive.evaluate.logistic import fit_logistic
from contrastive.evaluate.probe_input import checked_input

RivalName = Literal["ours", "sklearn", "sklearn_all"]
SEED = 0


@dataclass(frozen=True)
class Options:
    samples: int = 10_000
    """Synthetic training images, with the validation split; as many for the test."""
    dim: int = 512
    """Width of the synthetic features."""
    classes: int = 10
    """Synthetic classes."""
    features: Path | None = None
    """An .npz of train (N, E), train_labels (N,), test and test_labels, in place of synthetic ones."""
    rivals: tuple[RivalName, ...] = ("ours", "sklearn")
    """Who is measured."""
    rounds: int = 3
    """Samples of each time."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Where ours computes; auto: a GPU where there is one. scikit-learn's are on the CPU."""
    results: str = "probe"
    """Rows go to benchmarks/results/NAME.jsonl; an absolute NAME is a path of its own."""


class Data(NamedTuple):
    """float32 features and int64 labels; `held` (N,) bool marks the validation split of the training set."""

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor
    held: torch.Tensor

    @property
    def num_classes(self) -> int:
        return 1 + int(self.train_labels.max())


class Found(NamedTuple):
    """What one run of a rival gave."""

    seconds: float
    seconds_sweep: float
    weight_decay: float
    val_acc1: float
    test_acc1: float
    fits: int
    weight: np.ndarray
    """(C, E)."""
    bias: np.ndarray
    """(C,)."""


def main(options: Options) -> None:
    if options.rounds < 1 or not options.rivals:
        sys.exit("--rounds has to be positive, and --rivals needs a value")
    data = _read(options.features) if options.features else synthetic(options.samples, options.dim, options.classes)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    (RESULTS / f"{options.results}.jsonl").parent.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 140)
    train, labels = data.train[~data.held], data.train_labels[~data.held]
    val, val_labels = data.train[data.held], data.train_labels[data.held]
    # Which values our search visits, before any clock; it also starts the libraries up.
    visited = sweep_weight_decay(train, labels, val, val_labels, data.num_classes, device=device).accuracies
    runs: dict[RivalName, Callable[[], Found]] = {
        "ours": lambda: _ours(data, device),
        "sklearn": lambda: _sklearn(data, list(visited)),
        "sklearn_all": lambda: _sklearn(data, [weight_decay_at(step) for step in range(97)]),
    }
    found: dict[str, list[Found]] = {name: [] for name in options.rivals}
    columns = (SpinnerColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=options.rounds * len(options.rivals))
        for number in range(options.rounds):
            for name in options.rivals:
                progress.update(bar, description=f"round {number + 1}: {name}")
                found[name].append(runs[name]())
                progress.advance(bar)
        progress.update(bar, description="the exact optimum")
        exact = {value: _exact(data, value) for value in {found[name][-1].weight_decay for name in options.rivals}}
        rows = [_row(name, found[name], data, exact, device, options) for name in options.rivals]
    for row in rows:
        append(options.results, row, shlex.join(["python", "benchmarks/probe.py", *sys.argv[1:]]))
    console.print(_table(rows))


def synthetic(samples: int, dim: int, classes: int) -> Data:
    """Unit features in a cone; class means and within-class noise share 128 directions of falling variance."""
    generator = torch.Generator().manual_seed(SEED)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rank = min(128, dim)
    directions = torch.linalg.qr(noise(dim, rank))[0].T * (torch.arange(1, rank + 1) ** -0.5)[:, None]
    means, cone = 0.26 * noise(classes, rank) @ directions, 2 * F.normalize(noise(dim), dim=0)
    labels = torch.arange(2 * samples) % classes
    within = noise(2 * samples, rank) @ directions + 0.3 * noise(2 * samples, dim) / dim**0.5
    features = F.normalize(means[labels] + cone + within, dim=1)
    train_labels = labels[:samples]
    held = held_out(train_labels, SEED)
    return Data(features[:samples], train_labels, features[samples:], labels[samples:], held)


def _read(path: Path) -> Data:
    try:
        with np.load(path) as arrays:
            train, labels, test, test_labels = (
                torch.from_numpy(arrays[name]) for name in ("train", "train_labels", "test", "test_labels")
            )
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"--features {path}: {error}")
    labels = labels.long()
    return Data(train.float(), labels, test.float(), test_labels.long(), held_out(labels, SEED))


def _ours(data: Data, device: str) -> Found:
    train, labels = data.train[~data.held], data.train_labels[~data.held]
    val, val_labels = data.train[data.held], data.train_labels[data.held]
    started = time.perf_counter()
    best = sweep_weight_decay(train, labels, val, val_labels, data.num_classes, device=device).best.weight_decay
    swept = time.perf_counter() - started
    started = time.perf_counter()
    given = checked_input(data.train, data.train_labels, data.test, data.test_labels, data.num_classes)
    result = linear_probe(given, device=device, seed=SEED)  # draws the same split
    seconds = time.perf_counter() - started
    probe = fit_logistic(data.train, data.train_labels, data.num_classes, best, device=device)  # for its weights
    return Found(
        seconds,
        swept,
        result["weight_decay"],
        result["val_acc1"],
        result["acc1"],
        len(result["sweep"]) + 1,
        probe.weight.cpu().numpy(),
        probe.bias.cpu().numpy(),
    )


def _sklearn(data: Data, weight_decays: list[float]) -> Found:
    train, labels = data.train[~data.held].numpy(), data.train_labels[~data.held].numpy()
    val, val_labels = data.train[data.held].numpy(), data.train_labels[data.held].numpy()
    started = time.perf_counter()
    accuracies = {}
    for weight_decay in weight_decays:
        accuracies[weight_decay] = _fit(train, labels, weight_decay).score(val, val_labels)
    swept = time.perf_counter() - started
    best = max(accuracies, key=lambda value: (accuracies[value], value))
    model = _fit(data.train.numpy(), data.train_labels.numpy(), best)
    accuracy = model.score(data.test.numpy(), data.test_labels.numpy())
    seconds = time.perf_counter() - started
    fits = len(weight_decays) + 1
    found = (100 * accuracies[best], 100 * accuracy, fits, *_both_classes(model))
    return Found(seconds, swept, best, *found)


def _fit(features: np.ndarray, labels: np.ndarray, weight_decay: float, **options):
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 1,000 iterations now and then do not suffice
        return LogisticRegression(C=1 / weight_decay, **{"max_iter": 1000, **options}).fit(features, labels)


def _both_classes(model) -> tuple[np.ndarray, np.ndarray]:
    """Weights and biases with a row for each class, where scikit-learn has one row for two classes."""
    if len(model.classes_) > 2:
        return model.coef_, model.intercept_
    return np.concatenate([-model.coef_, model.coef_]) / 2, np.concatenate([-model.intercept_, model.intercept_]) / 2


def _exact(data: Data, weight_decay: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights (C, E) and biases (C,) of the optimum."""
    train, labels = data.train.double().numpy(), data.train_labels.numpy()
    return _both_classes(_fit(train, labels, weight_decay, tol=1e-10, max_iter=100_000))


def _row(name: RivalName, runs: list[Found], data: Data, exact: dict, device: str, options: Options) -> dict:
    last = runs[-1]
    row = {
        "what": "linear probe with its sweep",
        "rival": name,
        "train": len(data.train),
        "val": int(data.held.sum()),
        "test": len(data.test),
        "dim": data.train.shape[1],
        "classes": data.num_classes,
        "features": "synthetic" if options.features is None else options.features.name,
        "computed_on": device if name == "ours" else "cpu",
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "rounds": len(runs),
        "fits": last.fits,
    }
    for part in ("seconds_sweep", "seconds"):
        times = [getattr(run, part) for run in runs]
        row[f"{part}_median"], row[f"{part}_min"] = statistics.median(times), min(times)
    row.update(weight_decay=last.weight_decay, val_acc1=last.val_acc1, test_acc1=last.test_acc1)
    row.update(_convergence(last, data, exact[last.weight_decay]))
    return {key: float(f"{value:.5g}") if type(value) is float else value for key, value in row.items()}


def _convergence(found: Found, data: Data, exact: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    train, test = data.train.double(), data.test.double()
    penalty = found.weight_decay * (2 if data.num_classes == 2 else 1)

    def scores(features: torch.Tensor, weight: np.ndarray, bias: np.ndarray) -> torch.Tensor:
        return features @ torch.from_numpy(weight).double().T + torch.from_numpy(bias).double()

    def objective(weight: np.ndarray, bias: np.ndarray) -> float:
        loss = F.cross_entropy(scores(train, weight, bias), data.train_labels, reduction="sum").item()
        return loss + penalty / 2 * float((weight.astype(np.float64) ** 2).sum())

    fitted = (found.weight, found.bias)
    difference = scores(test, *fitted).softmax(1) - scores(test, *exact).softmax(1)
    return {
        "probability_difference": difference.abs().max().item(),
        "objective_excess": objective(*fitted) / objective(*exact) - 1,
    }


def _table(rows: list[dict]) -> Table:
    table = Table(title="linear probe with its sweep of weight decays; × beside sklearn", box=SIMPLE_HEAD)
    for heading in ("rival", "fits", "sweep s", "all s", "best", "×", "λ", "test acc@1", "from the optimum"):
        table.add_column(heading, justify="left" if heading == "rival" else "right")
    theirs = next((row["seconds_sweep_median"] for row in rows if row["rival"] == "sklearn"), None)
    for row in rows:
        ratio = f"{theirs / row['seconds_sweep_median']:.1f}" if theirs else ""
        times = [f"{row[name]:.2f}" for name in ("seconds_sweep_median", "seconds_median", "seconds_min")]
        measured = [f"{row['weight_decay']:.3g}", f"{row['test_acc1']:.2f} %", f"{row['probability_difference']:.0e}"]
        table.add_row(row["rival"], str(row["fits"]), *times, ratio, *measured)
    return table


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__, use_underscores=True))
