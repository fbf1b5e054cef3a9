"""A part of a folder or a repo as a source of its own: a subfolder, or one safetensors file and what lies beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_locstitch.checkpoints.ref import WEIGHTS
from hf_locstitch.checkpoints.source import Advance, FileInfo, Source
from hf_locstitch.errors import CheckpointError, IntegrityError
from hf_locstitch.runtime.human import some
from hf_locstitch.runtime.parsing import parse_json

INDEX = f"{WEIGHTS}.index."  # in the name of a file that says which tensor is where


class PartSource:
    """whole: where it lies. path: in there. Files are named as they are within the part.

    Raises CheckpointError if nothing is there.
    """

    def __init__(self, whole: Source, path: str) -> None:
        self._whole: Any = whole
        self.path = path
        folder, _, name = path.rpartition("/") if path.endswith(WEIGHTS) else (path, "", "")
        self._prefix, self._only = f"{folder}/" if folder else "", name
        start = len(self._prefix)
        within = {file[start:]: info for file, info in whole.files.items() if file.startswith(self._prefix)}
        self._files = {file: info for file, info in within.items() if not self._only or self._belongs(file)}
        if not self.files or (self._only and self._only not in self.files):
            raise CheckpointError(f"{whole.label} has no {path}. {where_weights_are(whole)}")
        if self._only:
            self._refuse_shard([file for file in within if INDEX in file])

    @property
    def label(self) -> str:
        return self._named(self._whole.label)

    @property
    def pinned(self) -> str:
        return self._named(self._whole.pinned)

    @property
    def identity(self) -> str:
        return f"{self._whole.identity} {self.path}"

    @property
    def repo(self) -> str | None:
        return self._whole.repo

    @property
    def commit(self) -> str | None:
        return self._whole.commit

    @property
    def local(self) -> bool:
        return self._whole.local

    @property
    def files(self) -> Mapping[str, FileInfo]:
        return self._files

    def _belongs(self, file: str) -> bool:
        """Whether a file is that which is named, or goes along with it."""
        if file.startswith("adapter_"):
            return self._only.startswith("adapter_")
        return file == self._only or not (file.endswith(WEIGHTS) or INDEX in file)

    def _refuse_shard(self, indices: Iterable[str]) -> None:
        """Raises CheckpointError if an index lists the file among others, so that it is but a part of a model."""
        for index in indices:
            try:
                listed = parse_json(self.fetch(index).read_bytes())["weight_map"].values()
                shards = {file for file in listed if isinstance(file, str)}
            except (ValueError, LookupError, TypeError, AttributeError):
                continue  # no index that anything could be told from
            if self._only in shards and len(shards) > 1:
                raise CheckpointError(
                    f"{self.label} is one of the {len(shards)} files of a model that {index} lists, and no model by "
                    "itself. Name the folder or repo that they are in, not one of them."
                )

    def read_start(self, file: str, length: int) -> bytes:
        return self._whole.read_start(self._prefix + file, length)

    def read_range(self, file: str, start: int, stop: int) -> bytes:
        return self._whole.read_range(self._prefix + file, start, stop)

    def cached(self, file: str) -> Path | None:
        return self._whole.cached(self._prefix + file)

    def fetch(self, file: str, advance: Advance = lambda _: None, *others: Any) -> Path:
        return self._whole.fetch(self._prefix + file, advance, *others)

    def stream(self, file: str, start: int = 0, ahead: Any = None) -> Iterator[bytes]:
        return self._whole.stream(self._prefix + file, start, ahead)

    def read_ahead(self, files: Iterable[str], begin: Callable[[str], int] | None = None) -> Any:
        start = len(self._prefix)
        within = None if begin is None else lambda file: begin(file[start:])
        return self._whole.read_ahead([self._prefix + file for file in files], within)

    def arrived(self, file: str) -> int:
        return self._whole.arrived(self._prefix + file)

    def expect(self, files: Iterable[str]) -> None:
        self._whole.expect([self._prefix + file for file in files])

    def check_obtainable(self, files: Iterable[str], cache: bool) -> None:
        self._whole.check_obtainable([self._prefix + file for file in files], cache)

    def sha256(self, file: str) -> str:
        return self._whole.sha256(self._prefix + file)

    def check(self, file: str, sha256: str) -> None:
        self._whole.check(self._prefix + file, sha256)

    def check_unchanged(self, files: Iterable[str]) -> None:
        self._whole.check_unchanged([self._prefix + file for file in files])

    def damaged(self, file: str, got: str) -> IntegrityError:
        return self._whole.damaged(self._prefix + file, got)

    def revisions_with_weights(self) -> list[str]:
        return self._whole.revisions_with_weights()

    def _named(self, whole: str) -> str:
        """The whole's name with the path in it, before the revision."""
        name, at, revision = whole.rpartition("@") if self.repo is not None else (whole, "", "")
        return f"{name}/{self.path}{at}{revision}"


def where_weights_are(source: Source) -> str:
    """Which folders of a source hold safetensors, as advice."""
    folders = sorted({file.rpartition("/")[0] for file in source.files if file.endswith(WEIGHTS)} - {""})
    if not folders:
        return "Check the name."
    return f"Weights lie in its folders {some(folders)}: name one, such as {source.repo or source.label}/{folders[0]}."
