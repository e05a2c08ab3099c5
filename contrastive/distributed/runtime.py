"""Rank, device, precision and the wrapped model: the only file that touches Accelerate."""

import datetime
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from operator import methodcaller
from pathlib import Path
from typing import Any, Literal

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
from contrastive.distributed import keep_freed_memory
from contrastive.distributed.collectives import waiting_at_most
from contrastive.distributed.launching import asked_precision, asked_to_shard, check_environment, has_gpu, launched
from contrastive.distributed.sharding import shard
from contrastive.errors import UserError, reason_of
from contrastive.log import warn
from contrastive.patches import Patches

Precision = Literal["auto", "fp32", "bf16"]
Compile = Literal["auto", "on", "off"]


def _is_moved(part: Any) -> bool:
    return isinstance(part, (torch.Tensor, Patches))


class Runtime:
    """This process among the others, as `accelerate launch` started it.

    rank, world_size: this process's number, from 0, and how many there are. is_main: whether it is the first one.
    device: what it computes on. precision: 'bf16' or 'fp32', of the towers. shards: whether by FSDP.

    Args:
        precision: `bf16` runs the towers under autocast; `auto` is bf16 on a GPU that has it, else fp32.
        trackers: names Accelerate knows: tensorboard, wandb, trackio, ...
        folder: where trackers that write files put them.
        patience: seconds that ranks wait for one another, except within `reaching`.

    Raises:
        UserError: bf16 asked of a device without it, a tracker that is not installed, a launch with FSDP1, DeepSpeed or
            fp16, or with another precision than asked for here.
    """

    def __init__(
        self,
        precision: Precision = "auto",
        trackers: tuple[str, ...] = (),
        folder: Path | None = None,
        patience: float = 3600.0,
    ):
        on_gpu = has_gpu()
        if not on_gpu:
            keep_freed_memory()
        has_bf16 = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bf16" and not has_bf16:
            raise UserError("train.precision 'bf16': this GPU has no bf16; use --train.precision fp32")
        asked = asked_precision()
        if asked and precision not in ("auto", asked):
            raise UserError(
                f"train.precision is {precision}, but accelerate launch (or its configuration) says --mixed_precision "
                f"{'no' if asked == 'fp32' else asked}; leave one of them out"
            )
        wants_bf16 = precision == "bf16" or (precision == "auto" and has_bf16 and (asked or on_gpu) in ("bf16", True))
        absent = set(trackers) - {str(tracker) for tracker in get_available_trackers()}
        if absent:
            told = f"tracker {', '.join(sorted(absent))} is unknown or not installed"
            raise UserError(f"{told}: pip install 'contrastive[trackers]', or leave --trackers out")
        handlers = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
        limit = {"timeout": datetime.timedelta(seconds=patience)}
        if on_gpu and "LOCAL_RANK" in os.environ:
            # gloo beside NCCL: small agreements between hosts need not wait for the GPUs.
            limit["backend"] = "cpu:gloo,cuda:nccl"
        handlers.append(InitProcessGroupKwargs(**limit))
        check_environment()
        self.shards = asked_to_shard()
        if launched() and not on_gpu:
            os.environ["ACCELERATE_USE_CPU"] = "true"  # else torchrun's processes would not meet where there is no GPU
        self._accelerator = Accelerator(
            mixed_precision="bf16" if wants_bf16 else "no",
            log_with=list(trackers) or None,
            project_dir=folder,
            kwargs_handlers=handlers,
        )
        kind = self._accelerator.distributed_type
        known = DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP
        if kind not in known:
            raise UserError(f"{kind.value} of the accelerate configuration is not supported; use plain data parallel")
        self.precision = "bf16" if wants_bf16 else "fp32"
        self.rank, self.world_size = self._accelerator.process_index, self._accelerator.num_processes
        self.device, self.is_main = self._accelerator.device, self._accelerator.is_main_process
        self._meeting, self._asking = (dist.new_group(backend="gloo") if self.world_size > 1 else None for _ in "12")

    def wrap(self, model: nn.Module, units: Iterable[nn.Module] = ()) -> nn.Module:
        """Return the model on the device, such that backward averages gradients over ranks.

        Args:
            units: the modules within it that FSDP shards one by one, in place; their parameters are others then.
        """
        if not self.shards:
            return self._accelerator.prepare_model(model)
        shard(model, units, self.device, self.precision == "bf16")
        return self._accelerator.prepare_model(model, evaluation_mode=True)  # for its autocast

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
                pinned = recursively_apply(methodcaller("pin_memory"), inputs(batch), test_type=_is_moved)
                moved = send_to_device(pinned, self.device, non_blocking=True)
            computing = torch.cuda.current_stream(self.device)
            computing.wait_stream(copying)
            # Their memory is free again when the step is done with them.
            recursively_apply(methodcaller("record_stream", computing), moved, test_type=_is_moved)
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

    def gradient_sync(self, model: nn.Module, now: bool):
        """A context whose backward pass averages gradients `now`, after the last micro-batch, or keeps them local.

        With FSDP it always averages: local ones would be as large as the whole model.
        """
        waits = not now and self.world_size > 1 and not self.shards
        return self._accelerator.no_sync(model) if waits else nullcontext()

    def barrier(self) -> None:
        self._accelerator.wait_for_everyone()

    @contextmanager
    def reaching(self, what: str, seconds: float) -> Iterator[None]:
        """Meanwhile no host waits longer than `seconds` for another one; it is named if it does not come.

        Kernels of GPUs wait for those of others as long as the process group was told at the start.

        Args:
            what: where all ranks should arrive, for the message: 'step 12'.

        Raises:
            UserError: a rank has ended, or did not come. It is named, instead of being waited for in silence.
        """
        try:
            with waiting_at_most(seconds):
                yield
        except RuntimeError as error:
            if self.world_size == 1 or not re.search("gloo|imed out|onnection (closed|reset)", str(error)):
                raise
            raise UserError(self._absent(what, seconds)) from error

    def summed(self, numbers: list[int], step: int, seconds: float) -> list[int]:
        """Return the sums over ranks of a few integers at the start of a step; no GPU is waited for.

        Raises:
            UserError: as of `reaching`.
        """
        if self.world_size == 1:
            return numbers
        total, limit = torch.tensor(numbers), datetime.timedelta(seconds=seconds)
        with self.reaching(f"step {step + 1}", seconds):
            dist.all_reduce(total, group=self._meeting, async_op=True).wait(limit)
        return total.tolist()

    def _absent(self, what: str, seconds: float) -> str:
        """Tell all ranks that this one waits for another, and hear who else does; return who does not, in a line."""
        time.sleep(0.5)  # until it shows everywhere that a process has ended
        works, ended, hanging = {}, [], []
        for other in set(range(self.world_size)) - {self.rank}:
            try:
                note, answer = torch.zeros(1), torch.zeros(1)
                works[other] = dist.isend(note, other, self._asking), dist.irecv(answer, other, self._asking)
            except RuntimeError:
                ended.append(other)
        until = time.monotonic() + seconds
        for other, pair in () if ended else works.items():
            try:
                for work in pair:
                    work.wait(datetime.timedelta(seconds=max(0.01, until - time.monotonic())))
            except RuntimeError as error:
                (hanging if "imed out" in str(error) else ended).append(other)
        named = ended or hanging
        who = (
            f"rank{'s' if len(named) > 1 else ''} {', '.join(map(str, named))}" if named else "no rank is lost, yet one"
        )
        if ended:
            return f"{who} ended before {what}; its last lines say why"
        return f"{who} did not reach {what} within {seconds:g} seconds; see what it hangs on, in stacks/ of the run"

    def start_trackers(self, name: str, config: dict, identity: str, done: int) -> None:
        """Open the trackers' run `name` and record `config`, dotted names to numbers and text.

        Args:
            identity: of the run, the same whenever it goes on. done: steps it has done; what was tracked after them,
                before a kill, is tracked again.
        """
        if self._accelerator.log_with:
            plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in config.items()}
            how = {
                "tensorboard": {"purge_step": done + 1 if done else None},
                "wandb": {"id": identity, "name": name, "resume": "allow"},
                "trackio": {"name": f"{name}-{identity}", "resume": "allow"},
            }
            self._accelerator.init_trackers(name, config=plain, init_kwargs=how)

    def track(self, row: dict[str, float], step: int) -> None:
        """Send finite numbers to the trackers."""
        if self._accelerator.trackers:
            self._accelerator.log({k: v for k, v in row.items() if math.isfinite(v)}, step=step)

    def close(self) -> None:
        """End the trackers and leave the process group."""
        self._accelerator.end_training()


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
