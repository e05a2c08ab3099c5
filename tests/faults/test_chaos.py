"""scripts/chaos.py: kills are found harmless, and a run that is another is not called the same."""

import json
import shutil

import pytest

from contrastive.errors import UserError
from scripts.chaos import ChaosConfig, Round, Run, differences, main, note_resumed, rows_by_step

ROW = {"kind": "train", "step": 1, "loss": 0.1, "samples_per_second": 5.0, "data_wait": 0.5}


def made_up(tmp_path, name):
    run = Run(ChaosConfig(folder=str(tmp_path)), name, [])
    (run.folder / "final").mkdir(parents=True)
    (run.folder / "final" / "model.safetensors").write_bytes(b"weights")
    (run.folder / "report.html").write_text("")
    (run.folder / "metrics.jsonl").write_text(json.dumps(ROW) + "\n")
    return run


@pytest.fixture
def runs(tmp_path):
    return made_up(tmp_path, "run"), made_up(tmp_path, "whole")


def test_what_differs_is_named(runs):
    run, whole = runs
    other = ROW | {"samples_per_second": 9.0}
    (run.folder / "metrics.jsonl").write_text(json.dumps(other) + "\n")
    assert differences(run, whole) == []
    (run.folder / "metrics.jsonl").write_text(json.dumps(other | {"loss": 0.1 + 2**-55}) + "\n")
    assert differences(run, whole) == ["metrics.jsonl has other rows"]
    shutil.rmtree(run.folder / "final")
    (run.folder / "checkpoints" / ".tmp-step-00000010").mkdir(parents=True)
    found = differences(run, whole)
    assert "final/model.safetensors is another" in found and found[-1].endswith("step-00000010 is left behind")


def test_rounds_learn_where_the_run_went_on(runs):
    run, _ = runs
    rounds = [
        Round("group", "step", 12, 0.1, went_on=10),
        Round("rank", "start", 10, 0.1),
        Round("rank", "step", 17, 1),
    ]
    run.log.write_text("loading\n")
    note_resumed(rounds, run)
    assert rounds[1].went_on is None
    run.log.write_text("resuming runs/chaos/run from step-00000010\n")
    note_resumed(rounds, run)
    assert [each.went_on for each in rounds] == [10, 10, 10] and run.last_row() == ROW
    assert list(rows_by_step(run)) == [("train", 1)]


def test_options_that_cannot_be(tmp_path):
    for flags, words in ((["--rounds", "0"], "rounds is 0"), (["--fsdp", "--ranks", "1"], "shards nothing")):
        with pytest.raises(UserError, match=words):
            main(["--folder", str(tmp_path / "new"), *flags])
    with pytest.raises(UserError, match="exists; give another --folder"):
        main(["--folder", str(tmp_path)])


@pytest.mark.slow_fault
def test_two_rounds(tmp_path, capsys):
    main(["--rounds", "2", "--folder", str(tmp_path / "chaos"), "--seed", "3"])
    assert "2 rounds on 2 ranks, 90 steps: losses and weights are those" in capsys.readouterr().err
