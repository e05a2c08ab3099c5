"""Fine-tune a pretrained image tower on labelled images.

accelerate launch scripts/finetune.py runs/mine --data /data/flowers/train --data.eval /data/flowers/test

MODEL is a run, checkpoint or model folder. The run ends with WiSE-FT's curve between zero-shot and fine-tuned
weights where the model has a text tower.
"""

from pathlib import Path

from contrastive.distributed.launching import prepare_process
from contrastive.log import run_script

DEFAULTS = Path(__file__).resolve().parents[1] / "configs" / "finetune.yaml"


def main(args: list[str]) -> None:
    prepare_process()
    from contrastive.train.finetune import FinetuneConfig, finetune
    from contrastive.train.run import command

    if args and not args[0].startswith("-"):
        args = ["--init", *args]
    command(
        FinetuneConfig,
        finetune,
        args,
        prog="finetune.py MODEL",
        description="Fine-tune the image tower of MODEL, a run, checkpoint or model folder.",
        default_file=DEFAULTS,
    )


if __name__ == "__main__":
    run_script("finetune.py", main)
