"""Pretraining: open the data, settle what is open in the options, and run the contrastive task."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from contrastive.data.record import Source
from contrastive.data.sources import announce, open_source
from contrastive.data.tokenizer import Tokenizer, load_tokenizer
from contrastive.interop.bundle import Bundle
from contrastive.log import say
from contrastive.models import DualEncoder
from contrastive.train.contrastive_task import ContrastiveTask, PretrainConfig, check, resolve
from contrastive.train.options import ONLY_IN_TRAINING
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
        from contrastive.interop.loading import load
        from contrastive.train.given import check_brought, counts

        # A resumed run has these parts itself; the flags of its first command do not change them when given again.
        start = load(checkpoint or config.init or config.init_image)
        size = config.model.image.image_size
        flag = "init" if config.init else "init_image"
        if counts(config, "model.image.image_size", flag) and size != start.config.image.image_size:
            start.check_image_tower("a run starts from an image tower, or from both")
            start.model.image_tower.set_input_size(size)
            say(f"the positions of {start.path} are resampled for images of {size} pixels")
            start = replace(start, config=replace(start.config, image=start.model.image_tower.config))
        whole = _with_parts_of(start, config)
        check_brought(config, whole, flag)
        config = whole
    data = config.data
    columns = {"image_column": data.image_column, "caption_column": data.caption_column}
    columns |= {"classes": data.classes, "prompts": data.templates}
    source = open_source(data.train, **columns)
    announce(source, "data.train")
    held_out = [open_source(spec, **columns) for spec in data.eval]
    for other in held_out:
        announce(other, "data.eval")
    from contrastive.data.class_joining import check_classes

    templates = None if data.templates == "auto" else data.templates
    check_classes([source, *held_out], classes=data.classes, templates=templates)
    tokenizer = _tokenizer(config, source, checkpoint, start)
    config = resolve(config, source, tokenizer)
    task = ContrastiveTask(config, source, tokenizer, held_out)
    if start is not None and checkpoint is None:
        if config.init:
            _copy_weights(start.model, task.model)
        else:
            task.model.image_tower.load_state_dict(start.model.image_tower.state_dict())
        say(f"starting from {start.path}: its {'towers' if config.init else 'image tower'} and preprocessing")
    return run(task, checkpoint)


def _with_parts_of(start: Bundle, config: PretrainConfig) -> PretrainConfig:
    """Return the options with the architecture and preprocessing of the model that training starts from.

    What only training knows, dropout say, and whether the logits have a bias are the run's own.

    Raises:
        UserError: --init of a model without a text tower, a model without an image tower or its preprocessing.
    """
    start.check_image_tower("a run starts from an image tower, or from both")
    image = _trained_as(config.model.image, start.config.image)
    data = replace(config.data, preprocess=start.preprocess.config.options)
    if config.init is None:
        model = replace(config.model, image=image, embed_dim=start.model.config.embed_dim)
    else:
        start.check_text_tower("--init starts both towers; use --init_image")
        ours = start.tokenizer
        kind = "clip" if ours.kind == "clip" else "auto"
        data = replace(data, tokenizer=kind, vocab_size=ours.vocab_size, clean=ours.clean)
        has_bias = config.loss.initial_logits(2)[1] is not None
        model = replace(
            start.config,
            image=image,
            text=_trained_as(config.model.text, start.config.text),
            init_logit_bias=start.config.init_logit_bias if has_bias else None,
        )
    return replace(config, model=model, data=data)


def _trained_as(asked: Any, tower: Any) -> Any:
    """Return a tower's options with those of `asked` that matter in training alone."""
    return replace(tower, **{name: getattr(asked, name) for name in ONLY_IN_TRAINING if hasattr(asked, name)})


def _copy_weights(start: nn.Module, model: DualEncoder) -> None:
    """Copy the weights that both models have; the bias of the logits may be absent from either."""
    weights = start.state_dict()
    if model.logit_bias is None:
        weights.pop("logit_bias", None)
    else:
        weights.setdefault("logit_bias", model.logit_bias.detach())
    model.load_state_dict(weights)


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
