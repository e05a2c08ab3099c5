"""What a person sees, and what is written down: the console, the progress bar's clock, metrics.jsonl."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.text import Text

from contrastive.errors import one_line
from contrastive.files import write_whole

T = TypeVar("T")
console = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)


def is_main_process() -> bool:
    """Whether this process speaks for all ranks, known before any process group exists."""
    return int(os.environ.get("RANK", 0)) == 0


def say(message: str) -> None:
    """Print one line on the main process."""
    if is_main_process():
        console.print(one_line(message), markup=False)


def warn(message: str) -> None:
    """Print one line on the main process, marked as a warning."""
    if is_main_process():
        console.print(Text.assemble(("warning:", "yellow"), f" {one_line(message)}"))


def bar(
    items: Iterable[T], text: str, total: int | None = None, *, done: int = 0, shown: bool = True, forks: bool = False
) -> Iterable[T]:
    """Iterate over `items` under a progress bar, on the first rank's terminal; it goes away at the end.

    total: how many items there are, where they have no length; `done` of them were done before.
    forks: whether processes are started on the way. The bar then has no thread that refreshes it: a fork would catch
        that thread with the console's lock in its hand.
    """
    if not (shown and is_main_process() and console.is_terminal):
        return items
    from rich.progress import track

    return track(items, text, total, done, auto_refresh=not forks, console=console, transient=True)


class MetricsLog:
    """Rows of `metrics.jsonl`: one JSON object a line, appended and flushed; use as a context manager.

    Args:
        path: the file; rows of steps after `keep_until` are dropped when it exists, because a resumed run
            repeats them.
        keep_until: the step that training continues from.
    """

    def __init__(self, path: Path, keep_until: int):
        rows = [row for row in read_metrics(path) if row["step"] <= keep_until] if path.exists() else []
        self._known = {(row["kind"], row["step"]) for row in rows}
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a")

    def has(self, kind: str, step: int) -> bool:
        """Whether a row of this kind and step was there when the log was opened."""
        return (kind, step) in self._known

    def write(self, row: dict) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict]:
    """Return the rows of a `metrics.jsonl`; a last line cut short by a kill is left out, and what is no row."""
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    return [row for row in rows if isinstance(row, dict)]
