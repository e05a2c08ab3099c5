"""Options that commands share: how images are read, and where they are embedded."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from contrastive.errors import UserError
from contrastive.option_types import NotNegative, Positive, check_bounds

DEVICE = ("cpu|cuda", "What to compute on [cuda where there is one]")


@dataclass(frozen=True, kw_only=True)
class CheckedOptions:
    """Options of a command that are checked as they are made."""

    def __post_init__(self):
        check_bounds(self)


@dataclass(frozen=True, kw_only=True)
class LoadingOptions(CheckedOptions):
    """How images are read, and where they are embedded."""

    batch_size: Positive[int] = 256
    """Images at once."""
    workers: NotNegative[int] = 0
    """Processes that read images."""
    device: Literal["cpu", "cuda"] | None = None
    """What to compute on; none: cuda where there is one."""

    def loading(self) -> dict[str, int | bool]:
        """Return the arguments of functions that embed."""
        return {"batch_size": self.batch_size, "num_workers": self.workers, "progress": True}


def print_json(value: Any) -> None:
    """Print a value as one line of JSON: what --json gives instead of a table."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def chosen_device(asked: str | None) -> str:
    """Return 'cpu' or 'cuda', as asked for or as there is; UserError where there is no such device."""
    import torch

    if asked not in (None, "cpu", "cuda"):
        raise UserError(f"--device is '{asked}', expected cpu or cuda")
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")
