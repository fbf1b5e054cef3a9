"""What not every system has: marks for tests that are about it."""

import os
import tempfile
from pathlib import Path

import pytest


def _can_link() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            Path(folder, "link").symlink_to("nowhere")
        except OSError:
            return False
    return True


needs_links = pytest.mark.skipif(not _can_link(), reason="this user may make no symbolic links")
# A signal that Python code sends to its own process; on Windows that would end it.
needs_signals = pytest.mark.skipif(os.name == "nt", reason="Windows has no signals that wake a thread which waits")
needs_permissions = pytest.mark.skipif(os.name == "nt", reason="Windows has no bits for the rights of others")
