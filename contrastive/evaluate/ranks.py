"""The ranks that embed together, or the one process there is."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from contrastive.command_line import chosen_device
from contrastive.distributed.runtime import Runtime


def launched() -> bool:
    """Whether a launcher (accelerate launch, torchrun) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


@contextmanager
def joined_ranks(asked: str | None) -> Iterator[str | torch.device]:
    """Yield the device of this rank; while it lasts, the ranks that a launcher started have met.

    asked: 'cpu', 'cuda', or None for what there is.

    Raises:
        UserError: no such device.
    """
    device = chosen_device(asked)
    if not launched():
        yield device
        return
    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    runtime = Runtime("fp32")
    yield runtime.device
    runtime.close()
