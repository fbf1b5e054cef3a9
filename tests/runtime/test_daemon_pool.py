"""Background work that ends with the process."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from hf_locstitch.runtime.daemon_pool import DaemonPool


def test_results_and_errors() -> None:
    pool, together = DaemonPool(3), threading.Barrier(3)
    futures = [pool.submit(lambda: together.wait(10)) for _ in range(3)]
    assert sorted(future.result(10) for future in futures) == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        pool.submit(lambda: 1 / 0).result(10)
    pool.close()


def test_what_has_not_begun_is_cancelled() -> None:
    pool, go = DaemonPool(1), threading.Event()
    running, waiting = pool.submit(lambda: go.wait(10)), pool.submit(lambda: True)
    while not running.running():
        time.sleep(0.01)
    pool.close()
    go.set()
    assert running.result(10) and waiting.cancelled()


def test_the_process_does_not_wait_for_it() -> None:
    program = (
        "import time\nfrom hf_locstitch.runtime.daemon_pool import DaemonPool\n"
        "DaemonPool(2).submit(lambda: time.sleep(60))\n"
    )
    began = time.monotonic()
    assert subprocess.run([sys.executable, "-c", program], timeout=50, check=False).returncode == 0
    assert time.monotonic() - began < 40
