"""Pretrain a CLIP or SigLIP model from image-text pairs.

accelerate launch scripts/pretrain.py --loss sigmoid
accelerate launch scripts/pretrain.py --config configs/flickr8k.yaml --data.train 'shards/train-*.tar'
"""

import sys
from dataclasses import replace
from pathlib import Path

from contrastive.config import parse, take_option
from contrastive.distributed.runtime import prepare_process
from contrastive.log import run_script

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"


def main(args: list[str]) -> None:
    prepare_process()
    from contrastive.train import PretrainConfig, pretrain
    from contrastive.train.settings import LENGTHS, default_run

    args, chosen = take_option(args, "config")
    config_file = Path(chosen) if chosen else QUICKSTART
    prog, description = (
        "pretrain.py",
        f"Pretrain a dual encoder. --config FILE.yaml (default {QUICKSTART.name})",
    )
    lengths = tuple(f"train.{name}" for name in LENGTHS)
    options = {"prog": prog, "description": description, "either": (lengths,)}
    config = parse(PretrainConfig, args, [config_file], **options)
    config = replace(config, run_folder=config.run_folder or default_run(config_file, config.loss_name))
    saved = Path(config.run_folder) / "config.yaml"
    if config.resume and saved.exists():  # the run's own options, with what the flags say now
        config = replace(parse(PretrainConfig, args, [saved], **options), run_folder=config.run_folder)
    if not pretrain(config):
        sys.exit(130)  # stopped on request, after saving


if __name__ == "__main__":
    run_script("pretrain.py", main)
