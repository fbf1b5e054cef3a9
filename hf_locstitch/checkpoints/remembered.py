"""What the Hub said of a repo at a commit: its files with their hashes, and the headers that were read of them.

Kept beside the repo's files in the user's Hub cache, so that the same plan can be made offline although some of its
files were never needed, and so never fetched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from hf_locstitch.checkpoints.source import FileInfo
from hf_locstitch.runtime.files import replacing

DIGEST = 32  # bytes of the SHA-256 before the content


class Remembered:
    """repo_folder: the repo's part of the cache."""

    def __init__(self, repo_folder: Path, commit: str) -> None:
        self._folder, self._commit = repo_folder / "locstitch", commit

    def keep_files(self, files: Mapping[str, FileInfo]) -> None:
        listing = {file: asdict(info) for file, info in files.items()}
        self._keep(f"{self._commit}.files", json.dumps(listing).encode())

    def files(self) -> dict[str, FileInfo] | None:
        """The repo's files, if they are known."""
        if (content := self._recall(f"{self._commit}.files")) is None:
            return None
        return {file: FileInfo(**info) for file, info in json.loads(content).items()}

    def keep_start(self, info: FileInfo, content: bytes) -> None:
        """The first bytes of a file."""
        self._keep(_start(info), content)

    def start(self, info: FileInfo, length: int) -> bytes | None:
        """The first `length` bytes of a file, if they are known."""
        content = self._recall(_start(info))
        return None if content is None or len(content) < length else content[:length]

    def _keep(self, name: str, content: bytes) -> None:
        """A convenience for later: a cache that cannot be written to is left alone."""
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacing(self._folder / name) as new:
                new.write_bytes(hashlib.sha256(content).digest() + content)

    def _recall(self, name: str) -> bytes | None:
        """None if it was never kept, or is damaged."""
        try:
            raw = (self._folder / name).read_bytes()
        except OSError:
            return None
        content = raw[DIGEST:]
        return content if hashlib.sha256(content).digest() == raw[:DIGEST] else None


def _start(info: FileInfo) -> str:
    return f"{info.promised}.start"
