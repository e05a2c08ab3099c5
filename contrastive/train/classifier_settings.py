"""The options of supervised runs: a ViT classifier from scratch, and the fine-tuning of a pretrained tower."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from contrastive.config import preset
from contrastive.data.decode import decode
from contrastive.data.record import BadSample, Source
from contrastive.data.settings import LabelledDataConfig
from contrastive.errors import UserError
from contrastive.models import ClassifierConfig, ImageTowerConfig, classifier_config, list_classifiers
from contrastive.train.options import RunConfig, check_above_zero, check_run, check_shares

SMALL = 64  # pixels: images up to this size are taken as they are
PATCHES_PER_SIDE = 8  # of those
PROBED = 16


@dataclass(frozen=True)
class SupervisedConfig(RunConfig):
    """What both kinds of supervised runs can be told."""

    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution; 0: no mixup."""
    cutmix: float = 0.0
    """Alpha of CutMix's; with mixup too, one of them is drawn for each batch."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes."""


@dataclass(frozen=True)
class TrainClassifierConfig(SupervisedConfig):
    """Everything a classifier trained from scratch can be told."""

    model: ClassifierConfig = preset(classifier_config, tuple(list_classifiers()), lambda: classifier_config("tiny"))
    image_size: int | None = None
    """Pixels a side; none: that of images of at most 64 pixels, else model.image.image_size."""
    patch_size: int | None = None
    """Pixels of a patch's side; none: an eighth of such small images, else model.image.patch_size."""


@dataclass(frozen=True)
class WiseFTConfig:
    """Interpolation of the zero-shot and the fine-tuned weights (WiSE-FT, Wortsman et al. 2022)."""

    alphas: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Shares of the fine-tuned weights that are scored when the run ends."""
    eval: tuple[str, ...] = ()
    """Other labelled data, scored zero-shot by the interpolated tower: what fine-tuning may have forgotten."""
    save: float = 1.0
    """Share of the fine-tuned weights in the model that is saved; 0.5 is usual."""


@dataclass(frozen=True)
class FinetuneConfig(SupervisedConfig):
    """Everything a fine-tuning can be told."""

    init: str = ""
    """The pretrained model: a run, checkpoint or model folder."""
    init_key: str | None = None
    """Hash of its weights, which a resumed run compares; filled in when the run starts."""
    head: Literal["auto", "zero_shot", "zeros"] = "auto"
    """How the linear head starts: from the text embeddings of prompts, or at zero. auto: from prompts, where the model
    has a text tower and the data class names."""
    templates: str = "auto"
    """Prompt templates of that head: a set's name, a file with one template a line, or auto."""
    tune: Literal["all", "head"] = "all"
    """head: the image tower stays as it is."""
    dropout: float = 0.0
    """Dropout probability in the image tower."""
    wise_ft: WiseFTConfig = field(default_factory=WiseFTConfig)


def check_supervised(config: SupervisedConfig, image: ImageTowerConfig) -> None:
    """Raise UserError for options that no data can make right."""
    check_shares({"label_smoothing": config.label_smoothing})
    for name, value in (("mixup", config.mixup), ("cutmix", config.cutmix)):
        if not value >= 0:
            raise UserError(f"{name} is {value}; it must be 0 (off) or above")
    if (config.mixup or config.cutmix) and config.train.global_batch_size < 2:
        raise UserError("mixup and cutmix mix the images of a batch: train.global_batch_size must be above 1")
    check_run(config, config.data, image)


def check_wise_ft(config: WiseFTConfig) -> None:
    """Raise UserError for a share that is not one."""
    for name, values in (("wise_ft.alphas", config.alphas), ("wise_ft.save", (config.save,))):
        if not all(0 <= value <= 1 for value in values):
            raise UserError(f"{name} is {' '.join(map(str, values))}; each must be from 0 to 1")


def fit_image(config: TrainClassifierConfig, source: Source) -> ClassifierConfig:
    """Return the model with the image and patch size that were asked for, or that fit small images.

    Raises:
        UserError: a size that is not above 0, or not a multiple of the patch size.
    """
    check_above_zero({"image_size": config.image_size, "patch_size": config.patch_size})
    image = config.model.image
    sizes: dict[str, Any] = {}
    untouched = image.image_size == ImageTowerConfig.image_size
    side = _longest_side(source) if untouched and config.image_size is None else None
    if side is not None and side <= SMALL:
        patch = config.patch_size or max(1, round(side / PATCHES_PER_SIDE))
        sizes = {"image_size": -(-side // patch) * patch, "patch_size": patch}
    else:
        given = {"image_size": config.image_size, "patch_size": config.patch_size}
        sizes = {name: value for name, value in given.items() if value is not None}
    image = replace(image, **sizes)
    image.check()
    return replace(config.model, image=image)


def _longest_side(source: Source) -> int | None:
    """Return the longest side of the first images, or None where none can be read."""
    sides = []
    for index in range(min(PROBED, len(source))):
        try:
            sides.append(max(decode(source[index].image).shape[1:]))
        except BadSample:
            continue
    return max(sides, default=None)


def num_classes(source: Source, asked: int | None) -> int:
    """Return how many classes there are.

    Raises:
        UserError: neither the data nor the options say so, or they differ.
    """
    names = source.class_names
    if names is None:
        if asked is None:
            raise UserError(
                f"{source.name} has no class names: put a classnames.txt beside the data (from scratch, "
                "--model.num_classes will do)"
            )
        if asked < 2:
            raise UserError(f"model.num_classes is {asked}; a classifier needs two at least")
        return asked
    if asked not in (None, len(names)):
        raise UserError(f"model.num_classes is {asked}, but {source.name} has {len(names)} classes; leave it out")
    if len(names) < 2:
        raise UserError(f"{source.name} has one class only; a classifier needs two")
    return len(names)
