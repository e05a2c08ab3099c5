"""Which trainer learns more from the same photographs: ours and open_clip's own, from scratch, on Flickr8k.

    python benchmarks/contest.py --data 'flickr8k/train-*.tar' --dev flickr8k/dev-000000.tar

Both train towers of the sizes in configs/flickr8k.yaml on as many photographs as `--samples` says: open_clip by
`open_clip_train.main`, a row for each of the five captions, AdamW and its defaults for a ViT; ours by
scripts/pretrain.py with that recipe. Each has the learning rate that is best for it on a grid of factors of its own
one, by shorter runs on all shards but the last, scored on the last. Then each trains with every seed on all shards and
is scored on the held-out ones: recall at 1, 5 and 10 in percent both ways, with all captions, and their mean. Ours also
does so on `--fewer` photographs, to see how soon it is as good as open_clip at its end.

Runs are processes of `--threads` threads, `--side_by_side` of them at once, rivals next to each other. What lies in
`--work`, done with the same options and recipe, is not done again. A row for every run goes to results/contest.jsonl.
"""

import itertools
import shlex
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from glob import glob
from pathlib import Path

from contest_rivals import RIVALS, LossName, RivalName, Run, embed, train
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rows import append, run_benchmark

from contrastive.errors import UserError
from contrastive.evaluate.retrieval import retrieval_metrics, retrieval_ranks


@dataclass(frozen=True)
class Options:
    data: str
    """Training shards of KEY.jpg and KEY.json with its captions; the last one chooses the learning rates."""
    dev: str
    """Held-out shards, which are reported."""
    losses: tuple[LossName, ...] = ("sigmoid", "softmax")
    """Losses to train with."""
    rivals: tuple[RivalName, ...] = RIVALS
    """Trainers."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A run for each."""
    samples: int = 60_000
    """Photographs seen in a run; whole epochs of all captions."""
    fewer: int = 18_000
    """Photographs seen in the short runs of ours."""
    grid: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Factors of a rival's own learning rate; a single one is taken as it is."""
    grid_samples: int = 25_000
    """Photographs seen in a run that chooses one; whole epochs of the captions without the last shard's."""
    batch: int = 128
    """Pairs in a step."""
    threads: int = 1
    """Of each run."""
    side_by_side: int = 2
    """Runs at once."""
    work: str = "runs/contest"
    """Where runs are kept."""


def main(options: Options) -> None:
    console, rows = Console(), []
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for _, row in finished(chosen_runs(options, progress), options.dev, options, progress, "runs"):
            rows.append(append("contest", row, shlex.join(["python", *sys.argv])))
    console.print(table(rows))


def chosen_runs(options: Options, progress: Progress) -> list[Run]:
    """The runs that count, each rival at the learning rate that is best for it."""
    shards = sorted(glob(options.data))
    for flag, pattern in (("data", options.data), ("dev", options.dev)):
        if not glob(pattern):
            raise UserError(f"--{flag} {pattern}: no such shards")
    if len(shards) < 2 and len(options.grid) > 1:
        raise UserError(f"--data {options.data}: {len(shards)} shards; it takes two, one to choose learning rates by")
    work = Path(options.work).resolve()
    fewer = work / "shards"
    fewer.mkdir(parents=True, exist_ok=True)
    for shard in map(Path, shards[:-1]):
        (fewer / shard.name).unlink(missing_ok=True)
        (fewer / shard.name).symlink_to(shard.resolve())
    common = {"batch": options.batch, "work": str(work)}
    trials = [
        Run(rival, loss, factor, 100, options.grid_samples, data=f"{fewer}/*.tar", **common)
        for loss in options.losses
        for factor in options.grid
        for rival in options.rivals
    ]
    best = {(trial.rival, trial.loss): (0.0, trial.lr_factor) for trial in trials}
    if len(options.grid) > 1:
        for trial, row in finished(trials, shards[-1], options, progress, "learning rates"):
            place = trial.rival, trial.loss
            best[place] = max(best[place], (row["mean_recall"], trial.lr_factor))
    lengths = [(rival, options.samples) for rival in options.rivals]
    lengths += [(rival, options.fewer) for rival in options.rivals if rival == "ours"]
    return [
        Run(rival, loss, best[rival, loss][1], seed, samples, data=options.data, **common)
        for seed in options.seeds
        for loss in options.losses
        for rival, samples in lengths
    ]


def finished(runs: list[Run], held_out: str, options: Options, progress: Progress, what: str) -> Iterator[tuple]:
    """Train and score the runs, some at once; yield (run, row) in their order as they are done."""
    bar = progress.add_task(what, total=len(runs))
    with ThreadPoolExecutor(options.side_by_side) as pool:
        # Each trains in a process of its own: a thread here only waits for it.
        for run, timing in zip(runs, pool.map(lambda run: train(run, options.threads), runs), strict=True):
            images, texts, owners = embed(run, held_out)
            scores = retrieval_metrics(retrieval_ranks(images, texts, owners))
            recalls = {name: round(value, 2) for name, value in scores.items() if "median" not in name}
            row = {name: value for name, value in asdict(run).items() if name not in ("data", "work")}
            row |= {"threads": options.threads, "side_by_side": options.side_by_side, **recalls}
            row |= {"mean_recall": round(statistics.mean(recalls.values()), 3)}
            yield run, row | {name: round(seconds, 1) for name, seconds in timing.items()}
            progress.advance(bar)


def table(rows: list[dict]) -> Table:
    """Means over the seeds, with the spread of the mean recall."""
    table = Table(
        "", "samples", "lr ×", "seeds", *(f"{way} R@{k}" for way in ("I→T", "T→I") for k in (1, 5, 10)), box=SIMPLE_HEAD
    )
    for column in ("mean recall", "seconds"):
        table.add_column(column)
    for (loss, rival, samples), group in itertools.groupby(sorted(rows, key=_which), key=_which):
        group = list(group)
        names = [name for name in group[0] if name.endswith(("_r1", "_r5", "_r10"))]
        means = [f"{statistics.mean(row[name] for row in group):.1f}" for name in names]
        recalls = [row["mean_recall"] for row in group]
        spread = f"{statistics.mean(recalls):.2f} ({min(recalls):.2f}–{max(recalls):.2f})"
        seconds = f"{statistics.mean(row['cpu_seconds'] for row in group):.0f}"
        table.add_row(
            f"{loss} {rival}", f"{samples:,}", f"{group[0]['lr_factor']:g}", str(len(group)), *means, spread, seconds
        )
    return table


def _which(row: dict) -> tuple[str, str, int]:
    return row["loss"], row["rival"], row["samples"]


if __name__ == "__main__":
    run_benchmark("contest.py", Options, __doc__.partition("\n")[0], main)
