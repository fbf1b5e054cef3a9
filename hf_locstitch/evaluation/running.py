"""What surrounds a run of models: silence, and what to say when memory runs out."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from io import StringIO
from typing import Any

from hf_locstitch.errors import WorkError

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "No executable batch size found")


@contextlib.contextmanager
def quietly(show_progress: bool) -> Iterator[None]:
    """Send lm-eval's prints to standard error, drop its log, and show its bars only if requested."""
    from datasets import disable_progress_bars, enable_progress_bars
    from datasets.utils import are_progress_bars_disabled
    from transformers.utils import logging as transformers_logging

    logger, before = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level
    hidden = are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    if not show_progress:
        disable_progress_bars()
    to = sys.stderr if show_progress else StringIO()
    try:
        with contextlib.redirect_stdout(to), contextlib.redirect_stderr(to):
            yield
    finally:
        logger.setLevel(before)
        transformers_logging.set_verbosity(verbosity)
        if not hidden:
            enable_progress_bars()


@contextlib.contextmanager
def explaining_memory(label: str, batch_size: int | None, lm: Any = None) -> Iterator[None]:
    """Turn out-of-memory errors into a WorkError that says what to try."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        reason = str(error)
        tried = batch_size or max(getattr(lm, "batch_sizes", {}).values(), default=None)
        if not isinstance(error, MemoryError) and not any(phrase in reason for phrase in OUT_OF_MEMORY):
            raise
        size = f"at batch size {tried}" if tried else "while loading"
        cure = f"Try --batch-size {tried // 2}" if tried and tried > 1 else "Use a larger device or a smaller model"
        raise WorkError(
            f"{label} ran out of memory {size} ({reason.splitlines()[0][:120] if reason else 'MemoryError'}). {cure}; "
            "finished scores are cached, so the same command continues from there."
        ) from error
