"""A folder that says which samples of a data source to train on, as `contrastive curate` writes it.

kept.json   the data source, its fingerprint and number of samples, how many are kept
kept.npy    the kept samples, by their places in the source: int64, rising
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from contrastive.config import from_dict
from contrastive.data.record import Source
from contrastive.data.sources.derived import Subset
from contrastive.errors import UserError, reason_of
from contrastive.files import read_json, write_json, write_whole

KEPT, INDICES = "kept.json", "kept.npy"
FORMAT = "contrastive-kept-1"


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
