"""The cache of scores is a convenience: where it cannot be written to, scores are measured all the same."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from hf_locstitch.evaluation import cache
from hf_locstitch.evaluation.scores import Score, TaskResult


def test_a_full_disk_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    results = [TaskResult("task", None, None, 1, (Score("loss", 0.5),))]

    def full(path: Path, content: str) -> Any:
        path.write_text(content[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "write_text", full)
        cache.write_cached("key", results, tmp_path)
    assert "not kept for later" in caplog.text and "No space left" in caplog.text and not list(tmp_path.iterdir())
    cache.write_cached("key", results, tmp_path)
    assert cache.read_cached("key", tmp_path) == results
