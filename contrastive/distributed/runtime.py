"""Rank, device, precision and the wrapped model: the only file that touches Accelerate."""

import datetime
import math
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import nn

from contrastive.command_line import chosen_device
from contrastive.distributed import end_with_parent
from contrastive.errors import UserError

Precision = Literal["auto", "fp32", "bf16"]


class Runtime:
    """This process among the others, as `accelerate launch` started it.

    rank, world_size: this process's number, from 0, and how many there are. is_main: whether it is the first one.
    device: what it computes on. precision: 'bf16' or 'fp32', of the towers.

    Args:
        precision: `bf16` runs the towers under autocast; `auto` is bf16 on a GPU that has it, else fp32.
        trackers: names Accelerate knows: tensorboard, wandb, trackio, ...
        folder: where trackers that write files put them.

    Raises:
        UserError: bf16 asked of a device without it, a tracker that is not installed, or a launch with FSDP,
            DeepSpeed or fp16.
    """

    def __init__(self, precision: Precision = "auto", trackers: tuple[str, ...] = (), folder: Path | None = None):
        on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true"
        has_bf16 = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bf16" and not has_bf16:
            raise UserError("train.precision 'bf16': this GPU has no bf16; use --train.precision fp32")
        asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if asked not in ("no", "bf16"):
            raise UserError(f"accelerate launch --mixed_precision {asked} is not supported; use bf16 or no")
        wants_bf16 = precision == "bf16" or (precision == "auto" and has_bf16 and (on_gpu or asked == "bf16"))
        absent = set(trackers) - {str(tracker) for tracker in get_available_trackers()}
        if absent:
            raise UserError(f"tracker {', '.join(sorted(absent))} is unknown or not installed: pip install it first")
        handlers = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
        if on_gpu and "LOCAL_RANK" in os.environ:
            # gloo beside NCCL: small agreements between hosts need not wait for the GPUs.
            handlers.append(InitProcessGroupKwargs(backend="cpu:gloo,cuda:nccl"))
        self._accelerator = Accelerator(
            mixed_precision="bf16" if wants_bf16 else "no",
            log_with=list(trackers) or None,
            project_dir=folder,
            kwargs_handlers=handlers,
        )
        kind = self._accelerator.distributed_type
        if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
            raise UserError(f"{kind.value} of the accelerate configuration is not supported; use plain data parallel")
        self.precision = "bf16" if wants_bf16 else "fp32"
        self.rank, self.world_size = self._accelerator.process_index, self._accelerator.num_processes
        self.device, self.is_main = self._accelerator.device, self._accelerator.is_main_process
        self._meeting = dist.new_group(backend="gloo") if self.world_size > 1 else None

    def wrap(self, model: nn.Module) -> nn.Module:
        """Move the model to the device; under several ranks, wrap it so that backward averages gradients."""
        return self._accelerator.prepare_model(model)

    def without_gradient_sync(self, model: nn.Module):
        """A context whose backward passes keep gradients local: all but the last micro-batch."""
        return self._accelerator.no_sync(model) if self.world_size > 1 else nullcontext()

    def barrier(self) -> None:
        self._accelerator.wait_for_everyone()

    def meet(self, step: int, seconds: float) -> None:
        """Wait for all ranks at a step, so that one which never comes is named instead of waited for in silence.

        The first rank asks the others one by one; with many of them only every few steps.

        Raises:
            UserError: some did not come within `seconds`.
        """
        if self.world_size == 1 or step % math.ceil(self.world_size / 16):
            return
        try:
            dist.monitored_barrier(self._meeting, datetime.timedelta(seconds=seconds), wait_all_ranks=True)
        except RuntimeError as error:
            absent = re.search(r"[Rr]anks? ([\d, ]+) failed to pass", str(error))
            who = f"rank {absent.group(1).strip(' ,')}" if absent else "a rank (the first rank's message says which)"
            raise UserError(
                f"{who} did not reach step {step + 1} within {seconds:g} seconds; see what it hangs on"
            ) from error

    def start_trackers(self, name: str, config: dict) -> None:
        """Open the trackers' run `name` and record `config`, dotted names to numbers and text."""
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


def prepare_process() -> None:
    """Mend how `accelerate launch` starts and leaves processes. Call it first thing in a script."""
    _start_all_processes()
    _use_all_cores()
    if "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        # A launcher that is killed leaves its processes training; this lets them save and end.
        end_with_parent(signal.SIGTERM)


def _use_all_cores() -> None:
    """Without --cpu accelerate 1.15 gives its one process a single thread, even where there is no GPU.

    A number of threads that the user chose, in the launcher's own environment or by flag, is left alone.
    """
    if torch.cuda.is_available() or os.environ.get("OMP_NUM_THREADS") != "1" or "RANK" in os.environ:
        return
    launcher = _launcher()
    if launcher is None or "OMP_NUM_THREADS" in launcher.environ():
        return
    if not any("threads" in word for word in launcher.cmdline()):
        torch.set_num_threads(len(os.sched_getaffinity(0)))


def _start_all_processes() -> None:
    """Become as many processes as `accelerate launch --cpu --num_processes N` was asked for.

    Without MPI accelerate 1.15 starts only one of them, and says nothing. It shows: an address to meet at is
    set, but no rank. torchrun then replaces this process, with N read from accelerate's own command line.
    """
    ranks = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if not on_cpu or "MASTER_PORT" not in os.environ or any(name in os.environ for name in ranks):
        return
    from accelerate.commands.launch import launch_command_parser

    launcher = _launcher()
    words = launcher.cmdline() if launcher is not None else ["launch"]
    options, _ = launch_command_parser().parse_known_args([*words[words.index("launch") + 1 :], "no script"])
    if options.num_processes is None or (options.num_machines or 1) > 1:
        raise UserError("cannot tell how many processes to start; use torchrun --nproc_per_node N instead")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(options.num_processes)]
    torchrun += ["--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"]]
    os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])


def _launcher() -> psutil.Process | None:
    """The `accelerate launch` that started this process, if one did and its command line can be read."""
    parent = psutil.Process().parent()
    try:
        return parent if parent is not None and "launch" in parent.cmdline() else None
    except psutil.Error:
        return None
