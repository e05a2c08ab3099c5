"""What a launcher was told takes effect, or is refused with our own option; its processes meet, or say why not."""

import os
import subprocess
import sys

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from rank_processes import script_on_ranks

from contrastive.distributed import launching
from contrastive.distributed.launching import prepare_process
from contrastive.distributed.runtime import Runtime
from contrastive.errors import UserError

FSDP = {"ACCELERATE_USE_FSDP": "true"}
MEETING = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
FSDP2 = FSDP | MEETING | {"FSDP_VERSION": "2"}


@pytest.fixture
def launched_with(monkeypatch):
    """Pretend that `accelerate launch` with these flags started this process, in this environment."""

    def pretend(*words, **environment):
        flags = launch_command_parser().parse_known_args([*words, "pretrain.py", "--train.steps", "3"])[0]
        monkeypatch.setattr(launching, "launch_flags", lambda: flags)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "SLURM_")) or "RANK" in name]:
        monkeypatch.delenv(name)
    return pretend


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--gradient_accumulation_steps 4",
            "steps 4 has no effect here; use --train.accumulate 4",
        ),
        ("--gradient-accumulation-steps=2 --cpu", "--gradient_accumulation_steps 2 .* use --train.accumulate 2"),
        ("--gradient_clipping 0.5", "use --train.max_grad_norm 0.5"),
        ("--use_deepspeed", "--use_deepspeed has no effect here; leave it out"),
        ("--zero_stage 2", "--zero_stage 2 has no effect"),
        ("--use_fsdp --fsdp_version 2 --fsdp_offload_params true", "--fsdp_offload_params true has no effect"),
        ("--use_fsdp --fsdp_activation_checkpointing true", "use --train.gradient_checkpointing 1"),
        ("--use_megatron_lm", "--use_megatron_lm has no effect"),
        ("--fp8_format E4M3", "--fp8_format E4M3 has no effect"),
        ("--dynamo_mode max-autotune", "--dynamo_mode max-autotune has no effect"),
        ("--downcast_bf16", "--downcast_bf16 has no effect"),
        ("--parallelism_config_tp_size 2", "--parallelism_config_tp_size 2 has no effect"),
    ],
)
def test_flags_of_accelerate_that_change_nothing(words, message, launched_with):
    launched_with(*words.split())
    with pytest.raises(UserError, match=message):
        prepare_process()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (FSDP, "FSDP1 is not supported; use fsdp_version: 2"),
        (FSDP | {"FSDP_VERSION": "2"}, "FSDP with one process shards nothing; leave --use_fsdp out"),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params true is not supported; leave it out"),
        (
            FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "true is not supported; use --train.gradient_checkpointing",
        ),
        (FSDP2 | {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, "FULL_STATE_DICT is not supported; checkpoints are"),
        (FSDP2 | {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, "NO_WRAP is not supported; the blocks of the towers are"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "--use_deepspeed of accelerate launch"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "--use_megatron_lm of accelerate launch"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"}, "use --train.accumulate 8"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but there is no RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "4", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "there is no LOCAL_RANK: start all"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "SLURM_STEP_NUM_TASKS is 2, but these .* not meet"),
        (
            {"OMPI_COMM_WORLD_SIZE": "2"},
            "OMPI_COMM_WORLD_SIZE is 2, but .* not meet: start torchrun once a machine",
        ),
    ],
)
def test_environments_in_which_nothing_would_come_of_it(environment, message, launched_with):
    launched_with(**environment)
    with pytest.raises(UserError, match=message):
        prepare_process()
    with pytest.raises(UserError, match=message):
        Runtime()


@pytest.mark.parametrize(
    ("words", "environment", "precision", "message"),
    [
        ("", "fp16", "auto", "--mixed_precision fp16 is not supported; use bf16 or no"),
        (
            "--mixed_precision bf16",
            "bf16",
            "fp32",
            "train.precision is fp32, but .* says --mixed_precision bf16",
        ),
        ("--mixed_precision no", "no", "bf16", "train.precision is bf16, but .* says --mixed_precision no; leave one"),
    ],
)
def test_two_precisions(words, environment, precision, message, launched_with):
    launched_with(*words.split(), ACCELERATE_MIXED_PRECISION=environment)
    with pytest.raises(UserError, match=message):
        Runtime(precision)


def test_what_takes_effect_is_taken(launched_with):
    launched_with("--gradient_accumulation_steps", "1", "--num_cpu_threads_per_process", "2", "--debug")
    prepare_process()
    launched_with("--mixed_precision", "bf16", ACCELERATE_MIXED_PRECISION="bf16", ACCELERATE_USE_CPU="true")
    assert launching.asked_precision() == "bf16"
    launched_with(ACCELERATE_MIXED_PRECISION="no")  # accelerate's own default, which nobody chose
    assert launching.asked_precision() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is what the processes would take")
def test_torchrun_without_a_gpu(tmp_path, free_port):
    script = tmp_path / "ranks.py"
    script.write_text(
        "import sys\nfrom contrastive.distributed.runtime import Runtime\n"
        "r = Runtime()\nprint(r.rank, r.world_size, r.is_main, r.device, file=sys.stderr)\nr.close()"
    )
    status, told = script_on_ranks(2, free_port, script, folder=tmp_path / "out", ACCELERATE_USE_CPU="false")
    assert status == [0, 0] and "0 2 True cpu" in told and "1 2 False cpu" in told


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_memory_of_freed_tensors_is_kept_for_the_next_ones():
    # In processes of their own: malloc's limits hold for a whole process, and cannot be read.
    # The first times may leave a piece of what was freed in the way of the next.
    code = (
        "import resource, torch; from contrastive.distributed import keep_freed_memory; {}\n"
        "torch.set_num_threads(1); [torch.ones(2**24) for _ in range(20)]\n"
        "faults = lambda: resource.getrusage(0).ru_minflt\n"
        "before = faults(); [torch.ones(2**24) for _ in range(5)]; print(faults() - before)"
    )
    kept, given_back = (
        int(subprocess.check_output([sys.executable, "-c", code.format(first)]))
        for first in ("keep_freed_memory()", "")
    )
    assert given_back > 5 * 2**26 / 2**21  # 64 MiB in pages of 2 MiB at most, five times
    assert kept < given_back / 20
