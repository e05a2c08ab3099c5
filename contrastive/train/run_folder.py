"""The run folder: the interface between a run and everything that reads it.

config.yaml  metrics.jsonl  tokenizer/  checkpoints/step-NNNNNNNN/  final/  report.html
"""

from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from contrastive.errors import UserError


class RunFolder:
    """Paths of a run, and the lock that keeps a second launch out of it.

    Args:
        path: the folder.
        resume: whether it must hold a run (True) or must not (False).

    Raises:
        UserError: the folder holds a run and resume is False, or holds none and resume is True.
    """

    def __init__(self, path: Path, resume: bool):
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.tokenizer = path / "tokenizer"
        self.checkpoints = path / "checkpoints"
        self.final = path / "final"
        self.report = path / "report.html"
        self._lock: FileLock | None = None
        if resume and not self.config.exists():
            raise UserError(f"nothing to resume in {path}: it has no config.yaml; drop --resume to start a run")
        if not resume and path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} exists; continue it with --resume, or name another folder with --run_folder")

    def lock(self) -> None:
        """Create the folder and take its lock until `unlock` or the end of the process.

        Raises:
            UserError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise UserError(
                f"another process is training in {self.path}; wait for it or use another --run_folder"
            ) from None
        self.checkpoints.mkdir(exist_ok=True)

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def write_config(self, config: dict) -> None:
        """Write the options as used, every one of them, as YAML."""
        self.config.write_text(yaml.safe_dump(config, sort_keys=False, width=110))
