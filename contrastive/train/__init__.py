"""Training: pretraining on pairs, classifiers from scratch, fine-tuning; one loop, checkpoints, the run folder.

Imported from where they are: contrastive.train.pretrain, contrastive.train.classify, contrastive.train.finetune.
"""
