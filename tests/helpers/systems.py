"""What not every system has: marks for tests that are about it."""

import os
import signal
import tempfile
from pathlib import Path

import pytest

from helpers.portable import other_system
from hf_locstitch.runtime.positioned_io import OPEN_FILES_MOVE


def _can_link() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            Path(folder, "link").symlink_to("nowhere")
        except OSError:
            return False
    return True


needs_links = pytest.mark.skipif(not _can_link(), reason="this user may make no symbolic links")
# A signal that Python code sends to its own process; on Windows that would end it.
needs_signals = pytest.mark.skipif(
    os.name == "nt" or signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
    reason="Windows has no signals that wake a thread which waits; what a shell runs in the background ignores SIGINT",
)
needs_open_files_to_move = pytest.mark.skipif(not OPEN_FILES_MOVE, reason="a file that is open cannot be replaced")
needs_early_reading = pytest.mark.skipif(
    not OPEN_FILES_MOVE,
    reason="where open files cannot be renamed, a file is read once it is whole, and fetched again if it is damaged",
)
needs_own_imports = pytest.mark.skipif(
    os.environ.get(other_system.ASKED) == "1", reason="what makes a process resemble another system imports much itself"
)
needs_permissions = pytest.mark.skipif(os.name == "nt", reason="Windows has no bits for the rights of others")
