"""Fine-tune the image tower of a pretrained model on labelled images.

    contrastive finetune runs/mine --data flowers/train --eval flowers/test
    contrastive finetune runs/mine --data cifar10 --tune head
    accelerate launch -m contrastive finetune hf-hub:ORG/NAME --data pets

MODEL, which --init names too, is a run, checkpoint or model folder, or hf-hub:ORG/NAME. The run ends with WiSE-FT's
curve between zero-shot and fine-tuned weights where the model has a text tower.
"""

from contrastive.distributed.launching import prepare_process

SHOWN = "init data eval tune head config epochs batch_size lr workers device out resume dry_run"


def main(args: list[str]) -> None:
    prepare_process()
    from contrastive.train.finetune import FinetuneConfig, finetune
    from contrastive.train.run import command

    if args and not args[0].startswith("-"):
        args = ["--init", *args]
    command(FinetuneConfig, finetune, args, name="finetune", doc=__doc__, default_recipe="finetune", shown=SHOWN)
