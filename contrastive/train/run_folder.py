"""The run folder: the interface between a run and everything that reads it.

config.yaml  metrics.jsonl  checkpoints/step-NNNNNNNN/  final/  report.html
"""

import os
import shutil
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from contrastive.errors import UserError

LOCK = ".lock"


class RunFolder:
    """Paths of a run, and the lock that keeps a second launch out of it.

    Args:
        path: the folder.
        resume: whether it must hold a run (True) or must not (False).
    """

    def __init__(self, path: Path, resume: bool):
        self.path = path
        self.resume = resume
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.final = path / "final"
        self.report = path / "report.html"
        self._lock = FileLock(path / LOCK, timeout=0)

    def check(self) -> None:
        """Raise UserError if the folder holds a run and should not, or the other way round."""
        if self.resume and not self.config.exists():
            raise UserError(f"nothing to resume in {self.path}: it has no config.yaml; drop --resume to start a run")
        if self.resume or not self.path.exists():
            return
        if not self.path.is_dir() or any(entry.name != LOCK for entry in self.path.iterdir()):
            raise UserError(f"{self.path} exists; continue it with --resume, or name another folder with --run_folder")

    def lock(self) -> None:
        """Create the folder, take its lock until `unlock` or the end of the process, and check again.

        Raises:
            UserError: another process holds the lock, or as `check`.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise UserError(
                f"another process is training in {self.path}; wait for it or use another --run_folder"
            ) from None
        try:
            self.check()
        except UserError:
            self.unlock()
            raise
        for left_over in self.checkpoints.glob(".tmp-*"):  # of a save that a kill cut short
            shutil.rmtree(left_over, ignore_errors=True)

    def unlock(self) -> None:
        self._lock.release()

    def write_config(self, config: dict) -> None:
        """Write the options as used, every one of them, as YAML; whole or not at all."""
        temporary = self.config.with_suffix(".tmp")
        temporary.write_text(yaml.safe_dump(config, sort_keys=False, width=110))
        os.replace(temporary, self.config)
