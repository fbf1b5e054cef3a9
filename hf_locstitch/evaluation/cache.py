"""The cache of scores, under HF_HOME/hf-locstitch/evaluations. lm-eval's own cache does not identify models."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_locstitch.evaluation.scores import TaskResult, result_from_json
from hf_locstitch.runtime.files import is_writable, replacing, write_text
from hf_locstitch.runtime.own_cache import own_cache

LOG = logging.getLogger("hf_locstitch")


def cache_key(facts: Mapping[str, Any]) -> str:
    """One hash of everything that determines a score."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def cache_folder() -> Path:
    return own_cache() / "evaluations"


def read_cached(key: str, folder: Path) -> list[TaskResult] | None:
    """None also for an unreadable file: the scores are then measured again."""
    try:
        return [result_from_json(fields) for fields in json.loads((folder / f"{key}.json").read_text("utf-8"))]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_cached(key: str, results: Sequence[TaskResult], folder: Path) -> None:
    """The file appears whole or not at all: not in a folder that cannot be written to, nor on a full disk."""
    if not is_writable(folder):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / f"{key}.json") as new:
            write_text(new, json.dumps([asdict(result) for result in results]))
    except OSError as error:
        LOG.warning(f"scores are not kept for later in {folder} ({error.strerror}).")
