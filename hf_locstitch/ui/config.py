"""How the page is served: on this machine for its user, or as a Space for everybody."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hf_locstitch.runtime.files import is_writable

PORT = 7860
GENERATED = 2_500_000_000  # bytes of weights of the largest model that is run: about a billion parameters


@dataclass(frozen=True)
class UiConfig:
    """How the page is served.

    Attributes:
        work: Where jobs are written down, and merges are made.
        host: To listen on.
        port: Likewise.
        visitors: Whether strangers use it, who sign in with the Hub; else it is for the user of this machine alone,
            and their own login counts.
        at_once: How many merges run at a time.
        most_bytes: Weights of the largest model whose text generation is tried.
    """

    work: Path
    host: str = "127.0.0.1"
    port: int = PORT
    visitors: bool = False
    at_once: int = 1
    most_bytes: int = GENERATED


def default_work() -> Path:
    """The folder of the page's work in this user's cache."""
    from hf_locstitch.runtime.own_cache import own_cache

    return own_cache() / "ui"


def space_config(environment: Mapping[str, str]) -> UiConfig:
    """For a Space: for everybody, with the disk that it has. LOCSTITCH_JOBS is how many merges run at a time."""
    kept = Path("/data")  # a Space's lasting disk, if it has one
    work = kept if kept.is_dir() and is_writable(kept) else Path(tempfile.gettempdir())
    at_once = int(environment.get("LOCSTITCH_JOBS", "1"))
    return UiConfig(work / "hf-locstitch", "0.0.0.0", PORT, visitors=True, at_once=at_once)
