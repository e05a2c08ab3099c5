"""scripts/checkpoint.py: what it says of a run's checkpoints, what it deletes, and the mean of their weights."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import contrastive
from contrastive.commands.checkpoint_command import main
from contrastive.data.preprocess import PreprocessConfig
from contrastive.data.tokenizer import train_bpe
from contrastive.errors import UserError
from contrastive.files import write_folder, write_manifest
from contrastive.interop.bundle import save_model
from contrastive.models import DualEncoder, ImageTowerConfig, ModelConfig, TextTowerConfig
from contrastive.train.launches import RunLock


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with checkpoints of steps 10 to 50, each with other weights, and an average of its own."""
    run, tokenizer = tmp_path_factory.mktemp("runs") / "made", train_bpe(["a red circle", "a blue star"], 300, 8)
    text = TextTowerConfig(
        vocab_size=tokenizer.vocab_size, context_length=8, width=16, depth=1, num_heads=2, mlp_dim=32
    )
    image = ImageTowerConfig(image_size=16, patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=32)
    config = ModelConfig(embed_dim=16, image=image, text=text)
    for step in range(10, 60, 10):
        torch.manual_seed(step)
        weights = DualEncoder(config).state_dict()
        average = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        write_folder(
            run / "checkpoints" / f"step-{step:08d}",
            lambda to, parts=(weights, average): save_model(
                to, parts[0], config, PreprocessConfig(16), tokenizer, parts[1]
            ),
        )
    (run / "config.yaml").write_text("checkpoint: {every: 10, keep: 2, keep_every: 20}\n")
    return run


@pytest.fixture
def run(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "run"))


def checkpoint(run, step):
    return run / "checkpoints" / f"step-{step:08d}"


def damage(run, step):
    (checkpoint(run, step) / "model.safetensors").write_bytes(b"torn")


def call(*words):
    main(list(map(str, words)))


def steps(run):
    return [int(path.name[5:]) for path in sorted((run / "checkpoints").iterdir())]


def test_list_shows_step_size_date_state_and_milestones(run, capsys):
    damage(run, 30)
    os.utime(checkpoint(run, 50) / "manifest.json", (1_700_000_000, 1_700_000_000))
    call("list", run)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if " kB " in line]
    assert [row[0] for row in rows] == ["10", "20", "30", "40", "50"]
    assert [" ".join(row[5:]) for row in rows] == [
        "whole",
        "whole, a milestone",
        "model.safetensors is damaged",
        "whole, a milestone",
        "whole",
    ]
    assert rows[4][3] == "2023-11-14" and float(rows[4][1]) > 10


def test_a_machine_reads_an_object_a_line(run, capsys):
    damage(run, 30)
    call("list", run, "--json")
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["step"], one["milestone"]) for one in found] == [(s, s % 20 == 0) for s in (10, 20, 30, 40, 50)]
    assert [bool(one["problem"]) for one in found] == [False, False, True, False, False]
    with pytest.raises(UserError, match="--json is for list and verify, and has no effect on prune"):
        call("prune", run, "--json")


def test_verify_says_by_its_status_whether_all_are_whole(run, capsys):
    call("verify", run)
    damage(run, 20)
    with pytest.raises(SystemExit) as stop:
        call("verify", run)
    assert stop.value.code == 1 and "model.safetensors is damaged" in capsys.readouterr().out
    call("list", run)


def test_prune_does_as_the_run_says_and_shows_what_it_frees(run, capsys):
    before = sum(path.stat().st_size for path in checkpoint(run, 10).rglob("*") if path.is_file())
    call("prune", run, "--dry_run")
    assert steps(run) == [10, 20, 30, 40, 50]
    told = capsys.readouterr().out
    assert f"2 would go, {2 * before / 1000:.1f} kB" in told and told.count(", goes") == 2
    (run / "checkpoints" / ".tmp-step-00000060").mkdir()
    call("prune", run)
    assert steps(run) == [20, 40, 50] and "2 deleted" in capsys.readouterr().out


def test_prune_never_deletes_the_last_good_one(run):
    for step in (30, 40, 50):
        damage(run, step)
    call("prune", run, "--keep", "1", "--keep_every", "1000")
    assert steps(run) == [20, 30, 40, 50]
    damage(run, 20)
    call("prune", run, "--keep", "1", "--keep_every", "1000")
    assert steps(run) == [20, 30, 40, 50]


def test_prune_leaves_a_run_alone_that_goes_on(run):
    with RunLock(run):
        with pytest.raises(UserError, match="another process is training in .*; wait for it"):
            call("prune", run)
        call("prune", run, "--dry_run")
    assert steps(run) == [10, 20, 30, 40, 50]


@pytest.mark.parametrize(("which", "chosen"), [(("--last", 3), (20, 40, 50)), (("--steps", 50, 10), (10, 50))])
def test_average_is_the_mean_in_float64_and_an_ordinary_model(which, chosen, run, tmp_path, capsys):
    if which[0] == "--last":
        damage(run, 30)
    call("average", run, *which, "--out", tmp_path / "out")
    told = capsys.readouterr()
    assert f"steps {', '.join(map(str, chosen))}" in told.out and ("passed over" in told.err) == (len(chosen) == 3)
    files = [load_file(checkpoint(run, step) / "model.safetensors") for step in chosen]
    bundle = contrastive.load(tmp_path / "out")
    for name, tensor in bundle.model.state_dict().items():
        mean = torch.stack([each[name].double() for each in files]).mean(0)
        assert torch.equal(tensor, mean.float()), name
    assert bundle.tokenizer(["a red circle"]).shape == (1, 8) and bundle.preprocess.config.image_size == 16
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "manifest.json", "model.safetensors", "tokenizer"]


def test_other_architectures_have_no_mean(run, tmp_path):
    folder = checkpoint(run, 40)
    described = json.loads((folder / "config.json").read_text())
    described["model"]["image"]["num_heads"] = 4
    (folder / "config.json").write_text(json.dumps(described))
    write_manifest(folder)
    with pytest.raises(UserError, match=r"model.image.num_heads is 4 in .*step-00000040, and 2 in step-00000050: only"):
        call("average", run, "--last", "2", "--out", tmp_path / "out")
    weights = load_file(checkpoint(run, 30) / "model.safetensors")
    del weights["logit_scale"]
    save_file(weights, checkpoint(run, 30) / "model.safetensors")
    write_manifest(checkpoint(run, 30))
    with pytest.raises(UserError, match=r"step-00000030/model.safetensors has other weights than .*: logit_scale"):
        call("average", run, "--steps", "30", "50", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("lsit", "RUN"), "lsit"),
        (("list", "RUN/checkpoints"), "RUN/checkpoints has no checkpoints; give the folder of a run"),
        (("list", "RUN", "--keep", "3"), "--keep is for prune, and has no effect on list"),
        (("prune", "RUN", "--last", "3"), "--last is for average, and has no effect on prune"),
        (("prune", "RUN", "--keep", "0"), "keep is 0; it must be above 0"),
        (("average", "RUN", "--last", "3"), "average needs --out FOLDER"),
        (("average", "RUN", "--out", "OUT"), "average needs --out FOLDER, and which checkpoints: --last N, or"),
        (("average", "RUN", "--out", "OUT", "--last", "2", "--steps", "10"), "average needs --out FOLDER, and which"),
        (("average", "RUN", "--out", "OUT", "--last", "9"), "has 5 whole checkpoints; --last 9 asks for more"),
        (("average", "RUN", "--out", "OUT", "--steps", "15"), "no checkpoint of step 15; it has 10, 20, 30, 40, 50"),
        (("average", "RUN", "--out", "RUN", "--last", "2"), "--out RUN exists; give another folder"),
    ],
)
def test_bad_input_is_one_line(words, message, made, tmp_path):
    places = {"RUN": str(made), "OUT": str(tmp_path / "out")}
    for name, place in places.items():
        words, message = [word.replace(name, place) for word in words], message.replace(name, place)
    with pytest.raises(UserError) as error:
        call(*words)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_one_that_is_named_is_refused(run, tmp_path):
    damage(run, 20)
    with pytest.raises(UserError, match="step-00000020 is not whole: model.safetensors is damaged; leave it out"):
        call("average", run, "--steps", "20", "30", "--out", tmp_path / "out")
