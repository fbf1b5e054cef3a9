"""Progress bars on stderr: one per stage, on a terminal only."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Advance = Callable[[int], None]


@contextmanager
def hide_library_bars() -> Iterator[None]:
    """Hide the Hub client's bars: they would count the same bytes again, even with --quiet."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    with _without_bars(are_progress_bars_disabled(), disable_progress_bars, enable_progress_bars):
        yield


@contextmanager
def hide_all_library_bars() -> Iterator[None]:
    """Also hide the bars of the libraries that load models and data. Slow to import."""
    import datasets
    from transformers.utils import logging

    hidden = not logging.is_progress_bar_enabled()
    with (
        hide_library_bars(),  # outermost: transformers switches the client's too
        _without_bars(hidden, logging.disable_progress_bar, logging.enable_progress_bar),
        _without_bars(
            datasets.are_progress_bars_disabled(), datasets.disable_progress_bars, datasets.enable_progress_bars
        ),
    ):
        yield


@contextmanager
def _without_bars(hidden: bool, hide: Callable[[], object], show: Callable[[], object]) -> Iterator[None]:
    """hidden: whether they were hidden before, and stay so afterwards."""
    hide()
    try:
        yield
    finally:
        (hide if hidden else show)()


class Progress:
    """show: None means only on a terminal. HF_HUB_DISABLE_PROGRESS_BARS=1 hides them always."""

    def __init__(self, show: bool | None = None) -> None:
        hidden = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")
        self._show = not hidden and (sys.stderr.isatty() if show is None else show)

    def say(self, text: str) -> None:
        """A line between the bars, where they are shown."""
        if self._show:
            tqdm.write(text, file=sys.stderr)

    @contextmanager
    def bar(self, stage: str, total: int, unit: str = "B") -> Iterator[Advance]:
        """A bar over `total` bytes, or other units; yields a function to advance it, from any thread."""
        lock = threading.Lock()
        with tqdm(
            total=total,
            desc=f"{stage:<11}",
            unit=unit,
            unit_scale=unit == "B",
            disable=not self._show,
            file=sys.stderr,
        ) as bar:

            def advance(count: int) -> None:
                with lock:
                    bar.update(count)

            yield advance
