"""Rank, device, precision and the wrapped model: the only file that touches Accelerate."""

import argparse
import datetime
import functools
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    recursively_apply,
    send_to_device,
)
from torch import nn

from contrastive.command_line import chosen_device
from contrastive.distributed import end_with_parent, keep_freed_memory
from contrastive.errors import UserError, reason_of
from contrastive.log import warn
from contrastive.words import answers

Precision = Literal["auto", "fp32", "bf16"]
Compile = Literal["auto", "on", "off"]
# What `accelerate launch` can be told that changes nothing here: groups of its flags.
_NOT_OURS = ("Training Paradigm", "TPU", "DeepSpeed", "FSDP", "Megatron-LM", "FP8", "AWS", "ParallelismConfig")


class Runtime:
    """This process among the others, as `accelerate launch` started it.

    rank, world_size: this process's number, from 0, and how many there are. is_main: whether it is the first one.
    device: what it computes on. precision: 'bf16' or 'fp32', of the towers.

    Args:
        precision: `bf16` runs the towers under autocast; `auto` is bf16 on a GPU that has it, else fp32.
        trackers: names Accelerate knows: tensorboard, wandb, trackio, ...
        folder: where trackers that write files put them.

    Raises:
        UserError: bf16 asked of a device without it, a tracker that is not installed, a launch with FSDP, DeepSpeed or
            fp16, or with another precision than asked for here.
    """

    def __init__(self, precision: Precision = "auto", trackers: tuple[str, ...] = (), folder: Path | None = None):
        on_gpu = has_gpu()
        if not on_gpu:
            keep_freed_memory()
        has_bf16 = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bf16" and not has_bf16:
            raise UserError("train.precision 'bf16': this GPU has no bf16; use --train.precision fp32")
        asked = _asked_precision()
        if asked and precision not in ("auto", asked):
            raise UserError(
                f"train.precision is {precision}, but accelerate launch (or its configuration) says --mixed_precision "
                f"{'no' if asked == 'fp32' else asked}; leave one of them out"
            )
        wants_bf16 = precision == "bf16" or (precision == "auto" and has_bf16 and (asked or on_gpu) in ("bf16", True))
        absent = set(trackers) - {str(tracker) for tracker in get_available_trackers()}
        if absent:
            told = f"tracker {', '.join(sorted(absent))} is unknown or not installed: pip install it first"
            raise UserError(f"{told}; for no tracker leave --trackers out")
        handlers = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
        if on_gpu and "LOCAL_RANK" in os.environ:
            # gloo beside NCCL: small agreements between hosts need not wait for the GPUs.
            handlers.append(InitProcessGroupKwargs(backend="cpu:gloo,cuda:nccl"))
        _check_environment()
        if launched() and not on_gpu:
            os.environ["ACCELERATE_USE_CPU"] = "true"  # else torchrun's processes would not meet where there is no GPU
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

    def on_device(
        self, batches: Iterable[dict], inputs: Callable[[dict], dict[str, Any]]
    ) -> Iterator[tuple[dict, dict[str, Any]]]:
        """Yield each batch with what `inputs` makes of it, tensors and lists and named tuples of them, on the device.

        A GPU copies them beside its work on the steps before, which have been queued and not waited for: nothing is
        fetched ahead of its turn. On a CPU they are as they were.
        """
        if self.device.type != "cuda":
            for batch in batches:
                yield batch, inputs(batch)
            return
        copying = torch.cuda.Stream(self.device)
        for batch in batches:
            with torch.cuda.stream(copying):
                pinned = recursively_apply(torch.Tensor.pin_memory, inputs(batch))
                moved = send_to_device(pinned, self.device, non_blocking=True)
            computing = torch.cuda.current_stream(self.device)
            computing.wait_stream(copying)
            # Their memory is free again when the step is done with them.
            recursively_apply(torch.Tensor.record_stream, moved, computing)
            yield batch, moved

    def compiles(self, asked: Compile) -> bool:
        """Whether to compile; where that may be, it is tried first on next to nothing, which takes seconds.

        Args:
            asked: `auto` is on a GPU where it works.

        Raises:
            UserError: `on`, and it does not work.
        """
        if asked == "off" or (asked == "auto" and self.device.type == "cpu"):
            return False
        try:
            torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=self.device))
        except Exception as error:  # no C++ compiler, no Triton, one that is too old: all kinds
            why = f"torch.compile does not work here: {reason_of(error)}"
            if asked == "on":
                raise UserError(f"train.compile 'on': {why}; install a compiler, or leave it out") from None
            warn(f"not compiled, which is slower: {why}")
            return False
        return True

    def without_gradient_sync(self, model: nn.Module):
        """A context whose backward passes keep gradients local: all but the last micro-batch."""
        return self._accelerator.no_sync(model) if self.world_size > 1 else nullcontext()

    def barrier(self) -> None:
        self._accelerator.wait_for_everyone()

    def summed(self, numbers: list[int], step: int, seconds: float) -> list[int]:
        """Return the sums over ranks of a few integers at the start of a step; no GPU is waited for.

        Raises:
            UserError: a rank did not come within `seconds`. It is named, instead of being waited for in silence.
        """
        if self.world_size == 1:
            return numbers
        total, limit = torch.tensor(numbers), datetime.timedelta(seconds=seconds)
        try:
            dist.all_reduce(total, group=self._meeting, async_op=True).wait(limit)
        except RuntimeError as error:
            raise UserError(
                f"{self._absent(limit)} did not reach step {step + 1} within {seconds:g} seconds; see what it hangs on"
            ) from error
        return total.tolist()

    def _absent(self, limit: datetime.timedelta) -> str:
        """Ask all ranks, one by one from the first; return who does not answer."""
        try:
            dist.monitored_barrier(self._meeting, limit, wait_all_ranks=True)
        except RuntimeError as error:
            absent = re.search(r"[Rr]anks? ([\d, ]+) failed to pass", str(error))
            if absent:
                return f"rank {absent.group(1).strip(' ,')}"
        return "a rank (the first rank's message says which)"

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


def has_gpu() -> bool:
    """Whether there is a GPU that this process may use."""
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true"


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
    runtime = Runtime()
    yield runtime.device
    runtime.close()


def prepare_process() -> None:
    """Mend how `accelerate launch` starts and leaves processes. Call it first thing in a script.

    Raises:
        UserError: the launcher was told what has no effect here, or started processes that cannot meet.
    """
    _check_flags()
    _check_environment()
    _start_all_processes()
    _use_all_cores()
    if "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        # A launcher that is killed leaves its processes training; this lets them save and end.
        end_with_parent(signal.SIGTERM)


def _check_flags() -> None:
    """Raise UserError for a flag of `accelerate launch` that would change nothing."""
    flags = launch_flags()
    if flags is None:
        return
    from accelerate.commands.launch import launch_command_parser

    groups = launch_command_parser()._action_groups
    unused = {a.dest for group in groups if group.title.startswith(_NOT_OURS) for a in group._group_actions} | {"tpu"}
    unused |= {name for name in vars(flags) if name.startswith("dynamo_")}
    for name in sorted(flags.nondefault & unused):
        value = getattr(flags, name)
        if (name, value) not in (("gradient_accumulation_steps", 1), ("dynamo_backend", "no")):
            told = "" if value is True else f" {value}"
            ours = answers("flag", name, str(value))
            how = f"use {ours[0].rstrip(',')}" if ours else "leave it out"
            raise UserError(f"accelerate launch --{name}{told} has no effect here; {how}")


def _check_environment() -> None:
    """Raise UserError for what a launcher's environment asks in vain, and for processes that cannot meet."""
    given = os.environ.get
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if given(f"ACCELERATE_USE_{name}", "").lower() == "true":
            flag = f"--use_{name.lower()}"
            raise UserError(f"{flag} of accelerate launch (or its configuration) is not supported; leave it out")
    steps = given("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise UserError(f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS has no effect here; use --train.accumulate {steps}")
    if launched():
        absent = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not given(name)]
        if absent:
            raise UserError(
                f"WORLD_SIZE is {given('WORLD_SIZE')}, but there is no {', '.join(absent)}: start all processes with "
                "accelerate launch or torchrun, or unset WORLD_SIZE for a run of one"
            )
    elif given("ACCELERATE_USE_CPU", "").lower() != "true":  # else Accelerate itself reads what MPI set
        for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
            if int(given(name) or 1) > 1:
                raise UserError(
                    f"{name} is {given(name)}, but these processes would not meet: start torchrun once a machine, "
                    f"with --nnodes and --rdzv_endpoint, or unset {name} for runs of their own"
                )


def _asked_precision() -> Literal["fp32", "bf16"] | None:
    """What `accelerate launch` was told of precision, if anything; by default it says 'no' of itself."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", "bf16"):
        raise UserError(f"accelerate launch --mixed_precision {asked} is not supported; use bf16 or no")
    flags = launch_flags()
    said_no = flags is not None and flags.mixed_precision == "no"
    return "bf16" if asked == "bf16" else "fp32" if said_no else None


def _use_all_cores() -> None:
    """Without --cpu accelerate 1.15 gives its one process a single thread, even where there is no GPU.

    A number of threads that the user chose, in the launcher's own environment or by flag, is left alone.
    """
    flags = launch_flags()
    if torch.cuda.is_available() or os.environ.get("OMP_NUM_THREADS") != "1" or "RANK" in os.environ or flags is None:
        return
    if flags.num_cpu_threads_per_process is None and "OMP_NUM_THREADS" not in psutil.Process().parent().environ():
        torch.set_num_threads(len(os.sched_getaffinity(0)))


def _start_all_processes() -> None:
    """Become as many processes as `accelerate launch --num_processes N` was asked for where there is no GPU.

    Without MPI accelerate 1.15 starts only one of them, and says nothing. It shows: an address to meet at is
    set, but no rank. torchrun then replaces this process, with N read from accelerate's own command line.
    """
    ranks = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    by_accelerate = "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ
    if not by_accelerate or any(name in os.environ for name in ranks):
        return
    flags = launch_flags()
    if flags is None or flags.num_processes is None or (flags.num_machines or 1) > 1:
        raise UserError("cannot tell how many processes to start; use torchrun --nproc_per_node N instead")
    if os.environ["ACCELERATE_USE_CPU"].lower() != "true" and torch.cuda.is_available():
        raise UserError(
            f"accelerate launch --num_processes {flags.num_processes} starts one process where there is one GPU; give "
            "--num_processes 1, or --multi_gpu"
        )
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(flags.num_processes)]
    torchrun += ["--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"]]
    os.environ["ACCELERATE_USE_CPU"] = "true"
    os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])


@functools.cache
def launch_flags() -> argparse.Namespace | None:
    """The flags of the `accelerate launch` that started this process, if one did and its command line can be read.

    Its `nondefault` are the names of those that were given.
    """
    parent = psutil.Process().parent()
    try:
        words = parent.cmdline() if parent is not None and "ACCELERATE_MIXED_PRECISION" in os.environ else []
    except psutil.Error:
        return None
    names = ("launch", "accelerate-launch", "accelerate.commands.launch", "launch.py")
    start = next((place + 1 for place, word in enumerate(words) if word.rpartition("/")[2] in names), None)
    if start is None:
        return None
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser().parse_known_args([*words[start:], "no script"])[0]
