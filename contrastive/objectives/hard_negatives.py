"""Captions that are nearly right, from a column of their own, as wrong ones for all images (NegCLIP)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from contrastive.data.captions import caption_fault
from contrastive.data.extras import DrawnSample, Extra
from contrastive.data.record import BadSample, Source, evenly_spread
from contrastive.data.sources import open_source
from contrastive.data.tokenizer import Tokenizer
from contrastive.distributed.collectives import all_gather_even, all_gather_with_grad
from contrastive.errors import UserError
from contrastive.losses import SigmoidLossConfig, SoftmaxLossConfig
from contrastive.models import Features
from contrastive.objectives.objective import MicroBatch, Objective, ObjectiveConfig, Setting, Tensors

ROWS = 1024  # of logits at a time, which are computed again for the gradient
_NONE = -1e9  # the logit of a text that is not there: no float32 sum of exponentials sees it


@dataclass(frozen=True)
class HardNegativesConfig(ObjectiveConfig):
    """Captions that are nearly right are wrong ones for every image of the batch; weight 1 is NegCLIP's."""

    NEEDS_DATA = "one caption more of each image"

    column: str | None = None
    """Where they are, as data.caption_column says it: a column, a field of KEY.json, a suffix. Of several of a sample
    one is drawn."""

    def build(self, setting: Setting) -> "HardNegatives":
        return HardNegatives(self, setting)


class NegativeTokens(Extra):
    """'tokens' (L,) int64 of one negative of the sample, in a template as captions are; 'present': whether it has any.

    What is no caption, or one of the sample's own, is none. A sample without is counted as 'missing_negative'.
    """

    def __init__(self, name: str, first_step: int, source: Source, tokenizer: Tokenizer, templates: tuple[str, ...]):
        super().__init__(name, first_step)
        self.source, self.tokenizer, self.templates = source, tokenizer, templates

    def of(self, sample: DrawnSample) -> dict[str, Any]:
        found = self.usable(sample.index, sample.record.captions)
        if not found:
            sample.bad.append(("missing_negative", sample.record.key))
            return {"tokens": self.tokenizer([""])[0], "present": False}
        text, template = (some[int(sample.rng.random() * len(some))] for some in (found, self.templates))
        return {"tokens": self.tokenizer([template.replace("{}", text)])[0], "present": True}

    def usable(self, index: int, captions: tuple[str, ...]) -> list[str]:
        own = set(map(self.tokenizer.cleaned, captions))
        cleaned = ((text, self.tokenizer.cleaned(text)) for text in self.source.captions(index))
        return [text for text, clean in cleaned if not (caption_fault(text) or caption_fault(clean) or clean in own)]


class HardNegatives(Objective):
    """See `HardNegativesConfig`: what the run's own loss grows by, see `added_by_negatives`."""

    options: HardNegativesConfig

    def __init__(self, options: HardNegativesConfig, setting: Setting):
        super().__init__(options, setting)
        option = f"objectives.{setting.name}"
        if not options.column:
            raise UserError(f"{option} has no negatives: say where they are with --{option}.column")
        if not isinstance(setting.loss, SigmoidLossConfig | SoftmaxLossConfig) or setting.loss.duplicates == "ignore":
            raise UserError(f"{option} is for --loss sigmoid and softmax, and not for loss.duplicates ignore")
        self.all_captions = setting.all_captions
        negatives = _open(f"{option}.column", options.column, setting)
        templates = setting.caption_templates
        self.extra = NegativeTokens(self.name, self.first_step, negatives, setting.tokenizer, templates)
        self.looked = self._look(setting.source)
        if not any(self.looked):
            raise UserError(f"{option}.column {options.column}: none of {len(self.looked)} samples has one there")

    def _look(self, source: Source) -> list[bool]:
        """Whether each of at most 100 samples has one."""
        found = []
        for index in evenly_spread(len(source)):
            try:
                found.append(bool(self.extra.usable(index, source.captions(index))))
            except BadSample:
                found.append(False)
        return found

    def targets(self, part: MicroBatch, inputs: Tensors) -> dict[str, torch.Tensor]:
        return {"present": inputs["present"]}

    def features(self, part: MicroBatch, inputs: Tensors) -> dict[str, torch.Tensor]:
        return {"negative": part.model.encode_text(inputs["tokens"])}

    def loss_of_batch(self, features: Features, more: Tensors, targets: Tensors) -> torch.Tensor:
        text = features.text
        texts = [text] if text.ndim == 2 else [text.flatten(0, 1)] if self.all_captions else text.unbind(1)
        if features.logit_bias is not None:
            texts = texts[:1]  # which have no part in it
        negatives = more["negative"], targets["present"], *features[2:]
        return sum(added_by_negatives(features.image, one, *negatives) for one in texts) / len(texts)

    def describe(self) -> str:
        return f"from '{self.options.column}', which {sum(self.looked)} of {len(self.looked)} samples have, "


def _open(option: str, column: str, setting: Setting) -> Source:
    """The run's data once more, with this column for captions."""
    source = open_source(setting.source.name, image_column=setting.image_column, caption_column=column)
    for part in source.parts:
        if "caption_column" not in part.columns_read or part.prompted:
            raise UserError(f"{option} {column}: {part.name} has no texts to choose from")
    if len(source) != len(setting.source):
        raise UserError(
            f"{option} {column}: read with it the data are {len(source):,} samples, not {len(setting.source):,}"
        )
    return source


def added_by_negatives(
    image: torch.Tensor,
    text: torch.Tensor,
    negative: torch.Tensor,
    present: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what a loss over (image, text) grows by, a scalar, when each image has the negatives of all as well.

    Of the sigmoid loss, where there is a bias, −log σ(−z) of each image with each negative. Of the softmax loss half of
    softplus(lse(negatives) − lse(texts)) of each image: the negatives in the denominator from images to texts alone.
    Averaged over ranks it is that of the global batch. Memory is linear in it.

    Args:
        image: (b, E), unit length. text: (n, E), those that a row's denominator has on this rank; as many on each.
        negative: (b, E), one of each image. present: bool (b,), whether there is one.
    """
    with torch.autocast(image.device.type, enabled=False):
        kind = torch.promote_types(image.dtype, torch.float32)
        negatives, absent = all_gather_with_grad(negative.to(kind)), ~all_gather_even(present)
        texts = all_gather_with_grad(text.to(kind)) if logit_bias is None else None
        shared = negatives, absent, texts, logit_scale, logit_bias
        rows = [checkpoint(_of_rows, part, *shared, use_reentrant=False) for part in image.to(kind).split(ROWS)]
    return torch.cat(rows).mean()


def _of_rows(image, negatives, absent, texts, scale, bias):
    logits = scale * image @ negatives.T
    if bias is not None:
        return -F.logsigmoid(-(logits + bias).masked_fill(absent, _NONE)).sum(dim=1)
    lse = logits.masked_fill(absent, _NONE).logsumexp(dim=1)
    return -F.logsigmoid((scale * image @ texts.T).logsumexp(dim=1) - lse) / 2
