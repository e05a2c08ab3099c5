"""Pretrain a CLIP or SigLIP model from image-text pairs.

accelerate launch scripts/pretrain.py --loss sigmoid
accelerate launch scripts/pretrain.py --config configs/flickr8k.yaml --data.train 'shards/train-*.tar'
accelerate launch scripts/pretrain.py --init_image runs/vit --lock image --data.train 'shards/train-*.tar'
"""

from pathlib import Path

from contrastive.distributed.launching import prepare_process
from contrastive.log import run_script

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"


def main(args: list[str]) -> None:
    prepare_process()
    from contrastive.train.pretrain import PretrainConfig, pretrain
    from contrastive.train.run import command

    command(
        PretrainConfig,
        pretrain,
        args,
        prog="pretrain.py",
        description="Pretrain a dual encoder.",
        default_file=QUICKSTART,
    )


if __name__ == "__main__":
    run_script("pretrain.py", main)
