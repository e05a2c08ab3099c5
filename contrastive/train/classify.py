"""Supervised runs: train a ViT classifier from scratch, or fine-tune a pretrained image tower."""

from dataclasses import replace
from typing import TypeVar

import torch

from contrastive.data.prompts import default_templates, load_templates
from contrastive.data.record import BadSample, Source
from contrastive.data.sources import open_source
from contrastive.data.sources.held_out import held_out_spec
from contrastive.data.subset import labelled_share
from contrastive.errors import UserError
from contrastive.evaluate.classification import check_same_classes
from contrastive.evaluate.embeddings import pick_indices
from contrastive.evaluate.zero_shot import zero_shot_classifier
from contrastive.interop.bundle import Absent, Bundle, weights_key
from contrastive.interop.loading import load
from contrastive.log import say
from contrastive.models import ClassifierConfig, ImageClassifier
from contrastive.train.classification_task import ClassificationTask
from contrastive.train.classifier_settings import (
    FinetuneConfig,
    SupervisedConfig,
    TrainClassifierConfig,
    check_supervised,
    check_wise_ft,
    fit_image,
    num_classes,
)
from contrastive.train.options import check_shares, resolve_run
from contrastive.train.parameters import show_parameters
from contrastive.train.run import open_run, run
from contrastive.train.wise_ft import WiseFT

PROBED = 100  # held-out samples looked at for labels

C = TypeVar("C", bound=SupervisedConfig)


def train_classifier(config: TrainClassifierConfig) -> bool:
    """Train a classifier from scratch as configured, under `accelerate launch` or alone.

    Returns:
        Whether the run reached its last step; False when a signal stopped it after saving.

    Raises:
        UserError: anything in the options, the data or the run folder that cannot work, before training.
    """
    check_supervised(config, config.model.image)
    folder, checkpoint = open_run(config)
    source, held_out, config = _open_data(config)
    model_config = fit_image(config, source)
    model_config = replace(model_config, num_classes=num_classes(source, config.model.num_classes))
    image = model_config.image
    config = replace(config, model=model_config, image_size=image.image_size, patch_size=image.patch_size)
    config = replace(config, **resolve_run(config, source))
    torch.manual_seed(config.train.seed)
    model = ImageClassifier(model_config)
    show_parameters(model)
    return run(config, config.data, folder, checkpoint, source, ClassificationTask(config, model, source, held_out))


def finetune(config: FinetuneConfig) -> bool:
    """Fine-tune the image tower of `config.init` on labelled data; otherwise as `train_classifier`.

    Where the head starts from prompts, the run ends with WiSE-FT's curve: `wise_ft.json`, `wise_ft.png`, and the
    dual encoder with the tuned image tower in `encoder/`.
    """
    if not config.init:
        raise UserError("no model to fine-tune: finetune.py MODEL --data SPEC")
    bundle = load(config.init)
    bundle.check_image_tower("there is nothing to fine-tune")
    check_supervised(config, bundle.config.image)
    check_shares({"dropout": config.dropout})
    check_wise_ft(config.wise_ft)
    folder, checkpoint = open_run(config)
    key = weights_key(bundle.model)
    if checkpoint is not None and config.init_key not in (None, key):
        raise UserError(
            f"{bundle.path} is not the model that {folder.path} started from: its weights have changed; put the old "
            "ones back, or start again with another --run_folder"
        )
    config = replace(config, init_key=key)
    source, held_out, config = _open_data(config)
    data = config.data.seen_as(bundle.preprocess.config)
    config = replace(config, data=data, head=_kind_of_head(config, bundle, source), **resolve_run(config, source))
    torch.manual_seed(config.train.seed)
    model = _classifier_from(bundle, config, source)
    if config.tune == "head":
        model.image_tower.requires_grad_(False).eval()
    if config.head == "zero_shot":
        others = [open_source(spec) for spec in config.wise_ft.eval]
        for other in others:
            _check_named(other, "wise_ft.eval")
        task = WiseFT(config, model, source, held_out, bundle, others)
    else:
        wise_ft = config.wise_ft
        for name, value, unused in (("save", wise_ft.save, 1), ("eval", " ".join(wise_ft.eval), "")):
            if value != unused:
                raise UserError(
                    f"wise_ft.{name} is {value}, which needs a head that starts from prompts; this one starts from "
                    "zeros: leave it out"
                )
        task = ClassificationTask(config, model, source, held_out)
    say(f"starting from {bundle.path}; the head starts from {'prompts' if config.head == 'zero_shot' else 'zeros'}")
    return run(config, config.data, folder, checkpoint, source, task)


def _open_data(config: C) -> tuple[Source, list[Source], C]:
    """Open training and held-out data; the options come back with the held-out data that was found."""
    data = config.data
    source = open_source(data.train, image_column=data.image_column)
    found = held_out_spec(data.train) if not data.eval else None
    config = replace(config, data=replace(data, eval=data.eval or ((found,) if found else ())))
    held_out = [open_source(spec, image_column=data.image_column) for spec in config.data.eval]
    for other in held_out:
        check_same_classes(source.class_names, source.name, other)
        if not _labelled(other):
            raise UserError(f"data.eval {other.name} has no class labels; classifiers are scored on labelled images")
    if data.share != 1:
        source = labelled_share(source, data.share)
    return source, held_out, config


def _labelled(source: Source) -> bool:
    """Whether one of some samples, spread over the source, has a label."""
    for index in pick_indices(len(source), PROBED).tolist():
        try:
            if source.label(index) is not None:
                return True
        except BadSample:
            continue
    return False


def _kind_of_head(config: FinetuneConfig, bundle: Bundle, source: Source) -> str:
    has_text = bundle.tokenizer is not None and not isinstance(bundle.tokenizer, Absent)
    possible = has_text and source.class_names is not None
    if config.head == "auto":
        return "zero_shot" if possible else "zeros"
    if config.head == "zero_shot":
        bundle.check_text_tower("--head zero_shot needs one; use --head zeros")
        _check_named(source, "--head zero_shot")
    return config.head


def _check_named(source: Source, needs: str) -> None:
    if source.class_names is None:
        raise UserError(f"{needs} needs class names, which {source.name} has not: put a classnames.txt beside the data")


def _classifier_from(bundle: Bundle, config: FinetuneConfig, source: Source) -> ImageClassifier:
    """Return a classifier with the bundle's image tower and a head made from prompts or of zeros."""
    from_prompts = config.head == "zero_shot"
    image = replace(bundle.config.image, dropout=config.dropout, patch_dropout=0.0)
    classes = num_classes(source, None)
    model = ImageClassifier(ClassifierConfig(image, bundle.model.config.embed_dim, classes, unit_features=from_prompts))
    model.image_tower.load_state_dict(bundle.model.image_tower.state_dict())
    if from_prompts:
        templates = default_templates(source) if config.templates == "auto" else load_templates(config.templates)
        names = source.class_names
        rows = zero_shot_classifier(bundle.model, bundle.tokenizer, names, templates, device="cpu")
        with torch.no_grad():
            # The scale makes cosines the logits that training saw; a bias would be the same for all classes.
            model.head.weight.copy_(rows * bundle.model.logit_scale.exp())
    return model
