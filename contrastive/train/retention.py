"""Which checkpoints stay, and whether there is room for them."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from rich.filesize import decimal

from contrastive.errors import UserError
from contrastive.files import problem


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a run's folder of them, damaged ones too, oldest first."""
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def is_milestone(checkpoint: Path, keep_every: int | None) -> bool:
    """Whether a checkpoint is kept for ever. That of step 0, with nothing learned, is not."""
    step = step_of(checkpoint)
    return keep_every is not None and step > 0 and step % keep_every == 0


def expendable(
    checkpoints: list[Path], keep: int, keep_every: int | None, wrong: Callable[[Path], str | None]
) -> list[Path]:
    """Return those that may be deleted: all that are older than the `keep` newest whole ones, but for milestones.

    Args:
        checkpoints: oldest first. wrong: what is wrong with one, None where it is whole. Damaged ones do not count.
    """
    kept = 0
    for place in reversed(range(len(checkpoints))):
        kept += wrong(checkpoints[place]) is None
        if kept == keep:
            return [path for path in checkpoints[:place] if not is_milestone(path, keep_every)]
    return []


class Verification:
    """`problem` of folders; one that was found whole is read again only when its files have another size or time."""

    def __init__(self):
        self._whole: dict[Path, dict] = {}

    def __call__(self, folder: Path) -> str | None:
        found = {path: path.lstat() for path in folder.rglob("*")}
        seen = {path: (status.st_size, status.st_mtime_ns) for path, status in found.items()}
        if self._whole.get(folder) == seen:
            return None
        wrong = problem(folder)
        if wrong is None:
            self._whole[folder] = seen
        return wrong


def check_room(folder: Path, needed: int, what: str, mend: str) -> None:
    """Raise UserError where the disk of `folder` has less than `needed` bytes free.

    what: is to be written, mend: what to do about it; for the message.
    """
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(nearest).free
    if free < needed:
        raise UserError(f"{folder} has {decimal(free)} free, and {what} needs {decimal(needed)}; {mend}")
