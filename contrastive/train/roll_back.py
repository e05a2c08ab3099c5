"""Back to the last good checkpoint: which one that is, and its weights into a model in use."""

import shutil
from pathlib import Path

from torch import nn

from contrastive.distributed.sharding import like
from contrastive.errors import UserError
from contrastive.files import problem
from contrastive.train.checkpoint import read_cursor, saved_weights
from contrastive.train.health import TroubleError
from contrastive.train.retention import checkpoints_in, step_of


def last_good(checkpoints: Path, trouble: TroubleError, max_roll_backs: int) -> Path:
    """Return the newest whole checkpoint from before the trouble, and delete those that are newer: no resume is to find
    them.

    Raises:
        UserError: there is none, or the run went back to it too often already.
    """
    folders = checkpoints_in(checkpoints)[::-1]
    before = [folder for folder in folders if step_of(folder) < trouble.first]
    good = next((folder for folder in before if problem(folder) is None), None)
    if good is None:
        raise UserError(
            f"step {trouble.last}: {trouble.what}, and no whole checkpoint from before step {trouble.first} is left to "
            "go back to; raise checkpoint.keep"
        )
    times = read_cursor(good).get("run", {}).get("rolled_back", 0)
    if times >= max_roll_backs:
        raise UserError(
            f"step {trouble.last}: {trouble.what}, after {times} times back to {good.name} (health.max_roll_backs); "
            "lower optimizer.lr, or look at the data"
        )
    for folder in folders[: folders.index(good)]:
        shutil.rmtree(folder)
    return good


def reload_weights(model: nn.Module, checkpoint: Path) -> None:
    """Put a verified checkpoint's weights into a model, sharded or not, that may be compiled and wrapped."""
    saved, own = saved_weights(checkpoint), model.state_dict()
    model.load_state_dict({name: like(saved[name].to(tensor.device), tensor) for name, tensor in own.items()})
