"""One training sample: a picture, varied, and one of its captions, as a pure function of its position."""

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from contrastive.data.augment import AugmentConfig, augment
from contrastive.data.captions import caption_fault, caption_id
from contrastive.data.decode import decode
from contrastive.data.order import DRAWS, Order, philox
from contrastive.data.record import BadSample, Record, Source
from contrastive.data.tokenizer import Tokenizer
from contrastive.errors import UserError

MAX_ATTEMPTS = 100

Faults = list[tuple[str, str]]  # (reason, key) of each sample or caption that could not be used


class PairDataset(Dataset):
    """Image-text pairs by position (see Order), for `train_loader`.

    All draws (the caption, the crop, the flip, the stand-in for a bad sample) depend on (seed, position)
    alone, so neither workers nor ranks nor a restart change a sample.
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        tokenizer: Tokenizer,
        image_size: int,
        augment: AugmentConfig,
        seed: int,
    ):
        if len(source) != order.num_samples:
            raise ValueError(f"the order is for {order.num_samples} samples, the source has {len(source)}")
        self.source, self.order, self.tokenizer = source, order, tokenizer
        self.image_size, self.augment, self.seed = image_size, augment, seed

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Return the sample at `position`.

        image: uint8 (3, S, S). tokens: int64 (context_length,). caption_id, index: int, the hash of the
        caption and the place in the source. bad: (reason, key) of what was met and passed over.

        Raises:
            UserError: MAX_ATTEMPTS samples in a row were bad.
        """
        index, bad = self.order.index_of(position), []
        for attempt in range(MAX_ATTEMPTS):
            rng = np.random.Generator(philox(self.seed, position, DRAWS, attempt))
            if attempt:
                index = int(rng.random() * self.order.num_samples)
            try:
                return {**self._sample(index, rng, bad), "index": index, "bad": bad}
            except BadSample as fault:
                bad.append((fault.reason, fault.key))
        reason, key = bad[-1]
        raise UserError(
            f"{MAX_ATTEMPTS} samples in a row could not be used, the last for {reason} ('{key}'); "
            f"check the data in '{self.source.name}'"
        )

    def _sample(self, index: int, rng: np.random.Generator, bad: Faults) -> dict[str, Any]:
        record = self.source[index]
        caption = _draw_caption(record, rng, bad)
        try:
            image = decode(record.image, self.augment.min_side(self.image_size))
        except BadSample as fault:
            raise BadSample(fault.reason, record.key) from fault
        return {
            "image": augment(image, self.image_size, self.augment, rng),
            "tokens": self.tokenizer(caption)[0],
            "caption_id": caption_id(caption),
        }


def _draw_caption(record: Record, rng: np.random.Generator, bad: Faults) -> str:
    """Draw one caption; an unusable one is noted and the next one taken, so the image is not lost with it."""
    if not record.captions:
        raise BadSample("missing_caption", record.key)
    first = int(rng.random() * len(record.captions))
    usable = (c for c in record.captions[first:] + record.captions[:first] if caption_fault(c) is None)
    drawn, caption = record.captions[first], next(usable, None)
    if caption is None:
        raise BadSample(caption_fault(drawn), record.key)
    if caption is not drawn:
        bad.append((caption_fault(drawn), record.key))
    return caption
