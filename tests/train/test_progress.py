import time

from contrastive.losses import SigmoidLossConfig
from contrastive.train.progress import Advice, StepTimer


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
