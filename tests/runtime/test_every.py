"""Several requests, and all their errors in one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from hf_locstitch.errors import CheckpointError, DownloadError, LocstitchError, RecipeError
from hf_locstitch.runtime.every import every


def fail(error: LocstitchError) -> int:
    raise error


def calls(*errors: LocstitchError) -> list[Callable[[], int]]:
    return [lambda: 1, *(partial(fail, error) for error in errors)]


def test_results_come_in_order() -> None:
    assert every([partial(int, text) for text in "123"]) == [1, 2, 3]


def test_one_error_is_raised_as_it_is() -> None:
    with pytest.raises(RecipeError, match=r"^one$"):
        every(calls(RecipeError("one")))


def test_all_facts_are_told_and_each_advice_once() -> None:
    with pytest.raises(CheckpointError) as told:
        every(calls(*map(RecipeError, ("a is gone. Check it.", "b is bad. Check it.", "c. Use d."))))
    assert str(told.value) == "3 inputs cannot be used: a is gone; b is bad; c. Check it. Use d."


def test_what_may_pass_is_no_fault_of_the_request() -> None:
    with pytest.raises(DownloadError):
        every(calls(DownloadError("the line is dead"), CheckpointError("a is gone. Check it.")))
    with pytest.raises(DownloadError):
        every(calls(CheckpointError("a is gone. Check it."), DownloadError("the line is dead")))
