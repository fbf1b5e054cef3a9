"""Where a checkpoint's files come from: the interface shared by folders and Hub repos."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from hashlib import _Hash

# A thread may wait 5 ms for the interpreter's lock: small pieces would be hashed at a crawl beside imports.
HASHED_AT_ONCE = 1 << 24
Advance = Callable[[int], object]  # called with the number of bytes just processed


@dataclass(frozen=True)
class FileInfo:
    """size: bytes. sha256: of the content, where the source promises one. git_oid: its git blob id, likewise."""

    size: int
    sha256: str | None = None
    git_oid: str | None = None

    @property
    def promised(self) -> str | None:
        """The hash of the content that the source promises, of either kind."""
        return self.sha256 or self.git_oid

    def digest(self) -> _Hash:
        """What finds the hash of that kind, of content yet to come."""
        if self.sha256 is None:
            return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        return hashlib.sha256()


class Source(Protocol):
    """A set of files at one moment: a folder, or a repo at a commit."""

    @property
    def label(self) -> str:
        """For people: the folder, or org/name@short-commit."""
        ...

    @property
    def pinned(self) -> str:
        """For a recipe: what names exactly these files, without the path of a local folder."""
        ...

    @property
    def repo(self) -> str | None:
        """org/name; None for a folder."""
        ...

    @property
    def commit(self) -> str | None:
        """Of the repo, 40 hex digits; None for a folder."""
        ...

    @property
    def local(self) -> bool:
        """Whether nothing of it will be asked of the Hub."""
        ...

    @property
    def identity(self) -> str:
        """Changes when the files do: the pinned name, or for a folder also their sizes and times."""
        ...

    @property
    def files(self) -> Mapping[str, FileInfo]: ...

    def read_start(self, file: str, length: int) -> bytes:
        """The first `length` bytes of a file (fewer if it is shorter)."""
        ...

    def read_range(self, file: str, start: int, stop: int) -> bytes:
        """Bytes start … stop of a file, which may be unchecked. Raises CheckpointError, DownloadError."""
        ...

    def cached(self, file: str) -> Path | None:
        """The file on this machine, if it is already there. Raises CheckpointError if it is a link to elsewhere."""
        ...

    def fetch(self, file: str, advance: Advance = lambda _: None) -> Path:
        """The file on this machine, fetched if needed and checked against the hash that the source states.

        `advance` is called as bytes arrive. Raises DownloadError or IntegrityError.
        """
        ...

    def expect(self, files: Iterable[str]) -> None:
        """Those of these files that it has will be needed soon: they are on their way when they are asked for."""
        ...

    def check_obtainable(self, files: Iterable[str], cache: bool) -> None:
        """Raises RequestError if one of the files could not be fetched. cache: whether downloads are to be kept."""
        ...

    def sha256(self, file: str) -> str:
        """SHA-256 of the fetched file's content, hex; computed once."""
        ...

    def check(self, file: str, sha256: str) -> None:
        """Raises IntegrityError if a file with this hash, found on this machine, is not what the source promises."""
        ...

    def revisions_with_weights(self) -> list[str]:
        """Pull requests of its repo that hold safetensors, newest first; none where that cannot be found out."""
        ...

    def check_unchanged(self, files: Iterable[str]) -> None:
        """Raises CheckpointError if one of the files is not as it was when the source was opened."""
        ...


def file_sha256(path: Path, advance: Advance = lambda _: None) -> str:
    """SHA-256 of a file's content, hex."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        # No larger than the file: a merge hashes hundreds of small ones, and fresh memory costs more than their bytes.
        buffer = bytearray(min(HASHED_AT_ONCE, max(1, path.stat().st_size)))
        view = memoryview(buffer)
        while count := file.readinto(buffer):
            digest.update(view[:count])
            advance(count)
    return digest.hexdigest()


def git_blob_oid(path: Path) -> str:
    """The id that git gives to a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
