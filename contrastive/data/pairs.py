"""One training pair: a picture, varied, and one of its captions, as a pure function of its position."""

from typing import Any

import numpy as np

from contrastive.data.augment import AugmentConfig
from contrastive.data.captions import caption_fault, caption_id, drawn_order
from contrastive.data.order import SampleOrder
from contrastive.data.record import BadSample, Record, Source
from contrastive.data.samples import Faults, SampleDataset
from contrastive.data.tokenizer import Tokenizer


class PairDataset(SampleDataset):
    """Image-text pairs by position: image uint8 (3, S, S), tokens int64 (context_length,) and caption_id.

    caption_id is the hash of the text that is tokenized, or of the record's `caption_group`.

    Args:
        caption_templates: one is drawn and '{}' in it becomes the caption.
    """

    def __init__(
        self,
        source: Source,
        order: SampleOrder,
        tokenizer: Tokenizer,
        image_size: int,
        augment: AugmentConfig,
        seed: int,
        caption_templates: tuple[str, ...] = ("{}",),
    ):
        super().__init__(source, order, image_size, augment, seed)
        self.tokenizer = tokenizer
        self.caption_templates = caption_templates

    def sample(self, record: Record, rng: np.random.Generator, bad: Faults) -> dict[str, Any]:
        caption = self._draw_caption(record, rng, bad)
        return {
            "image": self.varied_image(record, rng),
            "tokens": self.tokenizer.tokenize_clean([caption])[0],
            "caption_id": caption_id(record.caption_group or caption),
        }

    def _draw_caption(self, record: Record, rng: np.random.Generator, bad: Faults) -> str:
        """Draw one caption, clean it and put it in a template.

        An unusable one is noted and the next one taken, so that the image is not lost with it.
        """
        faults = []
        for caption in drawn_order(record, rng.random()):
            fault = caption_fault(caption) or caption_fault(self.tokenizer.cleaned(caption))
            if fault is None:
                bad.extend((fault, record.key) for fault in faults[:1])
                return self.tokenizer.cleaned(self._draw_template(rng).replace("{}", caption))
            faults.append(fault)
        raise BadSample(faults[0], record.key)

    def _draw_template(self, rng: np.random.Generator) -> str:
        templates = self.caption_templates
        return templates[int(rng.random() * len(templates))] if len(templates) > 1 else templates[0]
