"""More of a training sample than its image and text, for what a run learns beside them.

It is made where samples are, in the loader's workers, as a pure function of (seed, position) like all else.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from contrastive.data.augment import AugmentConfig, augment
from contrastive.data.record import Record

_FIRST_STREAM = 2**32  # above those of data/order.py


@dataclass(frozen=True)
class DrawnSample:
    """A sample whose image and captions have been drawn."""

    record: Record
    index: int
    """Its place in the source."""
    captions: tuple[str, ...]
    """Those that were tokenized, K of them in their templates, before any tokenizer cleans them; none of labelled
    images."""
    rng: np.random.Generator
    """Draws of this extra alone."""
    image_size: int
    """S of the image, in pixels; of a native one its NativeSize."""
    view: Callable[[int], torch.Tensor]
    """S to uint8 (3, S, S): the image as it was varied for the model, at any size."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    """(reason, key) of what was met and passed over, which is counted."""


class Extra:
    """What one objective needs of each sample; in the batch under 'NAME.KEY'. Instances are sent to workers.

    Args:
        name: the objective's. first_step: nothing is made before it.
    """

    def __init__(self, name: str, first_step: int):
        self.name, self.first_step = name, first_step
        digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
        self.stream = _FIRST_STREAM + int.from_bytes(digest)

    def draws(self, index: int, rng: np.random.Generator) -> np.random.Generator | None:
        """Return whose draws the image of sample `index` is varied by, instead of its own; None: its own.

        Only what knows the image beforehand, stored teachers, has them.
        """
        return None

    def of(self, sample: DrawnSample) -> dict[str, Any]:
        """Return numbers, arrays or tensors by key, of the same shapes for all samples of a step.

        Raises:
            BadSample: the sample cannot be used; another one takes its place.
        """
        return {}


class Crops(Extra):
    """Further views of the image: 'views', uint8 (count, 3, s, s), varied by options of their own.

    Args:
        sizes: s in pixels by the image's size, which a curriculum changes; none: s is that.
    """

    def __init__(
        self, name: str, first_step: int, count: int, options: AugmentConfig, sizes: Mapping[int, int] | None = None
    ):
        super().__init__(name, first_step)
        self.count, self.options, self.sizes = count, options, sizes

    def of(self, sample: DrawnSample) -> dict[str, Any]:
        size = sample.image_size if self.sizes is None else self.sizes[sample.image_size]
        return {
            "views": torch.stack(
                [augment(sample.record.image, size, self.options, sample.rng) for _ in range(self.count)]
            )
        }


class WhichImage(Extra):
    """'image', int: the sample's place in its source."""

    def of(self, sample: DrawnSample) -> dict[str, Any]:
        return {**super().of(sample), "image": sample.index}


class DrawnPlaces(Extra):
    """'places', int64 (M,): a share of the image's patches drawn at random, rising, as many of each image."""

    def __init__(self, name: str, first_step: int, share: float, patch_size: int):
        super().__init__(name, first_step)
        self.share, self.patch_size = share, patch_size

    def of(self, sample: DrawnSample) -> dict[str, Any]:
        patches = (sample.image_size // self.patch_size) ** 2
        drawn = sample.rng.random(patches).argsort(kind="stable")
        return {"places": np.sort(drawn[: max(1, round(self.share * patches))])}
