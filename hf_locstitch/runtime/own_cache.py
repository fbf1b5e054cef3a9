"""This program's part of the user's cache: HF_HOME/hf-locstitch."""

from __future__ import annotations

import os
from pathlib import Path


def own_cache() -> Path:
    """The folder, which may not exist yet."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "hf-locstitch"


def private_cache(name: str) -> Path | None:
    """A folder in it, made if need be, for what is believed when it is read again.

    None unless only this user can write there: a cache may be shared by many.
    """
    folder = own_cache() / name
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        state = folder.stat()
    except OSError:
        return None
    shared = hasattr(os, "getuid") and (state.st_uid != os.getuid() or state.st_mode & 0o022)
    return None if shared or not os.access(folder, os.W_OK | os.X_OK) else folder
