"""The ranks that embed together, or the one process there is."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from contrastive.command_line import chosen_device
from contrastive.distributed import collectives
from contrastive.distributed.runtime import Runtime
from contrastive.errors import UserError

T = TypeVar("T")


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


def together(call: Callable[[], T]) -> T:
    """Return what `call` does, and wait for the other ranks; what fails on one of them fails on all."""
    result, failure = None, None
    try:
        result = call()
    except UserError as error:
        failure = str(error)
    failures = [message for message in collectives.gather_objects(failure) if message]
    if failures:
        raise UserError(failures[0])
    return result
