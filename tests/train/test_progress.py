import math
import time

import pytest
import torch

from contrastive.errors import UserError
from contrastive.losses import SigmoidLossConfig
from contrastive.train.health import HealthConfig, Judge
from contrastive.train.progress import Advice, Epochs, LateFigures, ProgressBar, StepTimer


def row(step, loss, data_wait=0.0):
    return {"step": step, "loss": loss, "data_wait": data_wait}


def test_a_run_that_sits_at_chance_is_told_once_what_to_do(capsys):
    chance = SigmoidLossConfig().chance_loss(64)
    advice = Advice(chance, "lower optimizer.lr", total_steps=1000)
    for step in range(1, 200):
        advice.consider(row(step, chance))
    assert capsys.readouterr().err == ""  # warm-up is given time
    for step in range(200, 400):
        advice.consider(row(step, chance))
    message = capsys.readouterr().err
    assert message.count("warning") == 1 and "optimizer.lr" in message


def test_a_run_that_learns_is_left_alone(capsys):
    advice = Advice(SigmoidLossConfig().chance_loss(64), "", total_steps=1000)
    for step in range(1, 500):
        advice.consider(row(step, 3.0))
    assert capsys.readouterr().err == ""


def test_a_starving_device_is_named(capsys):
    advice = Advice(1.0, "", total_steps=1000)
    for step in range(1, 60):
        advice.consider(row(step, 0.1, data_wait=0.6))
    message = capsys.readouterr().err
    assert message.count("warning") == 1 and "60%" in message and "--data.num_workers" in message


@pytest.mark.parametrize(("samples", "batch", "epochs"), [(60, 20, 4), (100, 32, 3), (45, 30, 5), (7, 5, 9)])
def test_each_epoch_ends_once_and_the_last_with_the_run(samples, batch, epochs):
    steps = round(epochs * samples / batch)
    run = Epochs(samples, batch, steps)
    assert [end for step in range(1, steps + 1) if (end := run.ended(step))] == list(range(1, epochs + 1))
    assert run.ended(steps) == epochs and run.ended(0) is None and str(run) == str(epochs)
    assert str(Epochs(1000, 10, 25)) == "0.25"


def test_lines_where_there_is_no_terminal(capsys, monkeypatch):
    clock = iter(range(100, 1000, 20))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with ProgressBar(0, Epochs(100, 20, 10)) as bar:
        for step in range(1, 6):
            common = {"grad_norm": 1.0, "lr": 1e-3, "samples_per_second": 50.0, "data_wait": 0.05}
            bar.show({"step": step, "loss": 3.0 - step, **common, "logit_bias": -9.5, "accuracy": 10.0 * step})
        bar.epoch_ended(5, 1, {"zero_shot/a/b:test/acc1": 71.0, "zero_shot/a/b:test/acc5": 99.0})
    told = capsys.readouterr().err.splitlines()
    figures = "loss -2.0000  bias -9.50  accuracy 50.0 %  lr 0.001  50 samples/s  data wait 5%"
    assert told[4].startswith(f"step 5/10  epoch 1.00/2  {figures}  0:0") and told[4].endswith(" left")
    assert told[5].startswith("Epoch [1/2]  loss 0.0000  accuracy 30.0 %  a/b:test acc@1 71.0 %  0:0")
    assert len(told) == 6 and "left" not in told[0], "the first step may have compiled"


def test_timer_tells_waiting_from_working():
    timer = StepTimer(batch_size=10)

    def loader():
        for _ in range(3):
            time.sleep(0.03)
            yield

    for _ in timer.waiting_for(loader()):
        time.sleep(0.01)
        timer.step_done()
        time.sleep(0.05)  # while a save ran
    # 0.75 and 250 where sleeps are exact; a loaded machine stretches them.
    assert 0.4 < timer.data_wait < 0.95
    assert 20 < timer.samples_per_second < 260


def test_rows_come_one_late_and_whole():
    written = []
    figures = LateFigures(Judge(HealthConfig(), 3).consider, written.append)
    figures.flush()
    for step in range(1, 5):
        loss = torch.tensor(step / 10)
        figures.step_done(step, loss, torch.tensor(2.0))
        if step % 2 == 0:
            figures.put({"step": step, "loss": loss, "lr": 0.1, "logit_bias": None})
            assert [row["step"] for row in written] == list(range(2, step, 2))
    figures.flush()
    figures.flush()
    assert [row["step"] for row in written] == [2, 4] and list(written[0]) == ["step", "loss", "lr", "logit_bias"]
    assert written[1] == {"step": 4, "loss": torch.tensor(0.4).item(), "lr": 0.1, "logit_bias": None}


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (1.0, math.inf), (1.0, math.nan)])
def test_skipped_steps_are_said_and_too_many_in_a_row_stop(bad, capsys):
    written = []
    figures = LateFigures(Judge(HealthConfig(), 3).consider, written.append)

    def do(first, outcomes):
        for step, (loss, norm) in enumerate(outcomes, first):
            figures.step_done(step, torch.tensor(loss), torch.tensor(norm))

    do(1, [(1.0, 1.0), bad, bad, (1.0, 1.0), bad])  # a good step forgives the bad ones before
    with pytest.raises(UserError, match="elsewhere"), figures:
        figures.put({"step": 5})
        raise UserError("elsewhere")
    assert written == [{"step": 5}], "the row before the error is there"
    told = capsys.readouterr().err
    assert "step 1 " not in told and "step 2 skipped" in told and "step 5 skipped" in told
    do(6, [bad, bad])
    with pytest.raises(UserError, match="3 steps in a row had no finite loss or gradient"):
        figures.flush()
