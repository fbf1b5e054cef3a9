"""Jobs that threads take turns at, and how they end early."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from helpers.systems import needs_signals

from hf_locstitch.runtime.chunks import check_wanted, for_each


def wait_long() -> None:
    """As a job that waits for something, until it is told that it does so in vain."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        check_wanted()
        time.sleep(0.01)
    pytest.fail("nobody said so")


def test_a_failure_ends_what_the_others_wait_for_and_is_raised() -> None:
    begun = threading.Event()

    def work(job: str) -> None:
        if job == "fail":
            assert begun.wait(20)
            raise ValueError("the cause")
        begun.set()
        wait_long()

    with pytest.raises(ValueError, match="the cause"):
        for_each(work, ["wait", "fail", "never"], workers=2)


@needs_signals
def test_an_interruption_ends_what_is_waited_for() -> None:
    def work(job: int) -> None:
        if job == 0:
            os.kill(os.getpid(), signal.SIGINT)
        wait_long()

    with pytest.raises(KeyboardInterrupt):
        for_each(work, range(9), workers=2)


def test_the_end_of_the_jobs_ends_none_of_them() -> None:
    done: list[int] = []

    def work(job: int) -> None:
        time.sleep(0.05 * job)
        check_wanted()
        done.append(job)

    for_each(work, range(4), workers=4)
    assert sorted(done) == [0, 1, 2, 3]
    check_wanted()  # nor anything outside
