"""Signals at any time: a run saves, says so ends with a status of its own; resumed, nothing is done or told twice."""

import json
import os
import signal
import subprocess
import time

import pytest
from accelerate import tracking
from launching import command, environment, pretrain_here, rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from contrastive.files import read_json
from contrastive.train.bad_samples import BadSamples
from contrastive.train.launches import LOCK, STOPPED, record_stop, stop_requests, stopped_status


def test_requests_that_come_again_change_nothing_but_a_second_ctrl_c(monkeypatch, capfd):
    monkeypatch.setattr("contrastive.train.launches.AGAIN", 0.2)
    with stop_requests() as received:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert received == [signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT]
        assert capfd.readouterr().err.count("Ctrl-C again ends it at once") == 1
        time.sleep(0.3)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_what_a_stopped_run_leaves(number, tmp_path):
    record_stop(tmp_path, 7, [number, signal.SIGTERM])
    left = read_json(tmp_path / STOPPED)
    assert left["step"] == 7 and left["signal"] == number.name and left["time"].startswith("20")
    assert stopped_status(tmp_path) == 128 + number


def test_signals_while_saving_and_evaluating(tiny, tmp_path, monkeypatch, capsys):
    """Twice in a save, then in the evaluation after it: one more step, one whole checkpoint, and on from there."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    pretrain_here("--config", tiny, "--run_folder", whole)
    from contrastive.train.contrastive_task import ContrastiveTask

    evaluate, save = ContrastiveTask.evaluate, ContrastiveTask.save
    told = []

    def signalled(original):
        def call(*args, **words):
            if len(told) < 4:
                told.append(os.kill(os.getpid(), signal.SIGTERM))
            return original(*args, **words)

        return call

    monkeypatch.setattr(ContrastiveTask, "evaluate", signalled(evaluate))
    monkeypatch.setattr(ContrastiveTask, "save", signalled(save))
    with pytest.raises(SystemExit) as end:
        pretrain_here("--config", tiny, "--run_folder", run)
    assert end.value.code == 143 and "stopped at step 1 and saved" in capsys.readouterr().err
    assert read_json(run / STOPPED)["step"] == 1 and not (run / LOCK).exists()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000000", "step-00000001"]
    monkeypatch.undo()
    pretrain_here("--run_folder", run, "--resume")
    assert not (run / STOPPED).exists()
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(whole)]


def test_a_signal_before_training_or_while_the_final_model_is_written(tiny, tmp_path, monkeypatch):
    from contrastive.train import run as run_module

    def killed_in(name):
        original = getattr(run_module, name)

        def call(*args, **words):
            os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **words)

        monkeypatch.setattr(run_module, name, call)

    run = tmp_path / "run"
    killed_in("order_for")
    with pytest.raises(SystemExit) as end:
        pretrain_here("--config", tiny, "--run_folder", run)
    assert end.value.code == 143 and not run.exists()
    monkeypatch.undo()
    killed_in("_finish")
    pretrain_here("--config", tiny, "--run_folder", run)
    assert (run / "final/model.safetensors").exists() and not (run / STOPPED).exists()


def test_a_kill_within_an_evaluation(tiny, tmp_path, monkeypatch):
    """The one that was cut short is done, all others once; tensorboard shows every step once, too."""
    from contrastive.train.contrastive_task import ContrastiveTask

    whole, run = tmp_path / "whole", tmp_path / "run"
    pretrain_here("--config", tiny, "--run_folder", whole)
    original, calls = ContrastiveTask.evaluate, []

    def evaluate(self, *args):
        calls.append(len(calls))
        if len(calls) == 2:
            raise MemoryError
        return original(self, *args)

    monkeypatch.setattr(ContrastiveTask, "evaluate", evaluate)
    flags = ("--config", tiny, "--evaluation.every", "3", "--trackers", "tensorboard")
    with pytest.raises(MemoryError):
        pretrain_here(*flags, "--run_folder", run)  # at step 6, saved
    pretrain_here(*flags, "--run_folder", run, "--resume")
    assert len(calls) == 4 and [row["step"] for row in rows(run, "eval")] == [3, 6, 8]
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(whole)]
    events = EventAccumulator(str(run / "run"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    assert [event.step for event in events.Scalars("eval/zero_shot/digits:test/acc1")] == [3, 6, 8]


def test_tensorboard_forgets_the_steps_that_a_resumed_run_repeats(tiny, tmp_path, monkeypatch):
    from contrastive.train.loop import Trainer

    run, step = tmp_path / "run", Trainer._one_step

    def killed(self, *args):
        if self.step == 5:
            raise MemoryError
        return step(self, *args)

    monkeypatch.setattr(Trainer, "_one_step", killed)
    flags = ("--config", tiny, "--run_folder", run, "--trackers", "tensorboard")
    with pytest.raises(MemoryError):
        pretrain_here(*flags)  # saved at step 4
    monkeypatch.undo()
    time.sleep(1)  # the names of its files tell seconds, and are read in their order
    pretrain_here(*flags, "--resume")
    events = EventAccumulator(str(run / "run"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))


def test_a_resumed_run_is_the_same_one_to_its_tracker(tiny, tmp_path, monkeypatch):
    opened = []

    class Fake(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "wandb", False, None

        def __init__(self, run_name, **words):
            super().__init__()
            opened.append((run_name, words))

        def start(self):
            pass

        def store_init_configuration(self, values):
            pass

        def log(self, values, step, **words):
            pass

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Fake)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.WANDB])
    for name, steps, more in (("one", "2", ()), ("one", "4", ("--resume",)), ("two", "2", ())):
        flags = ("--run_folder", tmp_path / name, "--train.steps", steps, "--trackers", "wandb")
        pretrain_here("--config", tiny, *flags, *more)
    one, again, two = opened
    assert one == again and one[0] == "one" and one[1]["resume"] == "allow"
    assert one[1]["id"] and one[1]["id"] != two[1]["id"]


def test_the_window_of_bad_samples_goes_on():
    whole, before, resumed, forgetful = (BadSamples(0.01, 1000, 100) for _ in range(4))
    seen = [0, 3, 0, 4, 0, 0, 2, 0]
    for count in seen[:5]:
        whole.too_many(count), before.too_many(count)
    resumed.go_on_from(json.loads(json.dumps(before.window_seen())))
    for count in seen[5:]:
        assert resumed.too_many(count) == whole.too_many(count)
    assert resumed.too_many(2) and not forgetful.too_many(2)  # 11 of 1000


def test_the_window_is_in_a_checkpoint(tiny, tmp_path):
    run = tmp_path / "run"
    pretrain_here("--config", tiny, "--run_folder", run, "--train.steps", "2")
    assert read_json(run / "checkpoints/step-00000002/state.json")["bad_samples"] == "0 0"


def test_ctrl_c_ends_the_command_without_a_traceback(tiny, tmp_path):
    run = tmp_path / "run"
    flags = ("--config", tiny, "--run_folder", run, "--train.steps", "100000", "--evaluation.every", "50000")
    process = subprocess.Popen(command(*flags), env=environment(), stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or not rows(run):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "saved; continue with --resume" in told and "Traceback" not in told
    assert read_json(run / STOPPED)["signal"] == "SIGINT" and not (run / LOCK).exists()
