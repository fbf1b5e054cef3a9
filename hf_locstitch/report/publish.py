"""Uploading a merge: large files as they are finished, then ONE commit on top of the head seen at the start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from hf_locstitch.artifacts.manifest import FILE
from hf_locstitch.checkpoints.hub_client import RATE_LIMIT, Attempts, is_transient, retrying, status_of
from hf_locstitch.checkpoints.source import git_blob_oid
from hf_locstitch.errors import OutputError, PublishError
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


@dataclass(frozen=True)
class Published:
    """url: of the repo. commit: 40 hex digits."""

    url: str
    commit: str


def check_target(repo: str) -> None:
    """Raises OutputError unless this user may write to `repo`. Creates nothing."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise OutputError(
            f"{repo} cannot be the name of a repo on the Hub: {str(error).splitlines()[0]} Use another --push-to."
        ) from error
    try:
        user = retrying(lambda: HfApi().whoami())
    except OfflineModeIsEnabled as error:
        raise OutputError(f"HF_HUB_OFFLINE is set, so {repo} cannot be pushed to. Unset it, or use --out.") from error
    except LocalTokenNotFoundError as error:
        raise OutputError(
            f"pushing to {repo} needs a token with the right to write, and there is none: log in with "
            "`hf auth login` or set HF_TOKEN."
        ) from error
    except Exception as error:
        if is_transient(error):
            raise PublishError(f"{constants.ENDPOINT} does not respond ({error}). Try again later.") from error
        raise OutputError(
            f"pushing to {repo} needs a token that {constants.ENDPOINT} accepts ({_short(error)}): "
            "log in with `hf auth login` or set HF_TOKEN."
        ) from error
    if refusal := why_not(user, repo):
        raise OutputError(f"{user['name']} cannot push to {repo}: {refusal}")


def why_not(user: Mapping[str, Any], repo: str) -> str | None:
    """What keeps a token from writing to a repo, and what to do; None if nothing does. user: as whoami answers."""
    namespace, token = repo.split("/")[0], user.get("auth", {}).get("accessToken") or {}
    make_one = f"Make one that can at {constants.ENDPOINT}/settings/tokens, or use --out."
    if token.get("role") == "read":
        return f"the token may only read. {make_one}"
    orgs = [org["name"] for org in user.get("orgs", []) if org.get("roleInOrg") != "read"]
    writable = [user["name"], *orgs]
    if namespace not in writable:
        return (
            f"the token can write to {', '.join(writable)} only. Choose one of these namespaces, or use another token."
        )
    scoped = (token.get("fineGrained") or {}).get("scoped")
    if scoped is None:
        return None
    allowed = [one["entity"].get("name") for one in scoped if "repo.write" in one.get("permissions", ())]
    return None if {namespace, repo} & {*allowed} else f"the fine-grained token may not write there. {make_one}"


class Upload:
    """The upload of one merge to one repo. Files are sent in the background; the repo shows nothing before the commit.

    discard: delete a file from this machine once the Hub has it.
    """

    def __init__(self, repo: str, *, private: bool, discard: bool = False) -> None:
        self.repo, self.discard = repo, discard
        self._private = private
        self._api = HfApi()
        self._parent: str | None = None
        self._operations: dict[str, CommitOperationAdd] = {}
        self._pool = ThreadPoolExecutor(1)
        self._running: list[Future[None]] = []

    def add(self, folder: Path, file: str) -> None:
        """Upload a finished file of `folder` in the background; errors are raised by `wait` and `commit`."""
        self._running.append(self._pool.submit(self._add, folder, file))

    def wait(self, unfinished: int) -> None:
        """Wait until at most `unfinished` files are still uploading. Raises PublishError."""
        while len(self._running) > unfinished:
            future = self._running.pop(0)
            with self._explained():
                future.result()

    def pause(self) -> None:
        """Let running uploads finish or fail, and leave the rest to `commit`."""
        for future in self._running:
            if not future.cancel():
                future.exception()
        self._running.clear()

    def commit(self, folder: Path, message: str, progress: Progress) -> Published:
        """Upload the remaining files of `folder`, create the repo if need be, and commit. Raises PublishError."""
        with self._explained():
            self.wait(0)
            sizes = {path: path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
            with progress.bar("uploading", sum(sizes.values())) as advance:
                for path, size in sizes.items():
                    self._add(folder, path.relative_to(folder).as_posix())
                    advance(size)
            return self._commit(message)

    def close(self) -> None:
        """Cancel uploads that have not started."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _add(self, folder: Path, file: str) -> None:
        if file in self._operations:
            return
        self._prepare()
        operation = CommitOperationAdd(file, folder / file)
        retrying(lambda: self._api.preupload_lfs_files(self.repo, [operation], free_memory=self.discard))
        self._operations[file] = operation
        if operation.path_or_fileobj == b"":  # the client no longer needs the file
            (folder / file).unlink()

    def _prepare(self) -> str:
        """Create the repo if need be; return the head that the commit will follow."""
        if self._parent is None:
            retrying(lambda: self._api.create_repo(self.repo, private=self._private, exist_ok=True))
            self._parent = str(retrying(lambda: self._api.model_info(self.repo)).sha)
        return self._parent

    def _commit(self, message: str) -> Published:
        parent = self._prepare()
        operations = [self._operations[file] for file in sorted(self._operations)]
        stale = _stale(retrying(lambda: self._api.list_repo_files(self.repo, revision=parent)), operations)
        # The manifest records the time taken, so it differs every time. If all else is already there, an earlier
        # process committed it, and nothing is left to do.
        timeless = [operation for operation in operations if operation.path_in_repo != FILE]
        if _landed(self._api, self.repo, parent, [*timeless, *stale]):
            return Published(f"{constants.ENDPOINT}/{self.repo}", parent)
        commit = _commit(self._api, self.repo, [*operations, *stale], parent, message)
        return Published(f"{constants.ENDPOINT}/{self.repo}", commit)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except PublishError:
            raise
        except Exception as error:
            raise PublishError(
                f"the upload to {self.repo} failed ({_short(error)}); nothing was committed. Run the same command "
                "again: finished work is kept."
            ) from error


def publish_files(folder: Path, repo: str, *, parent: str, message: str) -> Published:
    """Add the files of `folder` to a repo that is still at the commit `parent`, in one commit. Raises PublishError."""
    api = HfApi()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
    try:
        for operation in operations:
            retrying(lambda op=operation: api.preupload_lfs_files(repo, [op], free_memory=False))
        commit = _commit(api, repo, [*operations], parent, message)
    except PublishError:
        raise
    except Exception as error:
        raise PublishError(
            f"uploading to {repo} failed ({_short(error)}); nothing was committed. Run the same command again."
        ) from error
    return Published(f"{constants.ENDPOINT}/{repo}", commit)


def _stale(present: Sequence[str], operations: Sequence[CommitOperationAdd]) -> list[CommitOperationDelete]:
    """Delete operations for what an earlier model left in the repo."""
    new = {operation.path_in_repo for operation in operations}
    return [
        CommitOperationDelete(file)
        for file in present
        if file not in new and any(fnmatchcase(file, glob) for glob in REPLACED)
    ]


def _commit(
    api: HfApi,
    repo: str,
    operations: list[CommitOperationAdd | CommitOperationDelete],
    parent: str,
    message: str,
) -> str:
    """Commit once on top of `parent`. If the response is lost, the head shows whether the commit landed."""
    attempts = Attempts()
    while True:
        RATE_LIMIT.wait()
        try:
            return str(api.create_commit(repo, operations, commit_message=message, parent_commit=parent).oid)
        except Exception as error:
            if not is_transient(error) and status_of(error) != 412:
                raise
            head = str(retrying(lambda: api.model_info(repo)).sha)
            if head != parent:
                if _landed(api, repo, head, operations):
                    return head
                raise PublishError(
                    f"{repo} moved from {parent[:7]} to {head[:7]} during the upload; nothing was committed. "
                    "Run the same command again."
                ) from error
            if not attempts.wait_after(error, transient=True):
                raise


def _landed(api: HfApi, repo: str, head: str, operations: Sequence[CommitOperationAdd | CommitOperationDelete]) -> bool:
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


def _short(error: Exception) -> str:
    """One line, without request id and URL."""
    if isinstance(error, RepositoryNotFoundError):
        return "the repo does not exist or is not accessible with this token"
    if status_of(error) == 401:
        return "status 401: the token is invalid or has expired"
    if isinstance(error, HfHubHTTPError):
        return f"status {status_of(error)}: {str(error).splitlines()[0]}"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
