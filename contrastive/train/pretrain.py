"""Pretraining: open the data, settle what is open in the options, and run the contrastive task."""

from dataclasses import replace
from pathlib import Path

from contrastive.data.record import Source
from contrastive.data.sources import announce, open_source
from contrastive.data.tokenizer import Tokenizer, load_tokenizer
from contrastive.interop.bundle import Bundle
from contrastive.losses import NoLossConfig
from contrastive.train.contrastive_task import ContrastiveTask, PretrainConfig, check, resolve
from contrastive.train.options import given_options
from contrastive.train.run import open_run, run

CLIP_VOCABULARY = 49_408


def pretrain(config: PretrainConfig) -> bool:
    """Train as configured, under `accelerate launch` or alone.

    Returns:
        Whether the run reached its last step; False when a signal stopped it after saving.

    Raises:
        UserError: anything in the options, the data or the run folder that cannot work, before training.
    """
    checkpoint = open_run(config)
    check(config)
    start = None
    if config.init or config.init_image:
        from contrastive.train.given import copy_weights, starting_model

        start, config = starting_model(config, checkpoint)
    data = config.data
    columns = {"image_column": data.image_column, "caption_column": data.caption_column}
    columns |= {"classes": data.classes, "prompts": data.templates}
    source = open_source(data.train, **columns)
    announce(source, "data.train")
    held_out = [open_source(spec, **columns) for spec in data.eval]
    for other in held_out:
        announce(other, "data.eval")
    from contrastive.data.class_joining import check_classes

    # What the default file says, or a run that goes on, nobody has asked for.
    templates = data.templates if data.templates != "auto" and "data.templates" in given_options(config) else None
    check_classes([source, *held_out], {"data.classes": data.classes, "data.templates": templates})
    tokenizer = _tokenizer(config, source, checkpoint, start)
    config = resolve(config, source, tokenizer)
    kind = ContrastiveTask
    if isinstance(config.loss, NoLossConfig):
        from contrastive.train.image_task import ImageTask as kind
    task = kind(config, source, tokenizer, held_out)
    if start is not None and checkpoint is None:
        copy_weights(start, task.model, config)
    return run(task, checkpoint)


def _tokenizer(config: PretrainConfig, source: Source, checkpoint: Path | None, start: Bundle | None) -> Tokenizer:
    """The run's own tokenizer when it resumes, that of the model it starts from, else the one asked for."""
    length = config.model.text.context_length
    if checkpoint is not None:
        return load_tokenizer(checkpoint / "tokenizer", length)
    if config.init is not None:
        return start.tokenizer
    name = config.data.tokenizer
    if name == "auto":
        name = "clip" if config.model.text.vocab_size == CLIP_VOCABULARY else "bpe"
    return replace(config.data, tokenizer=name).make_tokenizer(source, length)
