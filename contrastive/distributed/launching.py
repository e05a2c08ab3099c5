"""How a launcher started this process: what it was told, what it forgot, and what of it has no effect here."""

import argparse
import functools
import os
import signal
import sys
from typing import Literal

import psutil
import torch

from contrastive.distributed import end_with_parent
from contrastive.errors import UserError
from contrastive.words import answers

# What `accelerate launch` can be told that changes nothing here: groups of its flags, but for those with an effect and
# values that say what is done anyway.
_NOT_OURS = ("Training Paradigm", "TPU", "DeepSpeed", "FSDP", "Megatron-LM", "FP8", "AWS", "ParallelismConfig")
_WITH_EFFECT = ("use_fsdp", "fsdp_version", "fsdp_reshard_after_forward")
_DONE_ANYWAY = (
    ("gradient_accumulation_steps", 1),
    ("dynamo_backend", "no"),
    ("fsdp_state_dict_type", "SHARDED_STATE_DICT"),
    ("fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
)


def has_gpu() -> bool:
    """Whether there is a GPU that this process may use."""
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true"


def launched() -> bool:
    """Whether a launcher (accelerate launch, torchrun) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def prepare_process() -> None:
    """Mend how `accelerate launch` starts and leaves processes. Call it first thing in a script.

    Raises:
        UserError: the launcher was told what has no effect here, or started processes that cannot meet.
    """
    _check_flags()
    check_environment()
    _start_all_processes()
    _use_all_cores()
    if "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        # A launcher that is killed leaves its processes training; this lets them save and end.
        end_with_parent(signal.SIGTERM)
    if "TORCHELASTIC_RUN_ID" in os.environ and is_orphan():  # since before that: no signal comes any more
        raise UserError("the launcher that started this process has ended")


def is_orphan() -> bool:
    """Whether the launcher has ended: its children are process 1's then, which it may be itself only by Python."""
    try:
        return os.getppid() == 1 and "python" not in os.path.basename(os.readlink("/proc/1/exe"))
    except OSError:  # no /proc, or somebody else's process
        return True


def _check_flags() -> None:
    """Raise UserError for a flag of `accelerate launch` that would change nothing."""
    flags = launch_flags()
    if flags is None:
        return
    from accelerate.commands.launch import launch_command_parser

    groups = launch_command_parser()._action_groups
    unused = {a.dest for group in groups if group.title.startswith(_NOT_OURS) for a in group._group_actions} | {"tpu"}
    unused |= {name for name in vars(flags) if name.startswith("dynamo_")}
    for name in sorted((flags.nondefault & unused).difference(_WITH_EFFECT)):
        value = getattr(flags, name)
        if (name, value) not in _DONE_ANYWAY:
            told = "" if value is True else f" {value}"
            ours = answers("flag", name, str(value))
            how = f"use {ours[0].rstrip(',')}" if ours else "leave it out"
            raise UserError(f"accelerate launch --{name}{told} has no effect here; {how}")


def check_environment() -> None:
    """Raise UserError for what a launcher's environment asks in vain, and for processes that cannot meet."""
    given = os.environ.get
    for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if given(f"ACCELERATE_USE_{name}", "").lower() == "true":
            flag = f"--use_{name.lower()}"
            raise UserError(f"{flag} of accelerate launch (or its configuration) is not supported; leave it out")
    asked_to_shard()
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


def asked_to_shard() -> bool:
    """Whether the launcher asks for FSDP2.

    Raises:
        UserError: FSDP1, a single process, or a setting of FSDP that has no effect here.
    """
    given = os.environ.get
    if given("ACCELERATE_USE_FSDP", "").lower() != "true":
        return False
    if given("FSDP_VERSION", "1") != "2":
        raise UserError(f"FSDP{given('FSDP_VERSION', '1')} is not supported; use fsdp_version: 2 (--fsdp_version 2)")
    if int(given("WORLD_SIZE", 1)) == 1:
        raise UserError("FSDP with one process shards nothing; leave --use_fsdp out, or start more (--num_processes)")
    for name, value, how in (
        ("OFFLOAD_PARAMS", "true", "leave it out"),
        ("ACTIVATION_CHECKPOINTING", "true", "use --train.gradient_checkpointing 1"),
        ("STATE_DICT_TYPE", "FULL_STATE_DICT", "checkpoints are sharded, final/ is whole"),
        ("AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "the blocks of the towers are sharded, one by one"),
        ("AUTO_WRAP_POLICY", "NO_WRAP", "the blocks of the towers are sharded, one by one"),
    ):
        if given(f"FSDP_{name}", "").lower() == value.lower():
            raise UserError(f"fsdp_{name.lower()} {value} is not supported; {how}")
    return True


def asked_precision() -> Literal["fp32", "bf16"] | None:
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
    set, but no rank. Our torchrun then replaces this process, with N read from accelerate's own command line.
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
    torchrun = ["-m", "contrastive.distributed.start_ranks", "--nproc_per_node", str(flags.num_processes)]
    torchrun += ["--max_restarts", str(flags.max_restarts or 0)]
    # Not the static rendezvous of --master_port: started again, gloo hangs in what the first group left in its store.
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    torchrun += ["--rdzv_backend", "c10d", "--rdzv_endpoint", address]
    os.environ["ACCELERATE_USE_CPU"] = "true"
    end_with_parent(signal.SIGTERM)
    # As a file, __main__.py would make its folder the first place where `import log` looks.
    program = ["-m", "contrastive"] if sys.argv[0].endswith("__main__.py") else sys.argv[:1]
    os.execv(sys.executable, [sys.executable, *torchrun, *program, *sys.argv[1:]])


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
