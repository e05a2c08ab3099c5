"""What each objective adds to a step: processor time and memory of short runs with it and without.

    python benchmarks/objectives.py
    python benchmarks/objectives.py --config configs/flickr8k.yaml --data 'flickr8k/train-*.tar' --rounds 3

Runs take turns, each in a process of its own. A step's time is the processor's, which a busy machine changes little;
memory is the most that the process had. `distill` is taught by the run without objectives, live, and from stored views.
"""

import multiprocessing
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rows import append, run_benchmark

from contrastive.option_types import Positive
from contrastive.train.loop import Trainer
from contrastive.train.pretrain import PretrainConfig, pretrain
from contrastive.train.run import command

ROOT = Path(__file__).resolve().parents[1]
SETTLE = 3  # steps at the start that do not count
HEAD = "--objectives.{0}.prototypes 1024 --objectives.{0}.hidden 512 --objectives.{0}.bottleneck 128"
SELF_DISTILL, MASKED, PATCH_DISTILL = map(HEAD.format, ("self_distill", "masked", "patch_distill"))
CASES = {
    "none": "",
    "caption": "--objectives caption",
    "self_distill": f"--objectives self_distill {SELF_DISTILL}",
    "masked": f"--objectives masked {MASKED}",
    "self_distill masked": f"--objectives self_distill masked {SELF_DISTILL} {MASKED}",
    "patch_distill": f"--objectives patch_distill {PATCH_DISTILL}",
    # One token of 37 more than `none` has, which averages.
    "patch_mean": "--objectives patch_mean --model.image.pool class --model.image.class_token",
    "slip": "--objectives slip --objectives.slip.hidden 512 --objectives.slip.out 128",
    "distill": "--objectives distill --teacher {0}/teacher",
    "distill, stored": "--objectives distill --teacher {0}/views",
}


@dataclass(frozen=True)
class Options:
    config: str = str(ROOT / "configs" / "quickstart.yaml")
    """Of the run."""
    data: str = "scenes:val"
    """What it learns from."""
    cases: tuple[str, ...] = tuple(CASES)
    """Which objectives."""
    steps: Positive[int] = 15
    """Of each run."""
    rounds: Positive[int] = 2
    """Times that each run has its turn."""
    results: str = "objectives"
    """Rows go to benchmarks/results/NAME.jsonl; an absolute NAME is a path of its own."""


def measured(words: list[str], pipe) -> None:
    """Do a run in this process; send the milliseconds of its median step and the MiB that it had at most."""
    ends, one_step = [], Trainer._one_step

    def timed(*args):
        done = one_step(*args)
        ends.append(time.process_time())
        return done

    Trainer._one_step = timed
    command(PretrainConfig, pretrain, words, name="objectives", doc="", default_recipe=words[1], shown="")
    gaps = [after - before for before, after in zip(ends[SETTLE:], ends[SETTLE + 1 :], strict=False)]
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    pipe.send((1e3 * statistics.median(gaps), most))


def in_a_process(words: list[str]) -> tuple[float, float]:
    here, there = multiprocessing.Pipe()
    # Not forked: memory is counted from the start of the process.
    process = multiprocessing.get_context("spawn").Process(target=measured, args=(words, there))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)
    return here.recv()


def main(options: Options) -> None:
    found: dict[str, list[tuple[float, float]]] = {case: [] for case in options.cases}
    with tempfile.TemporaryDirectory() as folder:
        common = ["--config", options.config, "--data.train", options.data, "--train.log_every", "1000"]
        common += ["--evaluation.limit", "4", "--data.eval", options.data, "--data.templates", "auto"]
        common += ["--checkpoint.every", "100000"]
        if any("distill," in case or case == "distill" for case in options.cases):
            in_a_process([*common, "--train.steps", "5", "--run_folder", f"{folder}/teacher"])
            embed = [f"{folder}/teacher", options.data, f"{folder}/views", "--views", "2", "--augment", options.config]
            subprocess.run([sys.executable, ROOT / "scripts" / "embed.py", *embed], check=True)
        for turn in range(options.rounds):
            for number, case in enumerate(options.cases):
                words = CASES[case].format(folder).split()
                run = ["--train.steps", str(options.steps), "--run_folder", f"{folder}/{turn}-{number}"]
                found[case].append(in_a_process([*common, *run, *words]))
    base = statistics.median(ms for ms, _ in found["none"]) if "none" in found else None
    for case, each in found.items():
        ms, mib = (statistics.median(one) for one in zip(*each, strict=True))
        row = {
            "what": "processor time of a step with these objectives, and the process's memory at most",
            "objectives": case,
            "config": Path(options.config).name,
            "data": Path(options.data).name,
            "ms": round(ms, 1),
            "times": None if base is None else round(ms / base, 2),
            "MiB": round(mib),
            "rounds": options.rounds,
        }
        append(options.results, row, shlex.join(["python", "benchmarks/objectives.py", *sys.argv[1:]]))
        print(f"{case:24} {ms:8.1f} ms  {'' if base is None else f'{ms / base:.2f}x'}  {mib:6.0f} MiB", flush=True)


if __name__ == "__main__":
    run_benchmark("objectives.py", Options, __doc__, main)
