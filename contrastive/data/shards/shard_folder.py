"""The folder that shards are written to: whose it is, which shards are finished, and its report."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contrastive.errors import UserError

PROGRESS = ".progress"
REPORT = "report.json"
KEYS_SHOWN = 20


@dataclass
class Tally:
    """What became of the samples of one shard, or of several.

    rejected, rejected_captions: by reason, how many and the first KEYS_SHOWN keys, in the order of the source.
    A rejected caption is one of a sample that has others, or a label.
    """

    samples: int = 0
    resized: int = 0
    bytes: int = 0
    rejected: dict[str, dict[str, Any]] = field(default_factory=dict)
    rejected_captions: dict[str, dict[str, Any]] = field(default_factory=dict)

    def reject(self, reason: str, key: str) -> None:
        _count(self.rejected, reason, 1, [key])

    def reject_caption(self, reason: str, key: str) -> None:
        _count(self.rejected_captions, reason, 1, [key])

    def add(self, later: "Tally") -> None:
        """Take in the tally of samples that come after those counted so far."""
        self.samples += later.samples
        self.resized += later.resized
        self.bytes += later.bytes
        for mine, theirs in ((self.rejected, later.rejected), (self.rejected_captions, later.rejected_captions)):
            for reason, found in theirs.items():
                _count(mine, reason, found["count"], found["keys"])

    def num_rejected(self) -> int:
        return sum(found["count"] for found in self.rejected.values())


def _count(faults: dict[str, dict[str, Any]], reason: str, count: int, keys: list[str]) -> None:
    found = faults.setdefault(reason, {"count": 0, "keys": []})
    found["count"] += count
    found["keys"] += keys[: KEYS_SHOWN - len(found["keys"])]


class ShardFolder:
    """Shards 00000.tar, 00001.tar, ... with a record of each finished one in a hidden folder beside them."""

    def __init__(self, path: Path, num_shards: int):
        self.path, self.num_shards = path, num_shards
        self._digits = max(5, len(str(num_shards - 1)))

    @contextmanager
    def claim(self, plan: dict[str, Any]) -> Iterator[None]:
        """Make the folder ours for as long as the context lasts, or go on with one that the same plan began.

        Raises:
            UserError: it holds something else, was begun by another plan, or another process writes to it.
        """
        from filelock import FileLock, Timeout

        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; give a folder that is new or empty")
        plan_file = self.path / PROGRESS / "plan.json"
        if self.path.is_dir() and not plan_file.exists() and set(os.listdir(self.path)) - {PROGRESS}:
            raise UserError(f"{self.path} holds files that are not of such a run; give a folder that is new or empty")
        plan_file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(plan_file.with_name("lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"another process is writing shards to {self.path}; wait for it to end") from None
        try:
            if plan_file.exists():
                self._check_plan(_read_json(plan_file), plan)
            write_json(plan_file, plan)
            yield
        finally:
            lock.release()

    def name(self, number: int) -> str:
        return f"{number:0{self._digits}d}.tar"

    def pattern(self) -> str:
        """Return the specification that names all shards: a brace range, or a glob where it would have gaps."""
        present = [number for number in range(self.num_shards) if (self.path / self.name(number)).exists()]
        if len(present) < self.num_shards:
            return str(self.path / "*.tar")
        last = self.name(self.num_shards - 1).removesuffix(".tar")
        return str(self.path / (f"{{{'0' * self._digits}..{last}}}.tar" if self.num_shards > 1 else self.name(0)))

    def finished(self, number: int) -> Tally | None:
        """Return the tally of a shard that was finished and is still there in full, else None."""
        tar = self.path / self.name(number)
        try:
            tally = Tally(**_read_json(self._record(number)))
            size = tar.stat().st_size if tally.samples else 0
        except (OSError, ValueError, TypeError):  # none, or one from a disk that was full
            return None
        return tally if size == tally.bytes else None

    def temporary(self, number: int) -> Path:
        return self.path / f".{self.name(number)}.tmp"

    def finish(self, number: int, tally: Tally) -> None:
        """Give the temporary file its name and record the shard; one without samples leaves no file."""
        temporary = self.temporary(number)
        if tally.samples:
            tally.bytes = temporary.stat().st_size
            os.replace(temporary, self.path / self.name(number))
        else:
            temporary.unlink()
        write_json(self._record(number), vars(tally))

    def _record(self, number: int) -> Path:
        return self.path / PROGRESS / f"{self.name(number).removesuffix('.tar')}.json"

    def _check_plan(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        for name in now:
            if before.get(name) != now[name]:
                raise UserError(
                    f"{self.path} was begun with {name.replace('_', ' ')} {before.get(name)}, now it is {now[name]}; "
                    "use the old one to go on, or give another folder"
                )


def write_json(path: Path, content: Any) -> None:
    """Write the file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8", "backslashreplace")
    os.replace(temporary, path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError:
        raise ValueError(f"{path} is damaged") from None


def describe(faults: dict[str, dict[str, Any]]) -> list[str]:
    """Return a line for each reason, the commonest first: '3 unreadable_image: a.jpg, b.jpg, ...'."""
    lines = []
    for reason, found in sorted(faults.items(), key=lambda item: -item[1]["count"]):
        keys = [re.sub(r"\s+", " ", key) for key in found["keys"][:3]]
        more = ", ..." if found["count"] > len(keys) else ""
        lines.append(f"{found['count']:,} {reason}: {', '.join(keys)}{more}")
    return lines
