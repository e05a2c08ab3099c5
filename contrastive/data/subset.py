"""A share of a labelled source: as if only so many of its images had been labelled."""

import hashlib

import numpy as np

from contrastive.data.record import BadSample, Record, Source, Wrapped, check_index
from contrastive.data.sources.mixture import Mixture
from contrastive.errors import UserError


class LabelledSubset(Wrapped):
    """A fixed random share of each class of `source`, at least one sample of each.

    Args:
        share: above 0, at most 1. A smaller share is part of a larger one.

    Samples without a label, or whose label cannot be read, are left out.

    Raises:
        UserError: a share that is none, or no label in the source.
    """

    def __init__(self, source: Source, share: float):
        if not 0 < share <= 1:
            raise UserError(f"data.share is {share}; it must be above 0 and at most 1")
        super().__init__(source)
        self.share = share
        self.name = f"{source.name} ({100 * share:g} %)"
        self._indices = _pick(source, share)
        if source.shard_sizes is not None:
            # The shards keep their numbers, by which the order asks for them, with fewer samples in each or none.
            ends = np.searchsorted(self._indices, np.cumsum(source.shard_sizes))
            self.shard_sizes = np.diff(ends, prepend=0)
        identity = source.fingerprint.encode() + self._indices.tobytes()
        self.fingerprint = hashlib.blake2b(identity, digest_size=8).hexdigest()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self.source[self._place(index)]

    def captions(self, index: int) -> tuple[str, ...]:
        return self.source.captions(self._place(index))

    def label(self, index: int) -> int | None:
        return self.source.label(self._place(index))

    @property
    def stored(self) -> Source:
        return LabelledSubset(self.source.stored, self.share) if self.prompted else self

    def _place(self, index: int) -> int:
        return int(self._indices[check_index(self, index)])


def labelled_share(source: Source, share: float) -> Source:
    """Return the share of a source as above; of a mixture, that of each part, so that the weights stay."""
    if len(source.parts) > 1:
        parts = [LabelledSubset(part, share) for part in source.parts]
        return Mixture(f"{source.name} ({100 * share:g} %)", parts, source.weights)
    return LabelledSubset(source, share)


def _pick(source: Source, share: float) -> np.ndarray:
    labels = np.full(len(source), -1, dtype=np.int64)
    for index in range(len(source)):
        try:
            label = source.label(index)
        except BadSample:
            continue
        labels[index] = -1 if label is None else label
    rng, chosen = np.random.default_rng(0), []
    for label in np.unique(labels[labels >= 0]):
        own = rng.permutation(np.flatnonzero(labels == label))
        chosen.append(own[: max(1, round(share * len(own)))])
    if not chosen:
        raise UserError(f"{source.name} has no labels to take a share of")
    return np.sort(np.concatenate(chosen))
