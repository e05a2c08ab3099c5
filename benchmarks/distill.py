"""What a teacher is worth: a student of a quarter of its parameters with and without it, at as many samples.

    python benchmarks/distill.py --data 'flickr8k/train-*.tar' --dev flickr8k/dev-000000.tar

The teacher is a run of `--config`, and its embeddings of `--views` views of each image are stored once; several with
other seeds are an ensemble. The students are runs of the same recipe with smaller towers; with every seed one learns
without a teacher, one from the stored views. They are scored on the held-out shards: recall at 1, 5 and 10 in percent
both ways, with all captions, and their mean.

What lies in `--work` is not done again, and its CPU seconds are then not known. A row for each student goes to
results/distill.jsonl.
"""

import resource
import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rows import append, in_a_copy, run_benchmark

import contrastive
from contrastive.data.sources import open_source
from contrastive.errors import UserError
from contrastive.evaluate.retrieval import retrieval
from contrastive.option_types import Positive

ROOT = Path(__file__).resolve().parents[1]
SMALLER = (
    "--model.embed_dim 64 --model.image.width 64 --model.image.depth 4 --model.image.num_heads 2 "
    "--model.image.mlp_dim 256 --model.text.width 64 --model.text.depth 1 --model.text.num_heads 2 "
    "--model.text.mlp_dim 256"
)


@dataclass(frozen=True)
class Options:
    data: str
    """Training pairs."""
    dev: str
    """Held-out pairs, on which the students are scored."""
    config: str = str(ROOT / "configs" / "flickr8k.yaml")
    """The recipe of teacher and students."""
    loss: str = "softmax"
    """Of all of them."""
    student: str = SMALLER
    """Flags that make the student."""
    distill: str = "--objectives.distill.weight 3 --objectives.distill.feature_weight 3 --objectives.distill.project"
    """Flags that say how it learns from the teacher."""
    more: str = ""
    """Further flags of all runs."""
    teachers: Positive[int] = 3
    """Runs of the recipe, with the seeds 0, 1, ..."""
    views: Positive[int] = 10
    """Of each image."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A pair of students for each."""
    work: str = "runs/distill"
    """Where runs are kept."""
    results: str = "distill"
    """Rows go to benchmarks/results/NAME.jsonl; an absolute NAME is a path of its own."""


def main(options: Options) -> None:
    torch.set_num_threads(1)
    work = Path(options.work)
    teachers, stored = ([work / f"{name}-{k}" for k in range(options.teachers)] for name in ("teacher", "views"))
    how = ["--views", str(options.views), "--augment", options.config, "--dtype", "float16"]
    for seed, (teacher, views) in enumerate(zip(teachers, stored, strict=True)):
        pretrain(options, teacher, f"--seed {seed}")
        run("embed.py", [str(teacher), options.data, str(views), *how])
    taught = f"--objectives distill --teacher {shlex.join(map(str, stored))} {options.distill}"
    kinds = {"alone": options.student, "taught": f"{options.student} {taught}"}
    dev, rows = open_source(options.dev), []
    found = [scores(teacher, dev) for teacher in teachers]
    of_teacher = {
        "teacher_parameters": found[0]["parameters"],
        "teacher_mean_recall": [one["mean_recall"] for one in found],
    }
    for seed in options.seeds:
        for kind, own in kinds.items():
            folder = work / f"{kind}-{seed}"
            seconds = pretrain(options, folder, f"{own} --seed {seed}")
            row = {"student": kind, "seed": seed, "loss": options.loss, "views": options.views, **scores(folder, dev)}
            row |= {"distill": options.distill if kind == "taught" else "", "cpu_seconds": seconds}
            rows.append(append(options.results, row | of_teacher, shlex.join(["python", *sys.argv])))
    Console().print(table(rows))


def run(script: str, words: list[str]) -> float:
    """Run a script to its end; return its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    if status := in_a_copy(ROOT / "scripts" / script, words):
        raise UserError(f"{script} {shlex.join(words)} ended with status {status}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def pretrain(options: Options, folder: Path, flags: str) -> float | None:
    """Do a run, or what is left of it; return its CPU seconds, None where it was begun before."""
    if folder.exists():
        run("pretrain.py", [*words(options, folder, flags), "--resume", "auto"])
        return None
    return round(run("pretrain.py", words(options, folder, flags)), 1)


def words(options: Options, folder: Path, flags: str) -> list[str]:
    common = ["--config", options.config, "--data", options.data, "--loss", options.loss, "--run_folder", str(folder)]
    return [*common, *shlex.split(options.more), *shlex.split(flags)]


def scores(folder: Path, dev) -> dict[str, float]:
    """Parameters and recalls of a run."""
    bundle = contrastive.load(folder)
    found = retrieval(bundle, dev, device="cpu", captions="all")
    recalls = {name: round(value, 2) for name, value in found.items() if name.endswith(("_r1", "_r5", "_r10"))}
    parameters = sum(parameter.numel() for parameter in bundle.model.parameters())
    return {"parameters": parameters, **recalls, "mean_recall": round(statistics.mean(recalls.values()), 3)}


def table(rows: list[dict]) -> Table:
    """Means over the seeds, with the spread of the mean recall."""
    table = Table("", "parameters", "mean recall", "CPU seconds", box=SIMPLE_HEAD)
    first = rows[0]
    table.add_row("teacher", f"{first['teacher_parameters']:,}", _spread(first["teacher_mean_recall"]), "")
    for kind in ("alone", "taught"):
        of = [row for row in rows if row["student"] == kind]
        recalls = [row["mean_recall"] for row in of]
        seconds = [row["cpu_seconds"] for row in of if row["cpu_seconds"] is not None]
        told = f"{statistics.mean(seconds):.0f}" if seconds else ""
        table.add_row(kind, f"{of[0]['parameters']:,}", _spread(recalls), told)
    return table


def _spread(recalls: list[float]) -> str:
    return f"{statistics.mean(recalls):.2f} ({min(recalls):.2f}–{max(recalls):.2f})"


if __name__ == "__main__":
    run_benchmark("distill.py", Options, __doc__.partition("\n")[0], main)
