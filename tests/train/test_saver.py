"""Saves beside training: exactly the state of their step, one at a time, failures raised, old ones kept until then."""

import hashlib
import shutil
import threading
from collections import namedtuple
from concurrent.futures import wait

import pytest
import torch
from test_checkpoint import build, flip_bit, tokenizer  # noqa: F401 - a fixture
from test_checkpoint import saver as make_saver

from contrastive.errors import UserError
from contrastive.train import checkpoint
from contrastive.train.saver import expendable

Disk = namedtuple("Disk", "total used free")


@pytest.fixture
def saver(tokenizer, tmp_path):  # noqa: F811
    """Makes savers of one small run; `.parts` is its model, optimizers and average."""

    def make(folder="checkpoints", **options):
        made = make_saver(tmp_path / folder, tokenizer, make.parts, **options)
        savers.append(made)
        return made

    savers, make.parts = [], build(tokenizer)
    yield make
    for made in savers:
        made._thread.shutdown()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def sums(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def held_back(saver, monkeypatch):
    """Has the saver's thread wait with its work until the event that is returned."""
    go, write = threading.Event(), saver._write

    def later(*args):
        assert go.wait(30)
        write(*args)

    monkeypatch.setattr(saver, "_write", later)
    return go


def change(parts):
    model, optimizers, ema = parts
    with torch.no_grad():
        for tensor in [*model.parameters(), *ema.average.values()]:
            tensor.add_(1.0)
        for optimizer in optimizers:
            for state in optimizer.state.values():
                for tensor in state.values():
                    tensor.add_(1.0)


def test_a_background_save_is_the_state_of_its_step_to_the_byte(saver, tmp_path, monkeypatch):
    saver("waited").save({"step": 3}, in_background=False)
    saver("told to wait", background=False).save({"step": 3}, in_background=True)
    with saver() as beside:
        go = held_back(beside, monkeypatch)
        beside.save({"step": 3}, in_background=True)
        change(saver.parts)
        go.set()
        beside.save({"step": 4}, in_background=True)  # into the same buffers, when the first is written
    saver("waited").save({"step": 4}, in_background=False)
    for step in (3, 4):
        found = sums(tmp_path / "checkpoints" / f"step-{step:08d}")
        assert len(found) > 5 and found == sums(tmp_path / "waited" / f"step-{step:08d}")
    assert sums(tmp_path / "told to wait" / "step-00000003") == sums(tmp_path / "waited" / "step-00000003")
    assert sums(tmp_path / "waited" / "step-00000003") != sums(tmp_path / "waited" / "step-00000004")


def test_buffers_are_reused(saver, monkeypatch):
    places, write = [], checkpoint.save_file

    def save_file(tensors, path):
        places.append({name: tensor.data_ptr() for name, tensor in tensors.items()})
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with saver() as beside:
        for step in (1, 2):
            beside.save({"step": step}, in_background=True)
    own = {t.data_ptr() for o in saver.parts[1] for state in o.state.values() for t in state.values()}
    assert places[0] == places[1] and not own & set(places[0].values())


def test_one_at_a_time(saver, tmp_path, monkeypatch):
    with saver() as beside:
        go = held_back(beside, monkeypatch)
        beside.save({"step": 1}, in_background=True)
        assert not beside.failed and not (tmp_path / "checkpoints").exists()
        threading.Timer(0.2, go.set).start()
        beside.save({"step": 2}, in_background=True)
        assert names(tmp_path / "checkpoints")[-1] == "step-00000001", "the second waited for it"
    assert names(tmp_path / "checkpoints") == ["step-00000001", "step-00000002"]


def fail(*args, **how):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("failure", [fail, lambda *args: {}["a bug"]])
def test_a_failure_is_raised_by_the_next_step_and_nothing_is_deleted(failure, saver, tmp_path, monkeypatch):
    with pytest.raises((UserError, KeyError)) as error, saver(keep=1) as beside:  # noqa: PT012
        beside.save({"step": 1}, in_background=True)
        beside.finish()
        before = sums(tmp_path / "checkpoints" / "step-00000001")
        monkeypatch.setattr(checkpoint, "save_file", failure)
        beside.save({"step": 2}, in_background=True)
        wait([beside._pending])
        assert beside.failed == 1
        beside.check(0)
        beside.check(beside.failed)
    if failure is fail:
        assert str(error.value) == (
            f"cannot save {tmp_path}/checkpoints/step-00000002: No space left on device; earlier checkpoints are "
            "intact, make room and continue with --resume"
        )
    assert names(tmp_path / "checkpoints") == ["step-00000001"]
    assert sums(tmp_path / "checkpoints" / "step-00000001") == before


def test_a_failure_is_raised_before_the_run_ends(saver, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(UserError, match="No space left"), saver() as beside:
        beside.save({"step": 1}, in_background=True)


def test_another_error_stays_and_the_writer_ends_first(saver, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(ZeroDivisionError), saver() as beside:
        beside.save({"step": 1}, in_background=True)
        _ = 1 / 0
    assert "besides: cannot save" in capsys.readouterr().err and names(tmp_path / "checkpoints") == []
    with pytest.raises(UserError, match="another rank could not save"):
        saver().check(1)


def test_milestones_stay(saver, tmp_path):
    with saver(keep=2, keep_every=4) as beside:
        for step in range(0, 12):
            beside.save({"step": step}, in_background=True)
    assert names(tmp_path / "checkpoints") == [f"step-{step:08d}" for step in (4, 8, 10, 11)]


def test_damaged_ones_do_not_count_among_the_kept(saver, tmp_path):
    beside = saver(keep=2)
    for step, expected in ((1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [3, 4])):
        beside.save({"step": step}, in_background=False)
        assert names(tmp_path / "checkpoints") == [f"step-{step:08d}" for step in expected]
        if step == 2:
            flip_bit(tmp_path / "checkpoints" / "step-00000002" / "optimizer.safetensors")


def test_one_that_does_not_read_back_replaces_nothing(saver, tmp_path, monkeypatch):
    beside = saver(keep=1)
    beside.save({"step": 1}, in_background=False)
    monkeypatch.setattr("contrastive.train.saver.problem", lambda folder: "model.safetensors is damaged")
    with pytest.raises(UserError, match="step-00000002, just written: model.safetensors is damaged; earlier"):
        beside.save({"step": 2}, in_background=False)
    assert "step-00000001" in names(tmp_path / "checkpoints")


@pytest.mark.parametrize(
    ("wrong", "keep", "keep_every", "gone"),
    [("", 1, None, "12345"), ("", 3, 2, "13"), ("6", 1, None, "1234"), ("56", 2, None, "12"), ("2345", 2, None, "")]
    + [("123456", 1, None, ""), ("", 9, None, "")],
)
def test_what_may_go(wrong, keep, keep_every, gone, tmp_path):
    folders = [tmp_path / f"step-{step:08d}" for step in range(1, 7)]
    found = expendable(folders, keep, keep_every, lambda path: "damaged" if path.name[-1] in wrong else None)
    assert "".join(path.name[-1] for path in found) == gone


def test_a_full_disk_is_said_before_anything_is_written(saver, tmp_path, monkeypatch):
    beside = saver(keep=1)
    beside.save({"step": 1}, in_background=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(10**12, 10**12, 1_000_000))
    with pytest.raises(
        UserError, match=r"checkpoints has 1.0 MB free, and checkpoint step-00000002 needs 1\d.\d MB; make"
    ):
        beside.save({"step": 2}, in_background=False)
    assert names(tmp_path / "checkpoints") == ["step-00000001"]
    with pytest.raises(UserError, match=r"1.0 MB free, and this run with 3 more checkpoints of 1\d.\d MB at a time"):
        saver("new", keep=2).begin(0, 100)
    with pytest.raises(UserError, match=r"this run with 12 more checkpoints"):
        saver("new", keep=1, keep_every=10).begin(0, 100)
    with pytest.raises(UserError, match=r"this run with 1 more checkpoints"):
        saver(keep=1).begin(1, 100)
    assert not (tmp_path / "new").exists()


def test_a_read_only_folder_is_said_at_the_start(saver, tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match="cannot write to .*checkpoints is a file; name another folder"):
        saver().begin(0, 100)


def test_room_is_asked_for_the_state_that_will_be_there(saver, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("contrastive.train.saver.check_room", lambda folder, needed, *words: asked.append(needed))
    model, optimizers, _ = saver.parts
    saver().begin(0, 1)
    for optimizer in optimizers:
        optimizer.state.clear()
    saver().begin(0, 1)
    steps = 4 * len(list(model.parameters()))  # of AdamW: a number for each tensor, which the estimate leaves out
    assert asked[0] - 2 * steps == asked[1]
