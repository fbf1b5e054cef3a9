"""Uploading a finished merge: files first, then ONE commit on top of the head that was seen before."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from hf_locstitch.checkpoints.hub import git_blob_oid
from hf_locstitch.checkpoints.hub_client import is_passing, retrying, status_of, wait_before
from hf_locstitch.checkpoints.source import file_sha256
from hf_locstitch.errors import OutputError, PublishError
from hf_locstitch.progress import Progress

# What an earlier model in the repo may have left that would be loaded in place of, or mistaken for, the new one.
REPLACED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*.gguf",
    "masks/*",
    "figures/*",
)
COMMIT_ATTEMPTS = 5


@dataclass(frozen=True)
class Published:
    """url: of the repo. commit: 40 hex digits."""

    url: str
    commit: str


def check_target(repo: str) -> None:
    """Raises OutputError unless this user may write to `repo`. Creates nothing."""
    try:
        user = retrying(lambda: HfApi().whoami())
    except OfflineModeIsEnabled as error:
        raise OutputError(f"HF_HUB_OFFLINE is set, so {repo} cannot be pushed to. Unset it, or give --out.") from error
    except Exception as error:
        if is_passing(error):
            raise PublishError(f"{constants.ENDPOINT} does not answer ({error}). Try again later.") from error
        raise OutputError(
            f"pushing to {repo} needs a token that {constants.ENDPOINT} accepts ({_short(error)}): "
            "log in with `hf auth login` or set HF_TOKEN."
        ) from error
    writable = [user["name"], *(org["name"] for org in user.get("orgs", []))]
    if repo.split("/")[0] not in writable:
        raise OutputError(
            f"{user['name']} cannot push to {repo}: the token writes to {', '.join(writable)}. "
            "Choose one of these, or use another token."
        )


def publish(folder: Path, repo: str, *, private: bool, message: str, progress: Progress) -> Published:
    """Upload all of `folder` to `repo` (created if need be) in one commit. Raises PublishError."""
    api = HfApi()
    try:
        return _publish(api, folder, repo, private, message, progress)
    except PublishError:
        raise
    except Exception as error:
        raise PublishError(
            f"the merge is complete, but uploading it to {repo} failed ({_short(error)}); nothing was committed."
        ) from error


def _publish(api: HfApi, folder: Path, repo: str, private: bool, message: str, progress: Progress) -> Published:
    retrying(lambda: api.create_repo(repo, private=private, exist_ok=True))
    parent = str(retrying(lambda: api.model_info(repo)).sha)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
    with progress.bar("uploading", sum(path.stat().st_size for path in files)) as advance:
        for path, operation in zip(files, operations, strict=True):
            retrying(lambda op=operation: api.preupload_lfs_files(repo, [op], free_memory=False))
            advance(path.stat().st_size)
    stale = _stale(retrying(lambda: api.list_repo_files(repo, revision=parent)), operations)
    commit = _commit(api, repo, [*operations, *stale], parent, message)
    return Published(f"{constants.ENDPOINT}/{repo}", commit)


def _stale(present: Sequence[str], operations: Sequence[CommitOperationAdd]) -> list[CommitOperationDelete]:
    """What an earlier model left in the repo."""
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
    """One commit on `parent`, once. After a lost answer the head tells whether it landed."""
    for attempt in range(COMMIT_ATTEMPTS):
        try:
            return str(api.create_commit(repo, operations, commit_message=message, parent_commit=parent).oid)
        except Exception as error:
            if not is_passing(error) and status_of(error) != 412:
                raise
            head = str(retrying(lambda: api.model_info(repo)).sha)
            if head != parent:
                if _landed(api, repo, head, operations):
                    return head
                raise PublishError(
                    f"{repo} moved from {parent[:7]} to {head[:7]} while the merge was uploaded; "
                    "nothing was committed. Give the same command again."
                ) from error
            if attempt == COMMIT_ATTEMPTS - 1:
                raise
            time.sleep(wait_before(attempt, error))
    raise AssertionError("unreachable")


def _landed(api: HfApi, repo: str, head: str, operations: Sequence[CommitOperationAdd | CommitOperationDelete]) -> bool:
    """Whether the repo holds at `head` just what the operations put there."""
    there = {
        entry.path: entry for entry in retrying(lambda: list(api.list_repo_tree(repo, revision=head, recursive=True)))
    }
    for operation in operations:
        entry = there.get(operation.path_in_repo)
        if isinstance(operation, CommitOperationDelete):
            if entry is not None:
                return False
            continue
        path = Path(str(operation.path_or_fileobj))
        lfs = getattr(entry, "lfs", None)
        same = lfs.sha256 == file_sha256(path) if lfs else getattr(entry, "blob_id", None) == git_blob_oid(path)
        if not same:
            return False
    return True


def _short(error: Exception) -> str:
    """One line, without the request's id and address."""
    if isinstance(error, RepositoryNotFoundError):
        return "the repo does not exist, or is closed to this token"
    if isinstance(error, HfHubHTTPError):
        return f"status {status_of(error)}: {str(error).splitlines()[0]}"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
