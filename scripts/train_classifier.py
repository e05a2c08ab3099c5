"""Train a plain ViT classifier from scratch on labelled images.

python scripts/train_classifier.py --model tiny --data mnist --epochs 10 --batch-size 128
accelerate launch scripts/train_classifier.py --config configs/classifier-cifar10.yaml --data cifar10
"""

from pathlib import Path

from contrastive.distributed.launching import prepare_process
from contrastive.log import run_script

DEFAULTS = Path(__file__).resolve().parents[1] / "configs" / "classifier.yaml"


def main(args: list[str]) -> None:
    prepare_process()
    from contrastive.train.classify import TrainClassifierConfig, train_classifier
    from contrastive.train.run import command

    command(
        TrainClassifierConfig,
        train_classifier,
        args,
        prog="train_classifier.py",
        description="Train a ViT classifier from scratch.",
        default_file=DEFAULTS,
    )


if __name__ == "__main__":
    run_script("train_classifier.py", main)
