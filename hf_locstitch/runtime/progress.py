"""Progress on stderr, on a terminal only: a bar for each stage, and one line for all steps of a command."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

LOG = logging.getLogger("hf_locstitch")
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
        self.shown = not hidden and (sys.stderr.isatty() if show is None else show)
        self._steps: Sequence[str] = ()
        self._line: tqdm[Any] | None = None  # the overall one
        self._open = 0  # bars

    def say(self, text: str) -> None:
        """A line between the bars, where they are shown."""
        if self.shown:
            tqdm.write(text, file=sys.stderr)

    @contextmanager
    def steps(self, names: Sequence[str]) -> Iterator[None]:
        """While open, one line above the bars says which of these steps is under way, and what remains.

        names: in the order in which `step` is told of them; a single one needs no such line.
        """
        shown = self.shown and len(names) > 1
        with tqdm(bar_format="{desc}", leave=False, disable=not shown, file=sys.stderr, dynamic_ncols=True) as line:
            self._steps, self._line = names, line
            try:
                yield
            finally:
                self._steps, self._line = (), None

    def step(self, name: str) -> None:
        """This step begins."""
        if self._line is not None and name in self._steps:
            text = overall(self._steps, name)
            LOG.info(text)
            self._line.set_description_str(text)

    @contextmanager
    def bar(self, stage: str, total: int, unit: str = "B") -> Iterator[Advance]:
        """A bar over `total` bytes, or other units; yields a function to advance it, from any thread.

        One inside of another is gone when it is full.
        """
        lock, began = threading.Lock(), time.monotonic()
        with tqdm(
            total=total,
            desc=f"{stage:<11}",
            unit=unit,
            unit_scale=unit == "B",
            disable=not self.shown,
            leave=self._open == 0,
            file=sys.stderr,
        ) as bar:

            def advance(count: int) -> None:
                with lock:
                    bar.update(count)

            self._open += 1
            try:
                yield advance
            finally:
                self._open -= 1
                bar.clear()  # its line may become that of a shorter one
        if self._line is not None:
            self._line.refresh()
        LOG.info(f"{stage}: {time.monotonic() - began:.1f} s")


def overall(steps: Sequence[str], name: str) -> str:
    """Where a command is, and what remains.

    Example:
        >>> overall(["localizing", "merging", "uploading"], "merging")
        'step 2 of 3: merging; then uploading'
    """
    place = list(steps).index(name)
    rest = ", ".join(steps[place + 1 :])
    return f"step {place + 1} of {len(steps)}: {name}" + (f"; then {rest}" if rest else "")
