"""Rank, device, precision and the wrapped model: the only file that touches Accelerate."""

import math
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from contrastive.errors import UserError

Precision = Literal["auto", "fp32", "bf16"]


class Runtime:
    """This process among the others, as `accelerate launch` started it.

    Args:
        precision: `bf16` runs the towers under autocast; `auto` is bf16 on a GPU that has it, else fp32.
        trackers: names Accelerate knows: tensorboard, wandb, trackio, ...
        folder: where trackers that write files put them.

    Raises:
        UserError: bf16 asked of a device without it, or a tracker that is not installed.
    """

    def __init__(self, precision: Precision = "auto", trackers: tuple[str, ...] = (), folder: Path | None = None):
        has_bf16 = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bf16" and not has_bf16:
            raise UserError("train.precision 'bf16': this GPU has no bf16; use --train.precision fp32")
        wants_bf16 = precision == "bf16" or (precision == "auto" and torch.cuda.is_available() and has_bf16)
        try:
            self._accelerator = Accelerator(
                mixed_precision="bf16" if wants_bf16 else "no",
                log_with=list(trackers) or None,
                project_dir=folder,
                kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
            )
        except (ValueError, ImportError) as error:
            raise UserError(f"cannot start with trackers {', '.join(trackers)}: {error}") from None
        self.precision = "bf16" if wants_bf16 else "fp32"

    @property
    def rank(self) -> int:
        return self._accelerator.process_index

    @property
    def world_size(self) -> int:
        return self._accelerator.num_processes

    @property
    def device(self) -> torch.device:
        return self._accelerator.device

    @property
    def is_main(self) -> bool:
        return self._accelerator.is_main_process

    def wrap(self, model: nn.Module) -> nn.Module:
        """Move the model to the device; under several ranks, wrap it so that backward averages gradients."""
        return self._accelerator.prepare_model(model)

    def autocast(self):
        """A context in which the towers run in the run's precision."""
        return self._accelerator.autocast()

    def without_gradient_sync(self, model: nn.Module):
        """A context whose backward passes keep gradients local: all but the last micro-batch."""
        return self._accelerator.no_sync(model) if self.world_size > 1 else nullcontext()

    def barrier(self) -> None:
        self._accelerator.wait_for_everyone()

    def start_trackers(self, name: str, config: dict) -> None:
        """Open the trackers' run `name` and record the flat `config`."""
        if self._accelerator.log_with:
            plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in config.items()}
            self._accelerator.init_trackers(name, config=plain)

    def track(self, row: dict[str, float], step: int) -> None:
        """Send finite numbers to the trackers."""
        if self._accelerator.trackers:
            self._accelerator.log({k: v for k, v in row.items() if math.isfinite(v)}, step=step)

    def close(self) -> None:
        """End the trackers and leave the process group."""
        self._accelerator.end_training()


def start_all_processes() -> None:
    """Become as many processes as `accelerate launch --cpu --num_processes N` was asked for.

    Without MPI accelerate 1.15 starts only one of them, and says nothing. It shows: an address to meet at is
    set, but no rank. torchrun then replaces this process, with N read from accelerate's own command line.
    Call it first thing in a script. In every other case it returns at once.

    Raises:
        UserError: N cannot be found out.
    """
    ranks = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if not on_cpu or "MASTER_PORT" not in os.environ or any(name in os.environ for name in ranks):
        return
    import psutil
    from accelerate.commands.launch import launch_command_parser

    launcher = psutil.Process().parent().cmdline()
    if "launch" not in launcher:
        raise UserError("cannot tell how many processes to start; use torchrun --nproc_per_node N instead")
    options = launch_command_parser().parse_args(launcher[launcher.index("launch") + 1 :])
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(options.num_processes)]
    torchrun += ["--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"]]
    os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])
