"""Work spread over processes: what comes back, and what ends it early."""

import os
import signal
import time
from functools import partial

import pytest

from contrastive.data.shards.parallel import in_parallel
from contrastive.errors import UserError


def scaled(factor, number):
    return factor * number


def killed(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def refused(number):
    if number == 1:
        raise UserError("number 1 is refused")
    time.sleep(30)


@pytest.mark.parametrize("workers", [1, 3])
def test_each_job_comes_back_with_its_result(workers):
    done = dict(in_parallel("scaling", partial(scaled, 2), range(10), workers))
    assert done == {number: 2 * number for number in range(10)}


def test_a_process_that_was_killed_is_said_in_one_line():
    with pytest.raises(UserError, match="a working process was killed, perhaps for its memory") as caught:
        list(in_parallel("dying", killed, range(10), 2))
    assert "\n" not in str(caught.value)


def test_a_fault_ends_the_others_at_once():
    started = time.monotonic()
    with pytest.raises(UserError, match="number 1 is refused"):
        list(in_parallel("waiting", refused, range(2), 2))
    assert time.monotonic() - started < 10
