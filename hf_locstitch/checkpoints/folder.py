"""A checkpoint in a local folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from hf_locstitch.checkpoints.known_hashes import state_of
from hf_locstitch.checkpoints.names import is_safe_file
from hf_locstitch.checkpoints.source import Advance, FileInfo, file_sha256
from hf_locstitch.errors import CheckpointError
from hf_locstitch.runtime.human import nearest


class FolderSource:
    local = True

    def __init__(self, folder: Path) -> None:
        self.repo: str | None = None
        self.commit: str | None = None
        if not os.path.isdir(folder):  # also of a name too long for a file system
            raise CheckpointError(
                f"the folder {folder} does not exist{_meant(folder)} Give an existing folder, or a repo as org/name."
            )
        _check_readable(folder, os.R_OK | os.X_OK)
        self.folder = folder
        self._files = _list_files(folder)
        self._states = {file: state_of(folder / file) for file in self._files}
        self._sha256: dict[str, str] = {}

    @property
    def label(self) -> str:
        return str(self.folder)

    @property
    def pinned(self) -> str:
        return f"./{self.folder.resolve().name}"

    @property
    def identity(self) -> str:
        return f"{self.folder.resolve()} {sorted(self._states.items())}"

    @property
    def files(self) -> Mapping[str, FileInfo]:
        return self._files

    def read_start(self, file: str, length: int) -> bytes:
        with self._path(file).open("rb") as handle:
            return handle.read(length)

    def read_range(self, file: str, start: int, stop: int) -> bytes:
        with self._path(file).open("rb") as handle:
            handle.seek(start)
            return handle.read(stop - start)

    def cached(self, file: str) -> Path | None:
        return self._path(file)

    def fetch(self, file: str, advance: Advance = lambda _: None) -> Path:
        path = self._path(file)
        advance(self._files[file].size)
        return path

    def expect(self, files: Iterable[str]) -> None:
        """All are here."""

    def check_obtainable(self, files: Iterable[str], cache: bool) -> None:
        """Nothing to fetch."""

    def sha256(self, file: str) -> str:
        if file not in self._sha256:
            self._sha256[file] = file_sha256(self._path(file))
        return self._sha256[file]

    def check(self, file: str, sha256: str) -> None:
        """A folder promises nothing."""

    def revisions_with_weights(self) -> list[str]:
        return []

    def check_unchanged(self, files: Iterable[str]) -> None:
        for file in self._states.keys() & set(files):
            if (now := state_of(self.folder / file)) != (then := self._states[file]):
                was, is_ = (0 if state is None else state.size for state in (then, now))
                what = f"its size was {was} bytes and is {is_}" if is_ != was else "it was written to"
                raise CheckpointError(
                    f"{self.label}/{file} changed while it was read ({what}), so the result would be of no known "
                    "weights. Nothing was written; run the same command again once nothing writes there."
                )

    def _path(self, file: str) -> Path:
        """Where a file is read. Raises CheckpointError if that is a link to something that is not the model's."""
        path = self.folder / file
        target = path.resolve()
        if not target.is_relative_to(self.folder.resolve()) and not _is_blob(target, self.folder):
            raise CheckpointError(
                f"{path} is a link to {target}, outside the folder, and is not followed: what it holds would become "
                "part of the merge. If it belongs to the model, replace the link with a copy; else remove it."
            )
        if path.exists():
            _check_readable(path, os.R_OK)
        return path


def _meant(folder: Path) -> str:
    """The end of a sentence: a folder beside the one that is not there whose name is like its name."""
    try:
        beside = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        beside = []
    return nearest(folder.name, beside, folder.parent) or "."


def _check_readable(path: Path, rights: int) -> None:
    if not os.access(path, rights):
        raise CheckpointError(f"{path} cannot be read by this user. Change its permissions, or use a copy.")


def _list_files(folder: Path) -> dict[str, FileInfo]:
    """Hidden files and folders (.git, .cache) are not part of a checkpoint. Links are listed; see FolderSource."""
    relative = {path: path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): FileInfo(path.stat().st_size)
        for path, name in relative.items()
        if not any(part.startswith(".") for part in name.parts) and is_safe_file(name.as_posix())
    }


def _is_blob(target: Path, folder: Path) -> bool:
    """Whether a link's target is CACHE/models--ORG--NAME/blobs/HASH: of the Hub cache, or of the snapshot `folder`."""
    repo = target.parent.parent
    if target.parent.name != "blobs" or not repo.name.startswith("models--"):
        return False
    if folder.resolve().parent == repo / "snapshots":
        return True
    from huggingface_hub import constants

    return repo.parent == Path(constants.HF_HUB_CACHE).resolve()
