"""configs/accelerate/: accelerate reads them as meant, nothing in them is refused, and runs start from them."""

import json
import os
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from launching import ROOT, rows
from rank_processes import script_on_ranks

from contrastive.distributed import launching
from contrastive.distributed.launching import asked_precision, asked_to_shard, prepare_process

FOLDER = ROOT / "configs" / "accelerate"
NAMES = {  # ranks on each machine, machines, whether the model is sharded
    "one_gpu": (1, 1, False),
    "eight_gpus": (8, 1, False),
    "fsdp2": (8, 1, True),
    "two_nodes": (8, 2, False),
}
MEETING = {"WORLD_SIZE": "16", "RANK": "3", "LOCAL_RANK": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """What a launcher of the tests has set is not to be taken for what the file says."""
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_", "SLURM_")) or "RANK" in name]:
        monkeypatch.delenv(name)


def flags_of(name: str, *words: str):
    """The flags of `accelerate launch --config_file configs/accelerate/NAME.yaml`, as it resolves them."""
    words = ["--config_file", str(FOLDER / f"{name}.yaml"), *words, "scripts/pretrain.py"]
    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


def environment_of(flags) -> dict[str, str]:
    """What accelerate adds to the environment of a run."""
    if flags.multi_gpu or flags.use_fsdp:
        given = prepare_multi_gpu_env(flags)
    else:
        given = prepare_simple_launcher_cmd_env(flags)[1]
    return {name: value for name, value in given.items() if os.environ.get(name) != value}


def test_all_files_are_tested():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_takes_every_line(name, free_port):
    ranks, machines, sharded = NAMES[name]
    written = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    read = json.loads(json.dumps(load_config_from_file(str(FOLDER / f"{name}.yaml")).to_dict()))
    assert set(written) <= set(ClusterConfig.__dataclass_fields__)
    assert {key: read[key] for key in written} == written
    flags = flags_of(name, "--main_process_port", str(free_port))
    assert (flags.num_processes, flags.num_machines, flags.use_fsdp) == (ranks * machines, machines, sharded)
    assert flags.mixed_precision == "bf16"
    if ranks > 1:
        prepare_multi_gpu_env(flags)
        assert flags.nproc_per_node == str(ranks)
    if machines > 1:
        second = flags_of(name, "--machine_rank", "1")
        prepare_multi_gpu_env(second)
        assert (second.node_rank, second.nnodes, second.rdzv_endpoint) == (1, "2", "10.0.0.1:29500")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_them_is_refused(name, free_port, monkeypatch):
    ranks, _, sharded = NAMES[name]
    given = environment_of(flags_of(name, "--main_process_port", str(free_port))) | (MEETING if ranks > 1 else {})
    asked = launch_command_parser().parse_known_args(["--config_file", f"{name}.yaml", "pretrain.py"])[0]
    monkeypatch.setattr(launching, "launch_flags", lambda: asked)
    monkeypatch.setattr(launching, "end_with_parent", lambda number: None)
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    prepare_process()
    assert asked_to_shard() == sharded and asked_precision() == "bf16"


@pytest.mark.parametrize("name", NAMES)
def test_a_run_starts_from_it(name, tiny, tmp_path, free_port):
    """Two steps of the tiny model, on two ranks over gloo where the file asks for more."""
    run, several = tmp_path / "run", NAMES[name][0] > 1
    environment = environment_of(flags_of(name, "--main_process_port", str(free_port)))
    flags = ("--config", tiny, "--run_folder", run, "--train.steps", "2", "--evaluation.every", "2")
    told = {"folder": tmp_path / "told"} | environment
    status, message = script_on_ranks(1 + several, free_port, ROOT / "scripts/pretrain.py", *flags, **told)
    assert not any(status), message
    assert len(rows(run)) == 2 and "bf16" in message and Path(run, "final", "model.safetensors").exists()
    assert (run / "checkpoints/step-00000002/optimizer").exists() == NAMES[name][2]
