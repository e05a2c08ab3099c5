"""One training sample: a picture, varied, and one of its captions, as a pure function of its position."""

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from contrastive.data.augment import AugmentConfig, augment
from contrastive.data.captions import caption_fault, caption_id, drawn_order
from contrastive.data.order import DRAWS, SampleOrder, philox
from contrastive.data.record import BadSample, Record, Source
from contrastive.data.tokenizer import Tokenizer
from contrastive.errors import UserError

MAX_ATTEMPTS = 100

Faults = list[tuple[str, str]]  # (reason, key) of each sample or caption that could not be used


class PairDataset(Dataset):
    """Image-text pairs by position (see SampleOrder), for `train_loader`.

    All draws (the caption, its template, the variation of the image, the stand-in for a bad sample) depend on
    (seed, position) alone, so neither workers nor ranks nor a restart change a sample.

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
        if len(source) != order.num_samples:
            raise ValueError(f"the order is for {order.num_samples} samples, the source has {len(source)}")
        self.source, self.order, self.tokenizer = source, order, tokenizer
        self.image_size, self.augment, self.seed = image_size, augment, seed
        self.caption_templates = caption_templates

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Return the sample at `position`.

        image: uint8 (3, S, S). tokens: int64 (context_length,). caption_id, index: int, the hash of the
        text that is tokenized and the place in the source. replaced: how many samples could not be used
        before this one. bad: (reason, key) of what was met and passed over.

        Raises:
            UserError: MAX_ATTEMPTS samples in a row were bad.
        """
        index, bad = self.order.index_of(position), []
        for attempt in range(MAX_ATTEMPTS):
            rng = np.random.Generator(philox(self.seed, position, DRAWS, attempt))
            if attempt:
                index = self.order.stand_in(position, rng.random(), attempt)
            try:
                return {**self._sample(index, rng, bad), "index": index, "replaced": attempt, "bad": bad}
            except BadSample as fault:
                bad.append((fault.reason, fault.key))
        reason, key = bad[-1]
        raise UserError(
            f"{MAX_ATTEMPTS} samples in a row could not be used, the last for {reason} ('{key}'); "
            f"check the data in '{self.source.name}'"
        )

    def _sample(self, index: int, rng: np.random.Generator, bad: Faults) -> dict[str, Any]:
        record = self.source[index]
        caption = self._draw_caption(record, rng, bad)
        try:
            image = augment(record.image, self.image_size, self.augment, rng)
        except BadSample as fault:
            raise BadSample(fault.reason, record.key) from fault
        return {
            "image": image,
            "tokens": self.tokenizer.tokenize_clean([caption])[0],
            "caption_id": caption_id(caption),
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
