"""A repo at one commit, as far as the user's Hub cache holds it: for work offline (HF_HUB_OFFLINE)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from hf_locstitch.checkpoints.folder import FolderSource
from hf_locstitch.checkpoints.remembered import Remembered
from hf_locstitch.checkpoints.source import Advance, FileInfo, file_sha256, git_blob_oid
from hf_locstitch.errors import CheckpointError, IntegrityError
from hf_locstitch.runtime.human import some

DEFAULT_REVISION = "main"
SHA256, GIT_OID = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{40}")


def find_snapshot(repo_folder: Path, revision: str | None) -> Path | None:
    """The cached folder of a revision, or None. repo_folder: the repo's part of the cache."""
    name = revision or DEFAULT_REVISION
    if ".." in Path(name).parts or Path(name).is_absolute():
        return None
    ref = repo_folder / "refs" / name
    snapshot = repo_folder / "snapshots" / (ref.read_text("utf-8").strip() if ref.is_file() else name)
    return snapshot if snapshot.is_dir() else None


class CachedRepoSource(FolderSource):
    """Its files are those of the repo, whether they are in the cache or not, if the Hub was ever asked for them; of a
    repo that other programs fetched, those in the cache. What is in the cache must have the hash in its blob's name.
    """

    def __init__(self, snapshot: Path, repo: str) -> None:
        super().__init__(snapshot)
        self.repo = repo
        self.commit = snapshot.name
        self._remembered = Remembered(snapshot.parent.parent, snapshot.name)
        self._files = self._remembered.files() or {file: _named(self.folder / file) for file in self._files}
        self._verified: set[str] = set()

    @property
    def label(self) -> str:
        return f"{self.repo}@{self.folder.name[:7]}"

    @property
    def pinned(self) -> str:
        return f"{self.repo}@{self.folder.name}"

    @property
    def identity(self) -> str:
        return self.pinned

    def cached(self, file: str) -> Path | None:
        return super().cached(file) if (self.folder / file).exists() else None

    def check_obtainable(self, files: Iterable[str], cache: bool) -> None:
        del cache
        if absent := [file for file in files if self.cached(file) is None]:
            raise CheckpointError(
                f"{some(absent)} of {self.label} {'is' if len(absent) == 1 else 'are'} not in the cache, and "
                f"HF_HUB_OFFLINE is set. Unset it, or fetch first: hf download {self.repo} --revision {self.commit}."
            )

    def read_start(self, file: str, length: int) -> bytes:
        if self.cached(file) is None and (known := self._remembered.start(self._files[file], length)) is not None:
            return known
        self.check_obtainable([file], cache=True)
        return super().read_start(file, length)

    def read_range(self, file: str, start: int, stop: int) -> bytes:
        self.check_obtainable([file], cache=True)
        return super().read_range(file, start, stop)

    def fetch(self, file: str, advance: Advance = lambda _: None) -> Path:
        self.check_obtainable([file], cache=True)
        if file not in self._verified:
            self._verify(file)
            self._verified.add(file)
        return super().fetch(file, advance)

    def sha256(self, file: str) -> str:
        if promised := self._files[file].sha256:
            return promised  # every read of the file is checked against it
        return super().sha256(file)

    def check(self, file: str, sha256: str) -> None:
        if (due := self._files[file].sha256) is not None:
            self._check(file, sha256, due)
            self._verified.add(file)

    def _verify(self, file: str) -> None:
        info, path = self._files[file], self.folder / file
        if info.sha256 is not None:
            self._check(file, file_sha256(path), info.sha256)
        elif info.git_oid is not None:
            self._check(file, git_blob_oid(path), info.git_oid)

    def _check(self, file: str, got: str, due: str) -> None:
        if got != due:
            raise IntegrityError(
                f"{file} of {self.label} is damaged in the cache: its hash is {got}, not {due}. Unset HF_HUB_OFFLINE "
                "and run the same command again: it is then fetched again."
            )


def _named(path: Path) -> FileInfo:
    """What the name of a cached file's blob promises."""
    size, blob = path.stat().st_size, path.resolve().name
    return FileInfo(
        size, blob if SHA256.fullmatch(blob) else None, blob if GIT_OID.fullmatch(blob) and path.is_symlink() else None
    )
