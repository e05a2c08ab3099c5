"""What the training scripts have in common: flags and files in, a resumed run's own options, an exit status."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from contrastive.config import parse, rename_flags, take_option
from contrastive.train.options import LENGTHS, RunConfig

C = TypeVar("C", bound=RunConfig)

SUPERVISED_FLAGS = {
    "data": "data.train",
    "epochs": "train.epochs",
    "batch_size": "train.global_batch_size",
    "lr": "optimizer.lr",
}
"""What the short flags of supervised runs stand for."""


def command(
    cls: type[C],
    train: Callable[[C], bool],
    args: list[str],
    *,
    prog: str,
    description: str,
    default_file: Path,
    name: Callable[[C], str],
    short: Mapping[str, str] = {},
) -> None:
    """Run `train` with the options that `args` and the configuration file give; exit with 130 when it was stopped.

    Args:
        default_file: the configuration where --config names none.
        name: what the run is called when no folder is named: runs/FILE-NAME.
        short: flags that stand for longer ones.
    """
    args, chosen = take_option(rename_flags(args, short), "config")
    config_file = Path(chosen) if chosen else default_file
    description = f"{description} --config FILE.yaml (default {default_file.name})"
    if short:
        description += "; short for longer flags: " + ", ".join(f"--{flag}" for flag in short)
    options = {"prog": prog, "description": description, "either": (tuple(f"train.{n}" for n in LENGTHS),)}
    options["also"] = ("config", *short)
    config = parse(cls, args, [config_file], **options)
    config = replace(config, run_folder=config.run_folder or f"runs/{config_file.stem}-{name(config)}")
    saved = Path(config.run_folder) / "config.yaml"
    if config.resume and saved.exists():  # the run's own options, with what the flags say now
        # A preset's name given again would undo what the first command changed of the preset.
        args, _ = take_option(args, "model")
        config = replace(parse(cls, args, [saved], written=True, **options), run_folder=config.run_folder)
    if not train(config):
        sys.exit(130)  # stopped on request, after saving


def data_name(spec: str) -> str:
    """Return a folder name from a data specification: the last part of a path, anything unusual as '-'."""
    last = spec.rstrip("/").rpartition("/")[2]
    return "".join(c if c.isalnum() else "-" for c in last).strip("-") or "data"
