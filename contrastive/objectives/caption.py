"""Captions told from patches: a decoder beside the model, causal or in parallel (CapPa, LocCa, SigLIP 2).

b samples of a micro-batch, K captions of each, L tokens of a caption.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from contrastive.data.extras import DrawnSample, Extra
from contrastive.data.tokenizer import Tokenizer
from contrastive.models.caption_decoder import CaptionDecoder, CaptionDecoderConfig
from contrastive.objectives.objective import MicroBatch, Objective, ObjectiveConfig, Setting, Tensors
from contrastive.option_types import Probability, Share


@dataclass(frozen=True)
class CaptionConfig(ObjectiveConfig, CaptionDecoderConfig):
    """A decoder tells the caption from the patches. By default as SigLIP 2; CapPa has parallel_share 0.75."""

    parallel_share: Share[float] = 0.5
    """Share of the captions that are told all at once, from mask tokens; the others token by token."""
    hidden_share: Probability[float] = 0.0
    """Share of the tokens of the others that those after them do not see: a decoder that knows what is usually said
    looks at the image less (Bowman et al. 2016, "word dropout")."""

    def build(self, setting: Setting) -> "Caption":
        return Caption(self.like(setting.model.text), setting)


class CaptionRows(Extra):
    """The captions as the decoder tells them, tokens that the text tower is spared included, and in which way.

    'ids' (K, L) int64, 'parallel' (K,) bool; 'hidden' (K, L) bool, where a share is hidden.
    """

    def __init__(
        self, name: str, first_step: int, tokenizer: Tokenizer, parallel_share: float, hidden_share: float = 0.0
    ):
        super().__init__(name, first_step)
        self.tokenizer, self.parallel_share, self.hidden_share = tokenizer, parallel_share, hidden_share

    def of(self, sample: DrawnSample) -> dict[str, Any]:
        parallel = sample.rng.random(len(sample.captions)) < self.parallel_share
        ids = self.tokenizer.tokenize_clean(list(sample.captions))
        hidden = {"hidden": sample.rng.random(tuple(ids.shape)) < self.hidden_share} if self.hidden_share else {}
        return {"ids": ids, "parallel": np.asarray(parallel), **hidden}


class Caption(Objective):
    """See `CaptionConfig`; the decoder is `decoder`."""

    options: CaptionConfig
    reads = "patches"

    def __init__(self, options: CaptionConfig, setting: Setting):
        super().__init__(options, setting)
        self.decoder = decoder_for(options, setting.model.image.width, setting.tokenizer, setting.model.init)
        self.extra = CaptionRows(
            self.name, self.first_step, setting.tokenizer, options.parallel_share, options.hidden_share
        )

    def inputs(self, batch: dict[str, Any], extras: Tensors) -> dict[str, torch.Tensor]:
        ids = self.decoder.ids(extras["ids"].flatten(0, 1))
        rows = {"ids": ids, "weights": self.decoder.weights(ids)}
        if "hidden" in extras:
            rows["hidden"] = self.decoder.ids(extras["hidden"].flatten(0, 1))
        each = {name: rows.unflatten(0, extras["parallel"].shape) for name, rows in rows.items()}
        return {**each, "parallel": extras["parallel"]}

    def loss(self, part: MicroBatch, inputs: Tensors, targets: Tensors) -> torch.Tensor:
        rows = {name: rows.flatten(0, 1) for name, rows in inputs.items()}
        return self.decoder.loss(part.patches, **rows, own=part.own_tokens)

    def describe(self) -> str:
        options = self.options
        size = f"width {options.width}, depth {options.depth}"
        return f"decoder of {size}, {options.parallel_share:.0%} of captions in parallel, "


def decoder_for(options: CaptionDecoderConfig, image_width: int, tokenizer: Tokenizer, init="siglip") -> CaptionDecoder:
    """Return a decoder for captions of this tokenizer, with fresh weights."""
    names = ("vocab_size", "context_length", "eos_id", "bos_id")
    return CaptionDecoder(options, image_width, **{name: getattr(tokenizer, name) for name in names}, init=init)
