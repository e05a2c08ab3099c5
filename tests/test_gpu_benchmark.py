"""benchmarks/gpu.py: every part at toy size by the real command; and that full-size commands say what exists."""

import importlib
import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from launching import ROOT, environment

from contrastive.config import parse, rename_flags
from contrastive.named_sections import take_option

SCRIPT = ROOT / "benchmarks" / "gpu.py"


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu_parts")


def run(tmp_path, *flags):
    where = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "rows")]
    command = [sys.executable, str(SCRIPT), *where, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=1200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ended(tmp_path):
    state = json.loads((tmp_path / "work" / "state.json").read_text())
    return {name: outcome["ended"] for name, outcome in state["parts"].items()}


def rows(tmp_path, name):
    path = tmp_path / "rows" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_every_part_runs_at_toy_size(tmp_path, parts):
    before = {path: path.stat().st_size for path in (ROOT / "benchmarks" / "results").iterdir()}
    told = run(tmp_path, "--toy")
    expected = dict.fromkeys([part.name for part in parts.PARTS], "done")
    assert ended(tmp_path) == expected
    outcomes = json.loads((tmp_path / "work" / "state.json").read_text())["parts"]
    for part in parts.PARTS:
        assert part.name in told
        assert outcomes[part.name]["found"], part.name
    assert [row["rival"] for row in rows(tmp_path, "loss")] == 4 * ["ours"]
    assert rows(tmp_path, "step")[1]["ratio"] > 0 and rows(tmp_path, "step")[0]["block_tflop"] > 0
    checks = {row["what"]: row for row in rows(tmp_path, "gpu")}
    assert {"tests", "copies", "packed", "curriculum", "encoder", "captioner", "resume", "onnx"} < set(checks)
    assert checks["encoder"]["cosine_min"] > 0.99 and checks["resume"]["loss_difference"] == 0
    # Not into the repository; another process may append a row of its own.
    assert {path: path.stat().st_size for path in before} == before

    told = run(tmp_path, "--toy", "--continue")
    assert "done," not in told and len(rows(tmp_path, "loss")) == 4 and ended(tmp_path) == expected


def call(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    status = 0
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_what_has_no_time_is_not_started(tmp_path, monkeypatch, capsys):
    where = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "rows")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # set by --toy: so it is undone here
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("signal.signal", lambda *_: None)
    _, told, _ = call(monkeypatch, capsys, *where, "--toy", "--only", "probe", "copies", "--minutes", "0.1")
    assert told.count("not started: no time left") == 2 and "not run" in told
    assert not (tmp_path / "work" / "state.json").exists() and not (tmp_path / "rows").exists()


@pytest.mark.slow
def test_it_goes_on_with_what_it_has_not_done(tmp_path):
    run(tmp_path, "--toy", "--only", "probe", "--minutes", "15")
    told = run(tmp_path, "--toy", "--only", "probe", "copies", "--continue")
    assert "copies: done" in told and "probe: done" not in told
    assert ended(tmp_path) == {"probe": "done", "copies": "done"} and len(rows(tmp_path, "probe")) == 1


def test_an_unknown_part_is_one_line(tmp_path, monkeypatch, capsys):
    status, _, told = call(monkeypatch, capsys, "--only", "losses", "stp", "--work", str(tmp_path / "work"))
    assert status == 2 and told.count("\n") == 1 and not (tmp_path / "work").exists()
    assert told == "gpu.py: error: --only stp: no such part. Did you mean 'step'? --list shows them\n"


def test_no_time_and_no_gpu_are_one_line(tmp_path, monkeypatch, capsys):
    where = ["--work", str(tmp_path / "work")]
    assert (
        call(monkeypatch, capsys, *where, "--minutes", "0")[2] == "gpu.py: error: minutes is 0.0; it must be above 0\n"
    )
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    status, _, told = call(monkeypatch, capsys, *where)
    assert status == 2 and told.startswith("gpu.py: error: this machine has no GPU") and told.count("\n") == 1


def test_what_this_machine_lacks_is_said(parts, tmp_path):
    step, onnx = (next(part for part in parts.PARTS if part.name == name) for name in ("step", "onnx"))
    places = parts.Places("rows", str(tmp_path), "data", "scenes")
    assert step.missing(False, places, lambda: 0) == "needs 1 GPUs, this machine has 0"
    lacking = replace(step, needs=("open_clip", "no_such_module"))
    assert lacking.missing(False, places, lambda: 1) == "not installed: no_such_module"
    assert "goes on from the run of 'quickstart'" in onnx.missing(False, places, lambda: 1)


@pytest.fixture
def stubborn(parts, monkeypatch, tmp_path):
    """gpu.py's functions, and a part that does not end when told to."""
    script = tmp_path / "stubborn.py"
    script.write_text("import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('here', flush=True)\n")
    with script.open("a") as file:
        file.write("time.sleep(60)\n")
    gpu = runpy.run_path(str(SCRIPT))
    return gpu, parts.Part("stubborn", "", str(script), "", minutes=0.05, toy="", gpus=0), parts


def test_a_part_is_ended_at_its_limit(stubborn, tmp_path, monkeypatch):
    gpu, part, parts = stubborn
    monkeypatch.setitem(gpu["_outcome"].__globals__, "GRACE", 0.5)
    places = parts.Places(str(tmp_path), str(tmp_path), "data", "scenes")
    outcome = gpu["_outcome"](part, False, places, float("inf"), lambda text: None)
    assert outcome["ended"] == "out of time" and 3 <= outcome["seconds"] < 30
    assert (tmp_path / "stubborn.log").read_text() == "here\n"


def test_a_part_that_fails_is_told_by_its_last_line(stubborn, tmp_path):
    gpu, part, parts = stubborn
    Path(part.command).write_text("import sys\nprint('so far')\nsys.exit('no such thing\\n───')\n")
    places = parts.Places(str(tmp_path), str(tmp_path), "data", "scenes")
    outcome = gpu["_outcome"](part, False, places, float("inf"), lambda text: None)
    assert outcome["ended"] == "failed: no such thing"


def test_commands_at_full_size_have_flags_and_files_that_exist(parts):
    from accelerate.commands.launch import launch_command_parser

    from contrastive.train.classify import TrainClassifierConfig
    from contrastive.train.pretrain import PretrainConfig

    places = parts.Places("rows", "work", "data", "scenes")
    configs = {"pretrain.py": PretrainConfig, "train_classifier.py": TrainClassifierConfig}
    for part in parts.PARTS:
        script, *flags = part.arguments(False, places)
        words = {"prog": part.name, "description": ""}
        if script == "benchmarks/train.py":
            flags, launch = take_option(flags[1:], "launch")
            launch_command_parser().parse_args([*(launch or "").split(), f"scripts/{flags[0]}"])
            flags, config = take_option(flags, "config")
            cls = configs[flags[0]]
            flags = rename_flags(flags[1:], {"data": "data.train"}) if "classifier" in flags[0] else flags[1:]
            parse(cls, flags, config and ROOT / config, **words)
        else:
            options = parse(importlib.import_module(Path(script).stem).Options, flags, **words)
            assert all((ROOT / file).exists() for file in getattr(options, "files", ()))


def test_the_page_names_every_part(parts):
    page = (ROOT / "benchmarks" / "GPU.md").read_text()
    named = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| `")]
    assert [name.strip("`") for name in named] == [part.name for part in parts.PARTS]


def test_a_toy_state_is_not_gone_on_with_at_full_size(tmp_path, monkeypatch, capsys):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "state.json").write_text('{"toy": true, "parts": {}}')
    status, _, told = call(monkeypatch, capsys, "--continue", "--work", str(tmp_path / "work"))
    assert status == 2 and "is of a run at toy size; give another --work" in told and told.count("\n") == 1
