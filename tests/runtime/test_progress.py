"""Progress on a terminal: bars, and one line for all steps."""

from __future__ import annotations

import logging
import re

import pytest

from hf_locstitch.runtime.progress import Progress, overall


@pytest.fixture(autouse=True)
def bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)


def test_the_overall_line_says_what_remains() -> None:
    steps = ["localizing", "merging", "evaluating", "uploading"]
    assert overall(steps, "merging") == "step 2 of 4: merging; then evaluating, uploading"
    assert overall(steps, "uploading") == "step 4 of 4: uploading"


def test_steps_are_told_above_bars(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(True)
    with progress.steps(["localizing", "merging"]):
        for step in ("localizing", "merging"):
            progress.step(step)
            with progress.bar(step, 2) as advance:
                advance(2)
        progress.step("unknown")  # one of a command inside of this one
    err = capsys.readouterr().err
    assert "step 1 of 2: localizing; then merging" in err and "step 2 of 2: merging" in err
    assert err.index("step 2 of 2") < err.index("merging    : 100%") and "unknown" not in err


def test_one_step_needs_no_line_and_what_is_hidden_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for progress, steps in ((Progress(True), ["merging"]), (Progress(False), ["localizing", "merging"])):
        with progress.steps(steps):
            progress.step("merging")
    assert "step" not in capsys.readouterr().err


def test_bars_inside_of_a_bar_do_not_stay(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(True)
    with progress.bar("comparing", 1, " merges") as advance:
        with progress.bar("localizing", 1) as inner:
            inner(1)
        advance(1)
    last = re.split(r"[\r\n]+", capsys.readouterr().err.rstrip())[-1]
    assert last.startswith("comparing") and "100%" in last


def test_bars_are_logged_with_their_times(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "hf_locstitch"), Progress(False).bar("merging", 1):
        pass
    assert re.fullmatch(r"merging: \d+\.\d s", caplog.messages[-1])
