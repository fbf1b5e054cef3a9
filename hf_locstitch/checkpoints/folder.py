"""A checkpoint in a local folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from hf_locstitch.checkpoints.source import Advance, FileInfo, file_sha256
from hf_locstitch.errors import CheckpointError


class FolderSource:
    def __init__(self, folder: Path) -> None:
        self.repo: str | None = None
        self.commit: str | None = None
        if not folder.is_dir():
            raise CheckpointError(
                f"the folder {folder} does not exist. Give an existing folder, or a repo as org/name."
            )
        self.folder = folder
        self._files = _list_files(folder)
        self._sha256: dict[str, str] = {}

    @property
    def label(self) -> str:
        return str(self.folder)

    @property
    def pinned(self) -> str:
        return f"./{self.folder.resolve().name}"

    @property
    def identity(self) -> str:
        times = {file: (self.folder / file).stat().st_mtime_ns for file in self._files}
        return f"{self.folder.resolve()} {[(file, info.size, times[file]) for file, info in self._files.items()]}"

    @property
    def files(self) -> Mapping[str, FileInfo]:
        return self._files

    def read_start(self, file: str, length: int) -> bytes:
        with (self.folder / file).open("rb") as handle:
            return handle.read(length)

    def cached(self, file: str) -> Path | None:
        return self.folder / file

    def fetch(self, file: str, advance: Advance = lambda _: None) -> Path:
        advance(self._files[file].size)
        return self.folder / file

    def check_obtainable(self, files: Iterable[str], cache: bool) -> None:
        """Nothing to fetch."""

    def sha256(self, file: str) -> str:
        if file not in self._sha256:
            self._sha256[file] = file_sha256(self.folder / file)
        return self._sha256[file]


def _list_files(folder: Path) -> dict[str, FileInfo]:
    """Hidden files and folders (.git, .cache) are not part of a checkpoint."""
    relative = {path: path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): FileInfo(path.stat().st_size)
        for path, name in relative.items()
        if not any(part.startswith(".") for part in name.parts)
    }
