import time

from contrastive.train.health import HangWatch


def hangs_here():
    time.sleep(1.2)


def test_stacks_are_written_and_said_where_no_step_ends(tmp_path, capsys):
    with HangWatch(tmp_path, 0, seconds=0.4, patience=60) as watch:
        hangs_here()
        assert not watch.path.read_text(), "the first step may take long"
        watch.step_done()
        hangs_here()
        watch.step_done()
    assert "hangs_here" in watch.path.read_text()
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "has ended for 0.4 seconds" in told and str(tmp_path / "stacks") in told


def test_steps_that_end_and_what_may_take_long_leave_nothing_behind(tmp_path, capsys):
    with HangWatch(tmp_path, 3, seconds=0.5, patience=60) as watch:
        for _ in range(10):
            watch.step_done()
            time.sleep(0.1)
        with watch.patient():
            hangs_here()
        time.sleep(0.2)
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().err
