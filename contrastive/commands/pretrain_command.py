"""Pretrain a CLIP or SigLIP model from image-text pairs, or from labelled images by prompts.

    contrastive pretrain --loss sigmoid
    contrastive pretrain --config flickr8k --data 'train-*.tar' --eval dev.tar
    accelerate launch -m contrastive pretrain --config cc3m --data 'cc3m/*.tar'
    contrastive pretrain --init_image runs/vit --lock image --data pairs.csv

All options can stand in the YAML file of --config under the same names; flags win over it.
"""

from contrastive.distributed.launching import prepare_process

SHOWN = "config data eval loss model objectives epochs batch_size lr workers device out resume init dry_run"


def main(args: list[str]) -> None:
    prepare_process()
    from contrastive.train.pretrain import PretrainConfig, pretrain
    from contrastive.train.run import command

    command(PretrainConfig, pretrain, args, name="pretrain", doc=__doc__, default_recipe="quickstart", shown=SHOWN)
