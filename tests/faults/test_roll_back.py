"""Back to the last good checkpoint and past the batches that did harm; the rest of row 33."""

import json
from dataclasses import replace

import pytest
import torch
from launching import ROOT, rows
from rank_processes import script_on_ranks
from safetensors.torch import load_file

from contrastive.errors import UserError
from contrastive.train.health import HealthConfig, Judge, TroubleError
from contrastive.train.options import CheckpointConfig, TrainConfig, check_run
from contrastive.train.pretrain import PretrainConfig

TINY = """
model:
  embed_dim: 16
  image: {image_size: 16, patch_size: 8, width: 16, depth: 1, num_heads: 2, mlp_dim: 32}
  text: {context_length: 8, width: 16, depth: 1, num_heads: 2, mlp_dim: 32}
data: {train: "digits:train", eval: ["digits:test"], vocab_size: 300}
loss: troubled
train: {steps: 20, global_batch_size: 16, max_skipped: 3, ema_decay: 0.9}
curriculum: [{until: 0.55, image_size: 8}]
schedule: {warmup_steps: 2}
evaluation: {every: 8, limit: 16}
checkpoint: {every: 4}
health: {on_non_finite: roll_back, on_spike: roll_back, spike_window: 6, spike_steps: 2}
"""


def train(tmp_path, name, trouble, port, *flags, number=1, **variables):
    """Return the statuses, what was said, and the folder of a run."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    run, script = tmp_path / name, ROOT / "tests" / "faults" / "troubled.py"
    words = ("--config", tmp_path / "tiny.yaml", "--run_folder", run, *flags)
    variables |= {"folder": tmp_path / "told", "TROUBLE": trouble}
    statuses, told = script_on_ranks(number, port, script, *words, **variables)
    return statuses, told, run


def losses(run):
    return [(row["step"], row["loss"].hex()) for row in rows(run)]


def cursor(run, step):
    return json.loads((run / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())


@pytest.mark.slow_fault
def test_row_33_rolls_back_past_the_batches_on_any_number_of_ranks_and_when_killed(tmp_path, free_port):
    trouble = "nan,10,3,0"
    (status,), told, one = train(tmp_path, "one", trouble, free_port)
    assert status == 0, told
    assert "back to step-00000008, and on without the batches of steps 11 to 13" in told
    assert [row["step"] for row in rows(one)] == list(range(1, 21)) and "NaN" not in (one / "metrics.jsonl").read_text()
    assert [row["step"] for row in rows(one, "eval")] == [8, 16, 20]
    (row,) = rows(one, "roll_back")
    assert (row["step"], row["first"], row["last"]) == (8, 11, 13)
    assert cursor(one, 20)["skipped"] == [10, 11, 12] and cursor(one, 20)["run"]["rolled_back"] == 0

    for name, variables in (("two", {}), ("sharded", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})):
        how = {"number": 2, **variables}
        statuses, told, run = train(tmp_path, name, trouble, free_port, "--data.num_workers", "1", **how)
        assert not any(statuses), told
        ours, theirs = ([row["loss"] for row in rows(folder)] for folder in (one, run))
        assert theirs == pytest.approx(ours, rel=1e-4) and cursor(run, 20)["skipped"] == [10, 11, 12]

    # Steps 1 to 14, where 11 to 13 are noticed, then 9 to 11 again.
    with pytest.raises(Exception, match="exit code 9"):
        train(tmp_path, "killed", "nan,10,3,17", free_port)
    killed = tmp_path / "killed"
    assert cursor(killed, 8)["skipped"] == [10, 11, 12] and not (killed / "checkpoints" / "step-00000012").exists()
    (status,), told, _ = train(tmp_path, "killed", trouble, free_port, "--resume")
    assert status == 0 and "resuming" in told and "back to" not in told
    assert losses(killed) == losses(one) and len(rows(killed, "roll_back")) == 1
    for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        a, b = (load_file(run / "checkpoints" / "step-00000020" / file) for run in (one, killed))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_spike_is_rolled_back_too(tmp_path, free_port):
    (status,), told, run = train(tmp_path, "run", "high,14,2,0", free_port, "--train.log_every", "4")
    assert status == 0 and "after 2 high steps" in told and "back to step-00000012" in told
    assert max(row["loss"] for row in rows(run)) < 50 and cursor(run, 20)["skipped"] == [14, 15]


def test_it_stops_where_going_back_does_not_help(tmp_path, free_port):
    (status,), told, run = train(tmp_path, "run", "nan,10,30,0", free_port, "--health.max_roll_backs", "2")
    assert status == 2 and told.count("back to step-00000008, and on") == 2
    assert "after 2 times back to step-00000008 (health.max_roll_backs)" in told.splitlines()[-1]
    assert cursor(run, 8)["skipped"] == [10, 11, 12, 13, 14, 15]


def test_the_only_checkpoint_is_not_enough():
    config = PretrainConfig(train=TrainConfig(steps=2), checkpoint=CheckpointConfig(keep=1))
    check_run(config)
    with pytest.raises(UserError, match="checkpoint.keep is 1"):
        check_run(replace(config, health=HealthConfig(on_spike="roll_back")))


def judged(judge, outcomes):
    for step, loss in enumerate(outcomes, 1):
        judge.consider(step, loss, 1.0)


def test_what_is_a_spike_and_what_is_not(capsys):
    options = HealthConfig(on_spike="roll_back", spike_window=20, spike_steps=3)
    usual = [3 + 0.1 * (step % 5) for step in range(40)]
    judged(Judge(options, 5), [*usual, 9.0, 9.0, *usual])  # not long enough
    judged(Judge(options, 5), [3 + 0.05 * step for step in range(200)])  # rises, but by little
    judged(Judge(options, 5, warm_up=100), [*usual, 9.0, 9.0, 9.0, *usual])
    judged(Judge(options, 5), [*usual[:10], 9.0, 9.0, 9.0])  # nobody knows yet what is usual
    with pytest.raises(TroubleError, match="the loss was 8 after 3 high steps, where 3.2 was usual") as caught:
        judged(Judge(options, 5), [*usual, 9.0, 9.0, 8.0])
    assert (caught.value.first, caught.value.last) == (41, 43)
    before, after = Judge(options, 5), Judge(options, 5)
    judged(before, [*usual, 9.0, 9.0])
    after.restore(json.loads(json.dumps(before.state())))
    with pytest.raises(TroubleError):
        after.consider(43, 8.0, 1.0)
    assert not capsys.readouterr().err
    judged(Judge(HealthConfig(spike_window=20, spike_steps=3), 5), [*usual, *[9.0] * 60])
    assert capsys.readouterr().err.count("warning") == 1, "a loss that stays there is what is usual then"
