"""A checkpoint in a Hub repo, pinned to one commit, kept in the user's Hub cache.

Downloads resume where they stopped, in this process or a later one, and each file is checked against the
hash published by the Hub; `hf_hub_download` does neither. Layout of the cache:
https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from io import RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import (
    WeakFileLock,
    validate_repo_id,
)

from hf_locstitch.checkpoints.cached_repo import CachedRepoSource, find_snapshot
from hf_locstitch.checkpoints.hub_client import newest_pulls, raise_clearly, retrying
from hf_locstitch.checkpoints.names import is_safe_file
from hf_locstitch.checkpoints.read_ahead import ReadAhead
from hf_locstitch.checkpoints.remembered import Remembered
from hf_locstitch.checkpoints.repo_files import RepoFiles
from hf_locstitch.checkpoints.source import Advance, FileInfo, Source, file_sha256, git_blob_oid
from hf_locstitch.errors import CheckpointError, DownloadError, IntegrityError, OutputError
from hf_locstitch.runtime.daemon_pool import DaemonPool
from hf_locstitch.runtime.files import is_writable, link, write_all, write_text
from hf_locstitch.runtime.human import some
from hf_locstitch.runtime.positioned_io import PositionedFile

if TYPE_CHECKING:
    from concurrent.futures import Future
    from hashlib import _Hash

EXPECTED = DaemonPool(8)  # fetches files beside the weights before they are asked for
PULLS = 5  # pull requests that are looked into, at most
Arrived = Callable[[PositionedFile, int], object]  # an open file and how many bytes from its beginning are there


def open_repo(repo: str, revision: str | None) -> Source:
    """The repo at the commit that `revision` currently names. Offline, at the newest cached commit."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise CheckpointError(
            f"{repo} cannot be the name of a repo on the Hub: {str(error).splitlines()[0]} Check the name."
        ) from error
    if constants.is_offline_mode():
        if snapshot := find_snapshot(_repo_folder(repo), revision):
            return CachedRepoSource(snapshot, repo)
        at = f"{repo}@{revision}" if revision else repo
        raise CheckpointError(
            f"{at} is not in the cache and HF_HUB_OFFLINE is set. Unset it, or fetch what is needed while online: "
            "hf download ORG/NAME."
        )
    try:
        return HubSource(repo, revision)
    except DownloadError as error:
        if snapshot := find_snapshot(_repo_folder(repo), revision):
            raise DownloadError(
                f"{error} Or set HF_HUB_OFFLINE=1 to use what the cache holds of it, at commit {snapshot.name}."
            ) from error
        raise


def _repo_folder(repo: str, cache: Path | None = None) -> Path:
    """The repo's part of a cache, by default the user's."""
    return Path(cache or constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _cache_for(repo: str) -> Path:
    """The user's Hub cache, or where that cannot be written to a folder that goes with this process."""
    cache = Path(constants.HF_HUB_CACHE)
    return cache if is_writable(_repo_folder(repo)) and is_writable(cache / ".locks") else Path(_passing_cache().name)


@lru_cache(1)
def _passing_cache() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="hf-locstitch-cache-", ignore_cleanup_errors=True)


class HubSource:
    local = False

    def __init__(self, repo: str, revision: str | None) -> None:
        self._endpoint = constants.ENDPOINT
        try:
            info = retrying(lambda: HfApi().model_info(repo, revision=revision, files_metadata=True))
        except Exception as error:
            raise_clearly(error, repo, revision, self._endpoint)
        if info.sha is None:
            raise CheckpointError(f"{self._endpoint} returned no commit for {repo}. Give one: {repo}@<commit>.")
        self.repo: str | None = repo
        self.commit: str | None = info.sha
        self._repo, self._commit, self._revision = repo, info.sha, revision or constants.DEFAULT_REVISION
        self._files = {
            s.rfilename: FileInfo(s.size or 0, s.lfs.sha256 if s.lfs else None, None if s.lfs else s.blob_id)
            for s in info.siblings or []
            if is_safe_file(s.rfilename)
        }
        self._sha256: dict[str, str] = {}
        self._wire = RepoFiles(repo, info.sha, self._files, self._endpoint, self.label)
        self._cache = _cache_for(repo)
        self._remembered = Remembered(self._folder, self._commit)
        self._remembered.keep_files(self._files)
        self._expected: dict[str, Future[Path]] = {}

    @property
    def label(self) -> str:
        return f"{self._repo}@{self._commit[:7]}"

    @property
    def pinned(self) -> str:
        return f"{self._repo}@{self._commit}"

    @property
    def identity(self) -> str:
        return self.pinned

    @property
    def files(self) -> Mapping[str, FileInfo]:
        return self._files

    @property
    def _folder(self) -> Path:
        return _repo_folder(self._repo, self._cache)

    def cached(self, file: str) -> Path | None:
        for cache in dict.fromkeys((Path(constants.HF_HUB_CACHE), self._cache)):
            path = try_to_load_from_cache(self._repo, file, cache_dir=cache, revision=self._commit)
            if isinstance(path, str) and self._is_whole(file, Path(path)):
                return Path(path)
        return None

    def _is_whole(self, file: str, path: Path) -> bool:
        """Whether a file has its size: of one that was cut short, nothing is to be read."""
        info = self._files[file]
        return info.sha256 is None or path.stat().st_size == info.size

    def read_start(self, file: str, length: int) -> bytes:
        if path := self.cached(file):
            with path.open("rb") as handle:
                return handle.read(length)

        content = self._wire.start(file, length)
        self._remembered.keep_start(self._files[file], content)
        return content

    def read_range(self, file: str, start: int, stop: int) -> bytes:
        return self._wire.range_once(file, start, stop)

    def stream(self, file: str, start: int = 0, ahead: ReadAhead | None = None) -> Iterator[bytes]:
        """As RepoFiles.stream."""
        return self._wire.stream(file, start, ahead)

    def read_ahead(self, files: Iterable[str], begin: Callable[[str], int] | None = None) -> ReadAhead:
        """As RepoFiles.read_ahead."""
        return self._wire.read_ahead(files, begin)

    def fetch(
        self,
        file: str,
        advance: Advance = lambda _: None,
        arrived: Arrived | None = None,
        ahead: ReadAhead | None = None,
    ) -> Path:
        """As Source.fetch. A listener `arrived` may read bytes before the file is checked: on damage it must forget
        them, so a damaged file is then not fetched a second time. ahead: through what its bytes come, with others."""
        expected = self._expected.pop(file, None)
        if expected is not None and not expected.cancel():  # it has begun
            path = expected.result()
            advance(self._files[file].size)
            return path
        return self._fetch(file, advance, arrived, ahead)

    def _fetch(
        self,
        file: str,
        advance: Advance = lambda _: None,
        arrived: Arrived | None = None,
        ahead: ReadAhead | None = None,
    ) -> Path:
        if path := self.cached(file):
            if self._is_as_promised(file, path):
                advance(self._files[file].size)
                self._remember_revision()
                return path
            self._forget(file, path)  # damaged in the cache: fetch it again
        if self._files[file].promised is not None:
            self._download(file, advance, arrived, ahead)
            path = self._link(file)
            self._remember_revision()
            return path
        try:
            where = {"revision": self._commit, "cache_dir": self._cache}
            path = Path(retrying(lambda: hf_hub_download(self._repo, file, **where)))
        except Exception as error:
            raise_clearly(error, self._repo, self._commit, self._endpoint)
        advance(self._files[file].size)
        self._remember_revision()
        return path

    def expect(self, files: Iterable[str]) -> None:
        """As Source.expect. What goes wrong with a file is told to who asks for it."""
        for file in files:
            if file in self._files and file not in self._expected and self.cached(file) is None:
                self._expected[file] = EXPECTED.submit(partial(self._fetch, file))

    def arrived(self, file: str) -> int:
        """How many bytes of a file are in the cache, from its beginning on."""
        if self.cached(file):
            return self._files[file].size
        blob = self._blob(file)
        if blob.exists() and self._is_whole(file, blob):
            return self._files[file].size
        return _incomplete(blob).stat().st_size if _incomplete(blob).exists() else 0

    def check_obtainable(self, files: Iterable[str], cache: bool) -> None:
        """Of what the Hub gives: whether it can be kept."""
        if not cache or self._cache == Path(constants.HF_HUB_CACHE):
            return
        if absent := [file for file in files if self.cached(file) is None]:
            raise OutputError(
                f"{some(absent)} of {self.label} would be downloaded into the Hub cache {constants.HF_HUB_CACHE}, "
                "which cannot be written to. Set HF_HOME to a folder that can, or use --no-cache."
            )

    def sha256(self, file: str) -> str:
        if promised := self._files[file].sha256:
            return promised  # every read of the file is checked against it
        if file not in self._sha256:
            self._sha256[file] = file_sha256(self.fetch(file))
        return self._sha256[file]

    def check(self, file: str, sha256: str) -> None:
        """Forgets a damaged file, so that it is fetched again."""
        due, path = self._files[file].sha256, self.cached(file)
        if due not in (None, sha256):
            if path is not None:
                self._forget(file, path)
            raise IntegrityError(
                f"{file} of {self.label} was damaged in the cache: its sha256 was {sha256}, not {due}. It was removed "
                "from there: run the same command again, and it is fetched again."
            )
        self._sha256[file] = sha256
        self._remember_revision()

    def revisions_with_weights(self) -> list[str]:
        """Of the newest pull requests; only ever advice, so that nothing is tried twice and no failure matters."""
        api = HfApi()
        try:
            refs = [pull.ref for pull in newest_pulls(api, self._repo, PULLS)]
            listed = {ref: api.list_repo_files(self._repo, revision=ref) for ref in refs}
        except Exception:
            return []
        return [ref for ref, files in listed.items() if any(file.endswith(".safetensors") for file in files)]

    def check_unchanged(self, files: Iterable[str]) -> None:
        """A commit does not change, and what is read of it is checked against its hashes."""

    def _is_as_promised(self, file: str, path: Path) -> bool:
        info = self._files[file]
        if info.sha256 is not None:
            return self._sha256.setdefault(file, self._sha256.get(file) or file_sha256(path)) == info.sha256
        return info.git_oid is None or git_blob_oid(path) == info.git_oid

    def _remember_revision(self) -> None:
        """Cache which commit the branch or tag names, for offline use."""
        if self._revision == self._commit:
            return
        ref = self._folder / "refs" / self._revision
        with suppress(OSError):  # of a cache that cannot be written to
            if not ref.is_file() or ref.read_text("utf-8") != self._commit:
                ref.parent.mkdir(parents=True, exist_ok=True)
                write_text(ref, self._commit)

    def _forget(self, file: str, path: Path) -> None:
        self._sha256.pop(file, None)
        try:
            for place in (path.resolve(), path, self._blob(file)):  # where there are no links, these are copies
                place.unlink(missing_ok=True)
        except OSError as error:
            raise IntegrityError(
                f"{file} of {self.label} is damaged in the cache and cannot be removed from it ({path}: "
                f"{error.strerror}). Remove it, or set HF_HOME to another folder."
            ) from error

    def damaged(self, file: str, got: str) -> IntegrityError:
        """The error to raise when a file does not match its hash but has another; forgets the bytes read of it."""
        otherwise = " With HF_HUB_DISABLE_XET=1 it comes another way." if self._wire.distrust(file) else ""
        info = self._files[file]
        kind = "git blob" if info.sha256 is None else "sha256"
        return IntegrityError(
            f"{file} of {self.label} arrived with {kind} {got}, not with {kind} {info.promised}: the connection or the "
            f"server damaged it. Run the same command again; the damaged file was not kept.{otherwise}"
        )

    def _blob(self, file: str) -> Path:
        return self._folder / "blobs" / str(self._files[file].promised)

    def _link(self, file: str) -> Path:
        """Put a file that is among the cache's blobs into its snapshot, as the Hub's client would."""
        path, blob = self._folder / "snapshots" / self._commit / file, self._blob(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not self._is_whole(file, path):
            path.unlink()  # where there are no links, it is a file of its own
        with suppress(FileExistsError):  # another process was faster
            link(path, os.path.relpath(blob, path.parent))
        return path

    def _download(self, file: str, advance: Advance, arrived: Arrived | None, ahead: ReadAhead | None) -> None:
        """Fetch a file into the cache's blobs, whole and checked, or raise."""
        due, blob = str(self._files[file].promised), self._blob(file)
        incomplete = _incomplete(blob)
        lock = self._cache / ".locks" / self._folder.name / f"{due}.lock"
        blob.parent.mkdir(parents=True, exist_ok=True)
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if blob.exists() and self._is_whole(file, blob) and self._is_as_promised(file, blob):
                advance(self._files[file].size)
                return
            self._sha256.pop(file, None)
            for last in (arrived is not None, True):  # once more from scratch if the first download is damaged
                got = self._append(file, incomplete, advance, arrived, ahead)
                if got == due:
                    if self._files[file].sha256 is not None:
                        self._sha256[file] = got
                    os.replace(incomplete, blob)
                    return
                incomplete.unlink()
                self._wire.distrust(file)
                advance(-self._files[file].size)
                if last:
                    raise self.damaged(file, got)

    def _append(
        self, file: str, incomplete: Path, advance: Advance, arrived: Arrived | None, ahead: ReadAhead | None
    ) -> str:
        """Append the missing bytes. Returns the hash of the whole file, of the kind that is promised."""
        digest = self._files[file].digest()
        with incomplete.open("a+b", buffering=0) as out:
            hash_open(out, digest)
            at = out.seek(0, os.SEEK_END)
            advance(at)
            shared = PositionedFile(out.fileno())
            for block in self.stream(file, at, ahead):
                try:
                    write_all(out, block)
                except OSError as error:
                    raise DownloadError(
                        f"cannot write {incomplete}: {error.strerror}. Free some space and run the same command again."
                    ) from error
                digest.update(block)
                at += len(block)
                advance(len(block))
                if arrived is not None:
                    arrived(shared, at)
        return digest.hexdigest()


def _incomplete(blob: Path) -> Path:
    """Where a blob is while it is downloaded."""
    return blob.with_name(f"{blob.name}.locstitch-incomplete")


def hash_open(file: RawIOBase, digest: _Hash) -> None:
    """Let `digest` take up the current content of a file."""
    file.seek(0)
    while block := file.read(1 << 20):
        digest.update(block)
