"""Ctrl-C, SIGTERM and SIGHUP: what is said is true, and the same command continues."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.models import finetune, random_state, save
from helpers.runs import files_of, quick_merge

from hf_locstitch.cli.main import main
from hf_locstitch.runtime.interrupts import WATCHER

if not hasattr(signal, "SIGHUP"):
    pytest.skip("these are POSIX signals", allow_module_level=True)

SHAPES = {f"layers.{i}.w": (60, 40) for i in range(12)}
SLOWLY = str(Path(__file__).parents[1] / "helpers" / "slowly")


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    base = random_state(0, torch.bfloat16, SHAPES)
    return [save(tmp_path / "base", base), save(tmp_path / "ft", finetune(base, 1))]


def heed() -> None:
    """A shell starts what runs in the background with these ignored, and so they would stay."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def command(inputs: list[Path], out: Path) -> list[str]:
    return ["merge", "--base", str(inputs[0]), "--ft", str(inputs[1]), "--out", str(out), "--no-figures", "--quiet"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_keeps_the_work_and_says_so(
    inputs: list[Path], tmp_path: Path, number: signal.Signals, status: int
) -> None:
    out = tmp_path / "out"
    path = os.pathsep.join([SLOWLY, *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.Popen(
        [sys.executable, "-m", "hf_locstitch", *command(inputs, out)],
        env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True, preexec_fn=heed,
    )  # fmt: skip
    due = time.monotonic() + 60
    while not any(file.stat().st_size for file in tmp_path.glob(".out.*.partial/spill/*")) and time.monotonic() < due:
        time.sleep(0.02)
    kept = list(tmp_path.glob(".out.*.partial"))
    run.send_signal(number)
    _, said = run.communicate(timeout=60)
    assert run.returncode == status, said
    assert said.strip() == (
        "hf-locstitch: error: interrupted. Run the same command again to continue; "
        f"what is done so far is kept in {kept[0]}."
    )
    assert kept[0].is_dir() and not out.exists()
    assert main(command(inputs, out)) == 0
    quick_merge(inputs[0], inputs[1:], out=tmp_path / "due")
    assert files_of(out) == files_of(tmp_path / "due")


def test_before_the_work_begins_no_folder_is_named(
    inputs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

    monkeypatch.setattr("hf_locstitch.plan.planning._open_inputs", stop)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    assert main(command(inputs, tmp_path / "out")) == 143
    assert capsys.readouterr().err.endswith("interrupted. Run the same command again to continue.\n")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


def test_what_nohup_ignores_stays_ignored(inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang_up(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr("hf_locstitch.engine.preflight.warn_of_memory", hang_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main(command(inputs, tmp_path / "out")) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


SWALLOWS = """
import sys, time
from hf_locstitch.cli.main import COMMANDS, main
from hf_locstitch.runtime import interrupts

def swallow(args):
    print("started", flush=True)
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass

interrupts.GRACE = 0.5
COMMANDS["inspect"] = swallow
sys.exit(main(["inspect", "x"]))
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_process_that_does_not_stop_is_ended(number: signal.Signals, status: int) -> None:
    """As where a library swallows the exception."""
    run = subprocess.Popen(
        [sys.executable, "-c", SWALLOWS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed
    )  # fmt: skip
    assert run.stdout is not None and run.stdout.readline() == "started\n"
    run.send_signal(number)
    _, said = run.communicate(timeout=60)
    assert run.returncode == status
    assert said == "hf-locstitch: error: interrupted. Run the same command again to continue.\n"


def test_a_process_that_goes_on_after_the_command_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, inputs: list[Path], tmp_path: Path
) -> None:
    monkeypatch.setattr("hf_locstitch.runtime.interrupts.GRACE", 0.1)
    monkeypatch.setattr("hf_locstitch.plan.planning._open_inputs", lambda *_, **__: os.kill(os.getpid(), 15))
    wakeup = signal.set_wakeup_fd(-1)
    assert main(command(inputs, tmp_path / "out")) == 143
    time.sleep(0.3)  # this process is still here
    assert WATCHER not in [thread.name for thread in threading.enumerate()] and signal.set_wakeup_fd(-1) == wakeup
