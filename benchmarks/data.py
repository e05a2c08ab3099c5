"""Images per second from shards to batches: ours beside open_clip's, webdataset's and datasets' pipelines.

    python benchmarks/data.py                                    # a table for this machine
    python benchmarks/data.py --sets 500x375 --workers 0 4 8

Every rival's row goes to results/data.jsonl; one that fails leaves a row with an `error`.

Sets: `real`, photographs in shards (left out where there are none), and JPEGs of WIDTHxHEIGHT pixels and quality 90,
or that after a 'q', drawn with a photograph's spectrum into a temporary folder. All rivals read the same shards, crop
at random (scale 0.9 to 1), resize to 224 x 224, bicubic and antialiased, tokenize a caption for CLIP, and shuffle:

ours        our shards, order, PairDataset and train_loader; uint8 batches
open_clip   get_wds_dataset of open_clip_train with image_transform(is_train=True); float32, normalised by the workers
webdataset  webdataset.WebDataset, torchvision.io.decode_image, transforms.v2 on uint8 tensors
datasets    load_dataset('webdataset'), a map-style dataset in Arrow files made before the clock starts; Pillow decodes;
            transforms.v2

Each sample of a rate is a process of its own, tied to one core for 0 workers (the process loads by itself) and to K
cores for K workers, with one torch thread. Its clock starts after the first batch of each worker. Rivals take turns,
so that the machine's drift hits all alike; median and best over the rounds.

Also: mean differences of our pixels from Pillow's, in 1/255; the time of random reads by index; the time to open.
"""

import os
import re
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_measure import (
    Failed,
    alone,
    bytes_per_image,
    pixel_differences,
    seconds_of_seeks,
    seconds_per_image,
    seconds_to_open,
)
from data_rivals import RIVALS, Load, RivalName, arrow_rows, import_rivals, rival_version
from data_shards import SHARDS, generate
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rows import RESULTS, append, run_benchmark

from contrastive.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
GENERATED = r"([1-9]\d*)x([1-9]\d*)(?:q([1-9]|[1-8]\d|9[0-5]))?"
QUALITY = 90
PIXELS = 120_000_000  # of a generated set: 640 images of 500 x 375


@dataclass(frozen=True)
class Options:
    sets: tuple[str, ...] = ("real", "500x375", "1600x1200", "1600x1200q75")
    """Image sets: real, or WIDTHxHEIGHT, with qQUALITY where it is not 90, of generated ones."""
    real: str = str(SHARED / "flickr8k" / "train-{000000..000005}.tar")
    """Shards of real photographs with KEY.jpg and KEY.txt, as a brace range."""
    workers: tuple[int, ...] = (0, 2)
    """Loader processes; 0: the measuring process loads by itself."""
    rivals: tuple[RivalName, ...] = RIVALS
    """Who is measured."""
    batch: int = 32
    """Images in a batch."""
    rounds: int = 5
    """Samples of each rate."""
    seconds: float = 4.0
    """Least duration of a sample."""
    images: int | None = None
    """Images of a generated set; none: about 120 million pixels' worth, from 64 to 1,024."""
    seeks: int = 10_000
    """Random reads; 0 for none."""
    results: str = "data"
    """Rows go to benchmarks/results/NAME.jsonl; an absolute NAME is a path of its own."""


def main(options: Options) -> None:
    _check(options)
    (RESULTS / f"{options.results}.jsonl").parent.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(title="224 x 224 images per second; × beside open_clip", box=SIMPLE_HEAD)
    for heading in ("set", "workers", "rival", "images/s", "best", "per core", "×"):
        table.add_column(heading, justify="left" if heading in ("set", "rival") else "right")
    columns = (SpinnerColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    import_rivals()
    sets = [name for name in options.sets if name != "real" or _there(options.real, console)]
    try:
        with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console) as progress:
            total = len(sets) * (1 + len(options.workers) * options.rounds * len(options.rivals))
            bar = progress.add_task("", total=total)

            def step(what: str) -> None:
                progress.update(bar, description=what, advance=1)

            for name in sets:
                _measure_set(name, options, Path(folder), step, table, console)
    finally:
        console.print(table)


def _check(options: Options) -> None:
    cores = len(os.sched_getaffinity(0))
    for name in options.sets:
        if name != "real" and not re.fullmatch(GENERATED, name):
            raise UserError(
                f"--sets {name}: expected real, WIDTHxHEIGHT or WIDTHxHEIGHTqQUALITY, the quality from 1 to 95"
            )
    if max(options.workers, default=0) > min(cores, SHARDS):
        raise UserError(
            f"--workers {max(options.workers)}: this machine and {SHARDS} shards allow {min(cores, SHARDS)}"
        )
    if not (options.workers and options.rivals and options.sets):
        raise UserError("--workers, --rivals and --sets need a value each")
    if options.rounds < 1 or options.batch < 1 or options.seconds <= 0:
        raise UserError("--rounds, --batch and --seconds have to be positive")


def _there(shards: str, console: Console) -> bool:
    from braceexpand import braceexpand

    missing = [path for path in braceexpand(shards) if not Path(path).is_file()]
    if missing:
        console.print(f"real is left out: there is no {missing[0]}", highlight=False)
    return not missing


def _measure_set(
    name: str, options: Options, folder: Path, step: Callable[[str], None], table: Table, console: Console
) -> None:
    shards = options.real
    step(f"{name}: shards")
    if name != "real":
        width, height, quality = (int(n or QUALITY) for n in re.fullmatch(GENERATED, name).groups())
        images = options.images or min(1024, max(64, PIXELS // (width * height)))
        shards = generate(folder / name, width, height, quality, images)
    load = Load(shards, options.batch, 0, str(folder / "arrow"))
    if "datasets" in options.rivals:
        alone(lambda: arrow_rows(load) and None)  # made once, on nobody's clock
    for row in _properties(name, options, load):
        _append(options, row)
        shown = {key: value for key, value in row.items() if key not in ("what", "set")}
        line = ", ".join(f"{key} {_four_digits(v) if type(v) is float else v}" for key, v in shown.items())
        console.print(f"{name}: {row['what']}: {line}", highlight=False, soft_wrap=True)
    for workers in options.workers:
        rows = _rates(name, options, Load(shards, options.batch, workers, load.cache), step)
        for row in rows:
            _append(options, row)
        _add(table, rows)


def _properties(name: str, options: Options, load: Load) -> list[dict]:
    """Return the rows that are about our reading, not about rates."""
    measured = {"set": name, "bytes_per_image": alone(bytes_per_image, load)}
    differences = {f"{key}_difference": value for key, value in alone(pixel_differences, load).items()}
    rows = [{"what": "mean difference of pixels from Pillow, in 1/255", **measured, **differences}]
    if options.seeks:
        for rival in [rival for rival in ("ours", "datasets") if rival in options.rivals]:
            row = {"what": "random reads by index", "set": name, "rival": rival, "reads": options.seeks}
            try:
                rows.append({**row, "seconds": alone(seconds_of_seeks, rival, load, options.seeks)})
            except Failed as failure:
                rows.append({**row, "error": str(failure)})
        rows.append({"what": "opening the indexed shards", "set": name, "seconds": alone(seconds_to_open, load)})
    return rows


def _rates(name: str, options: Options, load: Load, step: Callable[[str], None]) -> list[dict]:
    found: dict[str, list[float]] = {rival: [] for rival in options.rivals}
    errors: dict[str, str] = {}
    for number in range(options.rounds):
        for rival in options.rivals:
            step(f"{name}, {load.workers} workers, round {number + 1}: {rival}")
            if rival in errors:
                continue
            try:
                seconds = alone(seconds_per_image, rival, load, options.seconds, cores=max(1, load.workers))
                found[rival].append(seconds)
            except Failed as failure:
                errors[rival] = str(failure)
    return [_row(name, rival, options, load, found[rival], errors.get(rival)) for rival in options.rivals]


def _row(name: str, rival: str, options: Options, load: Load, seconds: list[float], error: str | None) -> dict:
    row = {
        "what": "shards to batches of 224 x 224",
        "set": name,
        "rival": rival,
        "rival_version": rival_version(rival),
        "workers": load.workers,
        "cores": max(1, load.workers),
        "batch": load.batch,
        "rounds": options.rounds,
        "seconds": options.seconds,
    }
    if error:
        return {**row, "error": error}
    median = 1 / statistics.median(seconds)
    return {
        **row,
        "ms_per_image_median": _four_digits(statistics.median(seconds) * 1e3),
        "ms_per_image_min": _four_digits(min(seconds) * 1e3),
        "images_per_second": _four_digits(median),
        "images_per_second_best": _four_digits(1 / min(seconds)),
        "images_per_second_per_core": _four_digits(median / row["cores"]),
    }


def _append(options: Options, row: dict) -> None:
    append(options.results, row, shlex.join(["python", "benchmarks/data.py", *sys.argv[1:]]))


def _add(table: Table, rows: list[dict]) -> None:
    theirs = next((row.get("images_per_second") for row in rows if row["rival"] == "open_clip"), None)
    for row in rows:
        name = [row["set"], str(row["workers"]), row["rival"]]
        if "error" in row:
            table.add_row(*name, "failed")
            continue
        rates = [row[f"images_per_second{which}"] for which in ("", "_best", "_per_core")]
        ratio = f"{row['images_per_second'] / theirs:.2f}" if theirs else ""
        table.add_row(*name, *(f"{rate:,.0f}" for rate in rates), ratio)
    table.add_section()


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    run_benchmark("data.py", Options, __doc__, main)
