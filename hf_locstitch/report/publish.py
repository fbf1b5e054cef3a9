"""Uploading a merge: large files as they are finished, then ONE commit on top of the head seen at the start."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

from hf_locstitch.artifacts.manifest import FILE
from hf_locstitch.checkpoints.hub_client import (
    RATE_LIMIT,
    Attempts,
    is_transient,
    newest_pulls,
    pull_number,
    retrying,
    short,
    status_of,
)
from hf_locstitch.checkpoints.source import git_blob_oid
from hf_locstitch.checkpoints.xet import provide_folder
from hf_locstitch.errors import PublishError
from hf_locstitch.plan.push_target import MAIN, PushTarget
from hf_locstitch.runtime.daemon_pool import DaemonPool
from hf_locstitch.runtime.positioned_io import OPEN_FILES_MOVE
from hf_locstitch.runtime.progress import Progress

# What an earlier model in the repo may have left that would be loaded in place of, or mistaken for, the new one.
REPLACED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*.gguf",
    "masks/*",
    "values/*",
    "figures/*",
    ".eval_results/*",
)
AT_ONCE = 4  # files that are uploaded at a time
RECENT = 10  # pull requests that are looked at for one that holds the result already
Operation: TypeAlias = CommitOperationAdd | CommitOperationDelete


@dataclass(frozen=True)
class Published:
    """url: of the repo, of a branch of it, or of the pull request. commit: 40 hex digits."""

    url: str
    commit: str


class Upload:
    """The upload of one result. Files are sent in the background, several at once; the repo shows nothing before the
    commit.

    discard: delete a file from this machine once the Hub has it.
    """

    def __init__(self, target: PushTarget, *, private: bool, discard: bool = False) -> None:
        self.target, self.discard = target, discard
        self._private = private
        self._api = _uploading_client()
        self._parent: str | None = None
        self._preparing = threading.Lock()
        self._operations: dict[str, CommitOperationAdd] = {}
        self._pool = DaemonPool(AT_ONCE)
        self._running: dict[str, Future[None]] = {}

    def add(self, folder: Path, file: str, sha256: str | None = None) -> None:
        """Upload a finished file of `folder` in the background; errors are raised by `wait` and `commit`.

        sha256: of the file, if it is known.
        """
        self._running[file] = self._pool.submit(lambda: self._add(folder, file, sha256))

    def wait(self, unfinished: int) -> None:
        """Wait until at most `unfinished` files are still uploading. Raises PublishError."""
        while len(self._running) > unfinished:
            future = self._running.pop(next(iter(self._running)))
            with self._explained():
                future.result()

    def pause(self) -> None:
        """The files are about to move: start no upload of them. One that runs goes on, for it has its file open; where
        such a file cannot be moved, it is waited for."""
        for file in reversed(list(self._running)):
            if self._running[file].cancel():
                del self._running[file]
        if not OPEN_FILES_MOVE:
            wait(self._running.values())

    def commit(
        self, folder: Path, message: str, progress: Progress, known: Mapping[str, str] = MappingProxyType({})
    ) -> Published:
        """Upload the remaining files of `folder`, create the repo if need be, and commit. Raises PublishError.

        known: the SHA-256 of files that were not changed since.
        """
        with self._explained():
            if self.discard:
                self.wait(0)  # or files go while they are counted
            sizes = {
                path.relative_to(folder).as_posix(): path.stat().st_size
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
            earlier = set(self._running)
            with progress.bar("uploading", sum(sizes.values())) as advance:
                for file in sizes:
                    if file not in earlier:
                        self.add(folder, file, known.get(file))
                for file, size in sizes.items():
                    future = self._running.pop(file)
                    if file in earlier and future.exception():  # for instance since its file moved
                        self._add(folder, file, known.get(file))
                    else:
                        future.result()
                    advance(size)
            return self._commit(message)

    def close(self) -> None:
        """Cancel uploads that have not started."""
        self._pool.close()

    def _add(self, folder: Path, file: str, sha256: str | None) -> None:
        if file in self._operations:
            return
        self._prepare()
        operation = CommitOperationAdd(file, folder / file)
        if sha256 is not None:
            operation.upload_info.sha256 = bytes.fromhex(sha256)  # or the client would read the file for it
        how = {**_where(self.target), "free_memory": self.discard}
        retrying(lambda: self._api.preupload_lfs_files(additions=[operation], **how))
        self._operations[file] = operation
        if operation.path_or_fileobj == b"":  # the client no longer needs the file
            (folder / file).unlink()

    def _prepare(self) -> str:
        """Create repo and branch if need be; return the head that the commit will follow."""
        with self._preparing:
            if self._parent is None:
                target, api = self.target, self._api
                if not target.pull_request:
                    retrying(lambda: api.create_repo(target.repo, private=self._private, exist_ok=True))
                    if target.branch != MAIN:
                        retrying(lambda: api.create_branch(target.repo, branch=target.branch, exist_ok=True))
                self._parent = _head(api, target)
            return self._parent

    def _commit(self, message: str) -> Published:
        parent = self._prepare()
        operations = [self._operations[file] for file in sorted(self._operations)]
        stale = _stale(retrying(lambda: self._api.list_repo_files(self.target.repo, revision=parent)), operations)
        # The manifest records the time taken, so it differs every time. If all else is already there, an earlier
        # process committed it, and nothing is left to do.
        timeless = [operation for operation in operations if operation.path_in_repo != FILE]
        return _already(self._api, self.target, parent, [*timeless, *stale]) or _commit(
            self._api, self.target, [*operations, *stale], parent, message
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except PublishError:
            raise
        except Exception as error:
            raise PublishError(
                f"the upload to {self.target} failed ({short(error)}); nothing was committed. Run the same command "
                "again: finished work is kept."
            ) from error


def publish_files(folder: Path, target: PushTarget, *, parent: str, message: str) -> Published:
    """Add the files of `folder`, in one commit, to a branch that is still at `parent`. Raises PublishError."""
    api = _uploading_client()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
    try:
        for operation in operations:
            retrying(lambda op=operation: api.preupload_lfs_files(additions=[op], free_memory=False, **_where(target)))
        return _commit(api, target, [*operations], parent, message)
    except PublishError:
        raise
    except Exception as error:
        raise PublishError(
            f"uploading to {target} failed ({short(error)}); nothing was committed. Run the same command again."
        ) from error


def _stale(present: Sequence[str], operations: Sequence[CommitOperationAdd]) -> list[CommitOperationDelete]:
    """Delete operations for what an earlier model left in the repo."""
    new = {operation.path_in_repo for operation in operations}
    return [
        CommitOperationDelete(file)
        for file in present
        if file not in new and any(fnmatchcase(file, glob) for glob in REPLACED)
    ]


def _uploading_client() -> HfApi:
    provide_folder()
    return HfApi()


def _where(target: PushTarget) -> dict[str, Any]:
    """For calls of the Hub's client."""
    return {"repo_id": target.repo, "revision": target.branch, "create_pr": target.pull_request}


def _head(api: HfApi, target: PushTarget) -> str:
    return str(retrying(lambda: api.model_info(target.repo, revision=target.branch)).sha)


def _url(target: PushTarget) -> str:
    return f"{constants.ENDPOINT}/{target.repo}" + (f"/tree/{target.branch}" if target.branch != MAIN else "")


def _commit(api: HfApi, target: PushTarget, operations: list[Operation], parent: str, message: str) -> Published:
    """Commit once on top of `parent`. If the response is lost, the Hub shows whether the commit landed."""
    attempts, about = Attempts(), {"commit_message": message, "parent_commit": parent}
    while True:
        RATE_LIMIT.wait()
        try:
            made = api.create_commit(operations=operations, **about, **_where(target))
            return Published(made.pr_url or _url(target), str(made.oid))
        except Exception as error:
            if not is_transient(error) and status_of(error) != 412:
                raise
            head = _head(api, target)
            if landed := _already(api, target, head, operations) if target.pull_request or head != parent else None:
                return landed
            if head != parent:
                raise PublishError(
                    f"{target.ref} moved from {parent[:7]} to {head[:7]} during the upload; nothing was committed. "
                    "Run the same command again."
                ) from error
            if not attempts.wait_after(error, transient=True):
                raise


def _already(api: HfApi, target: PushTarget, head: str, operations: Sequence[Operation]) -> Published | None:
    """What an earlier process, or a request whose answer was lost, has published; None if there is nothing."""
    if not target.pull_request:
        return Published(_url(target), head) if _landed(api, target.repo, head, operations) else None
    for pull in retrying(lambda: newest_pulls(api, target.repo, RECENT)):
        if _landed(api, target.repo, pull.target_commit, operations):
            url = f"{constants.ENDPOINT}/{target.repo}/discussions/{pull_number(pull.ref)}"
            return Published(url, pull.target_commit)
    return None


def _landed(api: HfApi, repo: str, head: str, operations: Sequence[Operation]) -> bool:
    """Whether the repo at `head` holds exactly what the operations put there."""
    there = {
        entry.path: entry for entry in retrying(lambda: list(api.list_repo_tree(repo, revision=head, recursive=True)))
    }
    for operation in operations:
        entry = there.get(operation.path_in_repo)
        if isinstance(operation, CommitOperationDelete):
            if entry is not None:
                return False
            continue
        lfs = getattr(entry, "lfs", None)
        if lfs:
            same = lfs.sha256 == operation.upload_info.sha256.hex()
        else:
            same = getattr(entry, "blob_id", None) == git_blob_oid(Path(str(operation.path_or_fileobj)))
        if not same:
            return False
    return True
