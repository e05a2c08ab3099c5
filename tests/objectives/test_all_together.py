"""All objectives at once: a run that is killed in a step goes on to the bit."""

import shutil

import pytest
import torch
from launching import ROOT, assert_same_run, rows
from rank_processes import script_on_mortal_ranks, script_on_ranks
from safetensors.torch import load_file
from torchvision.utils import save_image

FAULTY = ROOT / "tests" / "faults" / "faulty.py"
ALL = """
objectives:
  caption: {depth: 1, start: 0.2}
  distill: {teacher: [TEACHER], feature_weight: 0.5, project: true}
  self_distill: {crops: 2, crop_size: 8, start: 0.5, prototypes: 16, hidden: 16, bottleneck: 8}
  masked: {start: 0.4, prototypes: 16, hidden: 16, bottleneck: 8, balance: sinkhorn}
  patch_distill: {start: 0.6, share: 0.5, prototypes: 16, hidden: 16, bottleneck: 8}
  patch_mean: {start: 0.3}
  slip: {hidden: 16, out: 8}
  hard_negatives: {column: wrong}
"""
NAMES = {
    *("contrastive", "caption", "distill", "self_distill", "masked", "patch_distill", "patch_mean", "slip"),
    "hard_negatives",
}


@pytest.fixture
def everything(tiny, tmp_path, free_port):
    """The configuration of a run with all of them, on a table with wrong captions, and the words that start it."""
    (tmp_path / "pictures").mkdir()
    lines = ["image,caption,wrong"]
    for number in range(48):
        picture = torch.rand(3, 20, 24, generator=torch.Generator().manual_seed(number))
        save_image(picture, tmp_path / f"pictures/{number}.png")
        lines.append(f"pictures/{number}.png,a picture of {number},a picture of {number + 1}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    table = ["--data.train", tmp_path / "pairs.csv", "--data.eval", tmp_path / "pairs.csv"]
    words = ["--config", tiny, *table, "--loss", "faulty"]
    quiet = {"FAULT": "none,0,0,0"}
    teacher = [*words, "--run_folder", tmp_path / "teacher", "--train.steps", 1]
    status, told = script_on_ranks(1, free_port, FAULTY, *teacher, folder=tmp_path / "told-teacher", **quiet)
    assert status == [0], told
    with tiny.open("a") as file:
        file.write(ALL.replace("TEACHER", str(tmp_path / "teacher")))
    words += ["--train.accumulate", 2, "--train.ema_decay", 0.9]
    return [*words, "--checkpoint.keep", 9]


def test_a_run_rolls_back_across_a_begin(everything, tmp_path, free_port):
    """From step 5 and 6, which are not finite, to a checkpoint from before some of them had begun."""
    words = [*everything, "--run_folder", tmp_path / "run", "--health.on_non_finite", "roll_back"]
    words += ["--train.max_skipped", 2, "--checkpoint.every", 3]
    statuses, told = script_on_ranks(1, free_port, FAULTY, *words, folder=tmp_path / "told", FAULT="nan,0,5,2")
    assert statuses == [0] and "back to step-00000003" in told, told
    last = rows(tmp_path / "run")[-1]
    assert last["step"] == 8 and all(last[f"{name}_loss"] == last[f"{name}_loss"] for name in NAMES)


def test_a_kill_changes_no_bit(everything, tmp_path, free_port):
    def run(name, fault, *more, mortal=False):
        start = script_on_mortal_ranks if mortal else script_on_ranks
        told = tmp_path / f"told-{name}-{fault}"
        words = [*everything, "--run_folder", tmp_path / name, *more]
        return start(2, free_port, FAULTY, *words, folder=told, FAULT=fault)

    statuses, told = run("whole", "none,0,0,0")
    assert statuses == [0, 0], told
    names = [{name.removesuffix("_loss") for name in row if name.endswith("_loss")} for row in rows(tmp_path / "whole")]
    assert names[0] == {"contrastive", "distill", "slip", "hard_negatives"} and names[-1] == NAMES
    statuses, told = run("killed", "die,1,6,1", mortal=True)
    assert statuses[1] == -9 and statuses[0] != 0, told
    assert not (tmp_path / "killed/final").exists() and (tmp_path / "killed/checkpoints/step-00000004").exists()
    shutil.copytree(tmp_path / "killed", tmp_path / "again")
    statuses, told = run("again", "none,0,0,0", "--resume")
    assert statuses == [0, 0], told
    assert_same_run(tmp_path / "again", tmp_path / "whole")
    for name in ("model", "ema"):
        file = f"checkpoints/step-00000008/objectives/{name}.safetensors"
        ours, theirs = load_file(tmp_path / "again" / file), load_file(tmp_path / "whole" / file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
