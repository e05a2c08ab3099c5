"""Labelled images of one size that fit in memory."""

import hashlib

import numpy as np

from contrastive.data.record import Record, Source, check_index


class ArrayImages(Source):
    """Images in one array, shared with forked workers.

    Args:
        name: the specification, for messages.
        images: uint8 (N, H, W) grey or (N, H, W, 3) RGB.
        labels: int64 (N,) in 0..C-1.
        class_names: C names.
    """

    def __init__(self, name: str, images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]):
        self.name, self.class_names = name, class_names
        images.flags.writeable = False  # a record's image is a view: nobody alters the data through it
        self._images, self._labels = images, labels
        digest = hashlib.blake2b(images, digest_size=8)
        digest.update(labels)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Record:
        label = self.label(index)
        image = self._images[index]
        if image.ndim == 2:
            image = np.repeat(image[:, :, None], 3, axis=2)
        return Record(key=f"{self.name}:{index}", image=image, label=label)

    def label(self, index: int) -> int:
        return int(self._labels[check_index(self, index)])
