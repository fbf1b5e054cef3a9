"""What the page does; skipped without Gradio."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_locstitch.ui.config import UiConfig
from hf_locstitch.ui.jobs import Job
from hf_locstitch.ui.order import Order
from hf_locstitch.ui.visitor import Visitor

pytest.importorskip("gradio")
RUNNING = Job("k", "o", Order("org/base", ("org/a",), push_to="me/x"), status="running")
ANYBODY: Any = SimpleNamespace(cookies={})


class OneJob:
    """A job as it is now."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def of(self, visitor: Visitor) -> list[Job]:
        return [self.job]

    def ahead(self, key: str) -> int:
        return 0

    def wait(self, seconds: float) -> None:
        pass


def make_page(jobs: Any) -> Any:
    from hf_locstitch.ui.app import Page

    return Page(UiConfig(Path("work")), jobs, lambda cookies: Visitor("me", here=True))


def test_the_end_of_a_merge_is_shown_though_it_comes_while_its_progress_is_sent() -> None:
    jobs = OneJob(RUNNING)
    watched = make_page(jobs).watch(ANYBODY)
    assert "Merging" in next(watched)[0]
    jobs.job = replace(RUNNING, status="done", url="http://hub/me/x", commit="c" * 40)
    assert "Open its page" in [*watched][-1][0]


def test_the_form_is_filled_with_what_was_planned_and_with_nothing_else() -> None:
    page = make_page(OneJob(RUNNING))
    base, models, method, density, scale, whole = page.restore(["org/base", ["org/a"], "locstitch", 5, 1])
    assert (base, models, method, density["value"], scale, whole["visible"]) == (
        "org/base", ["org/a"], "locstitch", 5, 1, False,
    )  # fmt: skip
    for kept in (None, [], ["/etc", ["org/a"], "locstitch", 5, 1], ["org/base", 3, "locstitch", 5, 1], {"base": 1}):
        assert all(one.get("__type__") == "update" and "value" not in one for one in page.restore(kept))
