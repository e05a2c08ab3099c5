"""Some of the samples of a source: a share of each class, or those that `contrastive curate` kept."""

import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from contrastive.config import from_dict
from contrastive.data.record import BadSample, Record, Source, Wrapped, check_index, fingerprint_of
from contrastive.data.sources.derived import Mixture
from contrastive.errors import UserError, reason_of
from contrastive.files import read_json, write_json, write_whole

# A folder says which samples of a data source are kept:
#   kept.json   the data source, its fingerprint and number of samples, how many are kept
#   kept.npy    the kept samples, by their places in the source: int64, rising
KEPT, INDICES = "kept.json", "kept.npy"
FORMAT = "contrastive-kept-1"


class Subset(Wrapped):
    """Some samples of `source`, in its order.

    Args:
        indices: of the samples, rising int64 (n,).
        name: for messages.
    """

    def __init__(self, source: Source, indices: np.ndarray, name: str):
        super().__init__(source)
        self.name, self._indices = name, indices
        identity = source.fingerprint.encode() + indices.tobytes()
        if source.shard_sizes is not None:
            # The shards keep their numbers, by which the order asks for them, with fewer samples in each or none.
            ends = np.searchsorted(indices, np.cumsum(source.shard_sizes))
            self.shard_sizes = np.diff(ends, prepend=0)
            # They decide the order within a window: a run begun when a share had no shards is not to go on with them.
            identity += self.shard_sizes.tobytes()
        self.fingerprint = fingerprint_of(identity)

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
        return Subset(self.source.stored, self._indices, self.name) if self.prompted else self

    def _place(self, index: int) -> int:
        return int(self._indices[check_index(self, index)])


def labelled_share(source: Source, share: float) -> Source:
    """Return a fixed random share of each class of `source`, at least one sample of each; of a mixture, of each part.

    Samples without a label, or whose label cannot be read, are left out. A smaller share is part of a larger one.

    Args:
        share: above 0, at most 1.

    Raises:
        UserError: a share that is none, or no label in the source.
    """
    if not 0 < share <= 1:
        raise UserError(f"data.share is {share}; it must be above 0 and at most 1")
    name = f"{source.name} ({100 * share:g} %)"
    if len(source.parts) > 1:
        return Mixture(name, [labelled_share(part, share) for part in source.parts], source.weights)
    return Subset(source, _pick(source, share), name)


def _pick(source: Source, share: float) -> np.ndarray:
    labels = np.full(len(source), -1, dtype=np.int64)
    for index in range(len(source)):
        with suppress(BadSample):
            label = source.label(index)
            labels[index] = -1 if label is None else label
    rng, chosen = np.random.default_rng(0), []
    for label in np.unique(labels[labels >= 0]):
        own = rng.permutation(np.flatnonzero(labels == label))
        chosen.append(own[: max(1, round(share * len(own)))])
    if not chosen:
        raise UserError(f"{source.name} has no labels to take a share of")
    return np.sort(np.concatenate(chosen))


@dataclass(frozen=True)
class KeptData:
    """What kept.json says."""

    format: str
    data: str
    """As `open_source` reads it; a path is absolute."""
    image_column: str | None
    caption_column: str | None
    fingerprint: str
    num_samples: int
    kept: int


def is_kept(folder: str | Path) -> bool:
    """Whether there is such a folder."""
    return os.path.isfile(os.path.join(os.path.expanduser(folder), KEPT))


def read_kept(folder: str | Path) -> KeptData:
    """Read its kept.json.

    Raises:
        UserError: it is damaged, of another version, or names itself as its data, be it by way of others.
    """
    said, seen, place = _read(folder), {_path(folder)}, folder
    while is_kept(place := _read(place).data):
        if _path(place) in seen:
            raise UserError(f"{_path(folder)}: what it is kept of is kept of itself; curate again")
        seen.add(_path(place))
    return said


def _path(folder: str | Path) -> Path:
    return Path(folder).expanduser().resolve() / KEPT


def _read(folder: str | Path) -> KeptData:
    path = _path(folder)
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise UserError(f"{path} is of format {content.get('format')!r}, this version reads '{FORMAT}'; curate again")
    try:
        said = from_dict(KeptData, content, str(path))
    except TypeError as error:
        raise UserError(f"{path} is damaged ({reason_of(error)}); curate again") from None
    if not said.data or "\0" in said.data:
        raise UserError(f"{path} is damaged (it names no data); curate again")
    return said


def kept_subset(folder: str | Path, said: KeptData, whole: Source) -> Subset:
    """Return the kept samples of the source that kept.json names.

    Raises:
        UserError: the source is not as it was when it was curated; a kept.npy that is damaged.
    """
    if (whole.fingerprint, len(whole)) != (said.fingerprint, said.num_samples):
        counts = f"{len(whole):,} samples now, {said.num_samples:,} then"
        raise UserError(f"{folder}: {said.data} is not as it was when it was curated ({counts}); curate it again")
    path = _path(folder).with_name(INDICES)
    try:
        indices = np.load(path, mmap_mode="r", allow_pickle=False)  # as much as there is, whatever its head says
    except Exception as error:  # NumPy's, and those of the Python in its header
        raise UserError(f"{path} is damaged ({reason_of(error)}); curate again") from None
    in_shape = isinstance(indices, np.ndarray) and (indices.dtype, indices.shape) == (np.int64, (said.kept,))
    rising = in_shape and len(indices) > 0 and (indices[1:] > indices[:-1]).all()
    if not (rising and indices[0] >= 0 and indices[-1] < len(whole)):
        raise UserError(f"{path} is damaged (it does not hold {said.kept:,} places in the data); curate again")
    source = Subset(whole, np.array(indices), str(folder))
    source.reading = "; ".join(filter(None, (f"kept of the {len(whole):,} of {whole.name}", whole.reading)))
    return source


def write_kept(folder: Path, data: KeptData, indices: np.ndarray) -> None:
    """Write which samples are kept: rising int64 places in the source."""
    (folder / KEPT).unlink(missing_ok=True)  # it goes first and comes last: it vouches for the other
    write_whole(folder / INDICES, lambda file: np.save(file, indices))
    write_json(folder / KEPT, asdict(data))
