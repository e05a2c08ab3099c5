import math
import time

import pytest
import torch

from contrastive.errors import UserError
from contrastive.losses import SigmoidLossConfig
from contrastive.train.health import HealthConfig, Judge
from contrastive.train.progress import Advice, LateFigures, StepTimer


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
