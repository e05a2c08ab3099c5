"""Train a plain ViT classifier from scratch on labelled images.

    contrastive classifier --model base --num_epochs 10 --batch_size 32
    contrastive classifier --model tiny --data mnist --epochs 10 --batch-size 128
    accelerate launch -m contrastive classifier --config classifier-cifar10

All options can stand in the YAML file of --config under the same names; flags win over it.
"""

from contrastive.distributed.launching import prepare_process

SHOWN = "config data eval model epochs batch_size lr workers device out resume dry_run"


def main(args: list[str]) -> None:
    prepare_process()
    from contrastive.train.classify import TrainClassifierConfig, train_classifier
    from contrastive.train.run import command

    recipe, shown = "classifier", SHOWN
    command(TrainClassifierConfig, train_classifier, args, name=recipe, doc=__doc__, default_recipe=recipe, shown=shown)
