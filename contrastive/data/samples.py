"""Training samples as a pure function of their position; a bad one is replaced, and told."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from contrastive.data.augment import AugmentConfig, augment
from contrastive.data.order import DRAWS, SampleOrder, philox
from contrastive.data.record import BadSample, Record, Source
from contrastive.errors import UserError

MAX_ATTEMPTS = 100

Faults = list[tuple[str, str]]  # (reason, key) of each sample or caption that could not be used


class SampleDataset(Dataset, ABC):
    """Samples by position (see SampleOrder), for `train_loader`. What a sample holds is up to the subclasses.

    All draws (of the variation of the image, of the stand-in for a bad sample) depend on (seed, position) alone,
    so neither workers nor ranks nor a restart change a sample.
    """

    def __init__(self, source: Source, order: SampleOrder, image_size: int, augment: AugmentConfig, seed: int):
        if len(source) != order.num_samples:
            raise ValueError(f"the order is for {order.num_samples} samples, the source has {len(source)}")
        self.source, self.order = source, order
        self.image_size, self.augment, self.seed = image_size, augment, seed

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Return the sample at `position`: what `sample` makes of it, and how it was come by.

        index: int, the place in the source. replaced: how many samples could not be used before this one.
        bad: (reason, key) of what was met and passed over.

        Raises:
            UserError: MAX_ATTEMPTS samples in a row were bad.
        """
        index, bad = self.order.index_of(position), []
        for attempt in range(MAX_ATTEMPTS):
            rng = np.random.Generator(philox(self.seed, position, DRAWS, attempt))
            if attempt:
                index = self.order.stand_in(position, rng.random(), attempt)
            try:
                return {**self.sample(self.source[index], rng, bad), "index": index, "replaced": attempt, "bad": bad}
            except BadSample as fault:
                bad.append((fault.reason, fault.key))
        reason, key = bad[-1]
        raise UserError(
            f"{MAX_ATTEMPTS} samples in a row could not be used, the last for {reason} ('{key}'); "
            f"check the data in '{self.source.name}'"
        )

    @abstractmethod
    def sample(self, record: Record, rng: np.random.Generator, bad: Faults) -> dict[str, Any]:
        """Return what the model needs of a record. BadSample where it cannot be used."""

    def varied_image(self, record: Record, rng: np.random.Generator) -> torch.Tensor:
        """Return a random variation of the record's image, uint8 (3, S, S). BadSample with the record's key."""
        try:
            return augment(record.image, self.image_size, self.augment, rng)
        except BadSample as fault:
            raise BadSample(fault.reason, record.key) from fault


class LabelledDataset(SampleDataset):
    """Images with the class they are of: image uint8 (3, S, S) and label, int in 0..num_classes-1."""

    def __init__(
        self,
        source: Source,
        order: SampleOrder,
        image_size: int,
        augment: AugmentConfig,
        seed: int,
        num_classes: int,
    ):
        super().__init__(source, order, image_size, augment, seed)
        self.num_classes = num_classes

    def sample(self, record: Record, rng: np.random.Generator, bad: Faults) -> dict[str, Any]:
        if record.label is None:
            raise BadSample("missing_label", record.key)
        if not 0 <= record.label < self.num_classes:
            raise BadSample("bad_label", record.key)
        return {"image": self.varied_image(record, rng), "label": record.label}
