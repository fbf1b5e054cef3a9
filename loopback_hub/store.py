"""What a Hub remembers, on disk: repositories, commits, git blobs and LFS objects. Knows nothing of HTTP.

Layout under the root, everything content-addressed and immutable but the one `repo.json` a repository has:
`blobs/<sha1>` and `lfs/<sha256>` hold file contents once for all repositories,
`repos/<type>s/<owner>/<name>/repo.json` the settings and references, `commits/<sha>.json` a commit with its
whole file list, `lfs/<sha256>` an empty marker for each object that was uploaded to this repository,
`xorbs/<hash>` what came through Xet and LFS objects were then made of.
No name chosen by a client ever becomes a file name, but the validated owner and name of a repository.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from loopback_hub.git import (
    GITATTRIBUTES,
    REPO_TYPES,
    SHA1,
    Change,
    Commit,
    Entry,
    Refusal,
    Repo,
    apply_changes,
    check_repo_id,
    check_sha256,
    folders,
    git_oid,
    lfs_patterns,
    pointer,
)


class Store:
    """Repositories in a folder. Every method is atomic: a lock orders writers, files appear by renaming."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.lock = threading.RLock()
        self._commits: dict[tuple[Path, str], Commit] = {}
        for name in ("blobs", "lfs", "repos", "parts", "tmp", "xorbs"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        for leftover in (self.root / "tmp").iterdir():
            leftover.unlink()

    def secret(self) -> bytes:
        """Key that signs upload links; made once and kept, so links outlive a restart."""
        path = self.root / "secret"
        with self.lock:
            if not path.exists():
                self._write(path, secrets.token_hex(32).encode())
            return path.read_bytes()

    # Repositories

    def create(
        self,
        repo_type: str,
        repo_id: str,
        author: str,
        private: bool = False,
        gated: bool | str = False,
    ) -> Repo:
        """A new repository with the first commit that the Hub makes. Raises Refusal 409 if it exists."""
        with self.lock:
            folder = self._folder(repo_type, check_repo_id(repo_id))
            if (folder / "repo.json").exists():
                raise Refusal(409, f"You already created this {repo_type} repo: {repo_id}")
            repo = Repo(repo_id, repo_type, _now(), private, "auto" if gated is True else gated)
            attributes = Change(".gitattributes", self.put_blob(GITATTRIBUTES.encode()))
            self._commit(repo, "main", None, [attributes], "initial commit", "", author)
            return self.get(repo_type, repo_id)

    def get(self, repo_type: str, repo_id: str) -> Repo:
        """The repository. Raises Refusal 404 RepoNotFound."""
        try:
            text = (self._folder(repo_type, check_repo_id(repo_id)) / "repo.json").read_text("utf-8")
        except (FileNotFoundError, Refusal):
            raise Refusal(404, f"Repository not found: {repo_type} {repo_id}", "RepoNotFound") from None
        return Repo(**json.loads(text))

    def all(self, repo_type: str) -> list[Repo]:
        """Every repository of a type, by name."""
        found = (self.root / "repos" / f"{repo_type}s").glob("*/*/repo.json")
        return [Repo(**json.loads(path.read_text("utf-8"))) for path in sorted(found)]

    def update(self, repo: Repo) -> None:
        """Keep changed settings or references of a repository that exists."""
        with self.lock:
            self.get(repo.type, repo.id)
            self._save(repo)

    def delete(self, repo_type: str, repo_id: str) -> None:
        """Forget a repository; contents that others may share stay. Raises Refusal 404 RepoNotFound."""
        with self.lock:
            self.get(repo_type, repo_id)
            shutil.rmtree(self._folder(repo_type, repo_id))

    # References and commits

    def resolve(self, repo: Repo, revision: str) -> str:
        """Full sha of a branch, tag, `refs/…` name or full sha. Raises Refusal 404 RevisionNotFound."""
        spaces = {"refs/heads/": repo.branches, "refs/tags/": repo.tags, "refs/pr/": repo.pulls}
        for prefix, names in spaces.items():
            if revision.startswith(prefix) and revision.removeprefix(prefix) in names:
                return names[revision.removeprefix(prefix)]
        sha = repo.branches.get(revision) or repo.tags.get(revision)
        if sha is None and SHA1.fullmatch(revision) and self._commit_path(repo, revision).exists():
            sha = revision
        if sha is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def commit_at(self, repo: Repo, revision: str) -> Commit:
        """The commit a revision stands for. Raises Refusal 404 RevisionNotFound."""
        return self._load(repo, self.resolve(repo, revision))

    def history(self, repo: Repo, revision: str) -> Iterator[Commit]:
        """Commits from the revision back to the first one."""
        commit: Commit | None = self.commit_at(repo, revision)
        while commit:
            yield commit
            commit = self._load(repo, commit.parent) if commit.parent else None

    def entry(self, repo: Repo, revision: str, path: str) -> tuple[Commit, Entry]:
        """A file of a revision, with its commit. Raises Refusal 404 RevisionNotFound or EntryNotFound."""
        commit = self.commit_at(repo, revision)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.sha})
        return commit, commit.files[path]

    def last_changes(self, repo: Repo, commit: Commit) -> dict[str, Commit]:
        """For every file and folder of a commit, the commit that last changed it."""
        pending = _states(commit)
        found: dict[str, Commit] = {}
        for child in self.history(repo, commit.sha):
            older = _states(self._load(repo, child.parent)) if child.parent else {}
            changed = [path for path, oid in pending.items() if older.get(path) != oid]
            found.update((path, child) for path in changed)
            for path in changed:
                del pending[path]
        return found

    def commit(
        self,
        repo_type: str,
        repo_id: str,
        branch: str,
        changes: Iterable[Change],
        *,
        title: str,
        message: str = "",
        author: str = "",
        parent: str | None = None,
        pull: bool = False,
    ) -> tuple[Commit, str]:
        """One commit on a branch (or `refs/pr/N`), or with `pull` on a new pull request from it.

        Returns it with the branch or `refs/pr/N` it is on.
        parent: sha, or its first 7 digits at least, that the branch must still point to.
        Raises Refusal: 404 (repository, branch, file to delete), 412 (parent is stale), 400 (conflicts).
        """
        with self.lock:
            repo = self.get(repo_type, repo_id)
            head = self._branch_head(repo, branch)
            if pull:
                branch = f"refs/pr/{len(repo.pulls) + 1}"
                head = self.resolve(repo, parent) if parent else head
            elif parent and (len(parent) < 7 or not head.startswith(parent.lower())):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            return self._commit(repo, branch, head, changes, title, message, author), branch

    # Contents

    def patterns(self, repo: Repo, revision: str) -> list[str]:
        """LFS patterns in force at a revision: its `.gitattributes`, else the Hub's default ones."""
        entry = self.commit_at(repo, revision).files.get(".gitattributes")
        text = self.content(entry).read_text("utf-8", "replace") if entry else GITATTRIBUTES
        return lfs_patterns(text)

    def content(self, entry: Entry) -> Path:
        """The file on disk that holds an entry's bytes."""
        return self._object(entry.lfs) if entry.lfs else self._blob(entry.oid)

    def put_blob(self, data: bytes) -> Entry:
        """Keep a regular file's content."""
        oid = git_oid("blob", data)
        if not self._blob(oid).exists():
            self._write(self._blob(oid), data)
        return Entry(oid, len(data))

    def lfs_entry(self, repo: Repo, oid: object, size: object = None) -> Entry:
        """The entry of an object that was uploaded to this repository. Raises Refusal 400 if it was not."""
        sha256 = check_sha256(oid)
        if not self.has_object(repo, sha256):
            raise Refusal(400, f"LFS object {sha256} was not uploaded to {repo.id}")
        real = self._object(sha256).stat().st_size
        if size is not None and size != real:
            raise Refusal(400, f"LFS object {sha256} has {real} bytes, not {size!r}")
        return Entry(git_oid("blob", pointer(sha256, real)), real, sha256)

    def has_object(self, repo: Repo, oid: str) -> bool:
        """Whether this repository owns the LFS object."""
        return self._marker(repo, oid).exists() and self._object(oid).exists()

    def put_object(self, repo: Repo, chunks: Iterable[bytes], oid: str | None = None) -> str:
        """Keep an LFS object of a repository; returns its sha256. Raises Refusal 400 unless it is `oid`."""
        digest = hashlib.sha256()
        with self.temporary() as (stream, path):
            for chunk in chunks:
                digest.update(chunk)
                stream.write(chunk)
            stream.close()
            found = digest.hexdigest()
            if oid is not None and found != oid:
                raise Refusal(400, f"BadDigest: the content has sha256 {found}, {oid} was announced")
            with self.lock:
                self.get(repo.type, repo.id)
                self._object(found).parent.mkdir(exist_ok=True)
                os.replace(path, self._object(found))
                self._marker(repo, found).parent.mkdir(exist_ok=True)
                self._marker(repo, found).touch()
        return found

    def xorb(self, key: str) -> Path:
        """Where a xorb is that was uploaded through Xet, if it was. key: its hash, 64 hex digits."""
        return self.root / "xorbs" / key[:2] / key

    def put_xorb(self, key: str, data: bytes) -> None:
        """Keep a xorb."""
        self._write(self.xorb(key), data)

    def parts_folder(self, repo: Repo, oid: str) -> Path:
        """Where the parts of a multipart upload wait until they are complete."""
        key = hashlib.sha256(f"{repo.type}/{repo.id}/{oid}".encode()).hexdigest()
        return self.root / "parts" / key

    @contextmanager
    def temporary(self) -> Iterator[tuple[IO[bytes], Path]]:
        """A file on the store's disk, to be filled and renamed; removed if it still has its name."""
        path = self.root / "tmp" / secrets.token_hex(16)
        try:
            with path.open("xb") as stream:
                yield stream, path
        finally:
            with suppress(FileNotFoundError):
                path.unlink()

    def _commit(
        self,
        repo: Repo,
        ref: str,
        head: str | None,
        changes: Iterable[Change],
        title: str,
        message: str,
        author: str,
    ) -> Commit:
        files = apply_changes(self._load(repo, head).files if head else {}, changes)
        date = _now()
        text = f"tree {folders(files)['']}\nauthor {author} {date}\n\n{title}\n\n{message}"
        sha = git_oid("commit", (f"parent {head}\n" if head else "").encode() + text.encode())
        commit = Commit(sha, head, title, message, author, date, files)
        path = self._commit_path(repo, sha)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write(path, json.dumps(asdict(commit)).encode())
        names = "pulls" if ref.startswith("refs/pr/") else "branches"
        updated = {**getattr(repo, names), ref.removeprefix("refs/pr/").removeprefix("refs/heads/"): sha}
        self._save(replace(repo, **{names: updated}))
        return commit

    def _branch_head(self, repo: Repo, branch: str) -> str:
        if branch.startswith("refs/pr/") and branch.removeprefix("refs/pr/") in repo.pulls:
            return repo.pulls[branch.removeprefix("refs/pr/")]
        name = branch.removeprefix("refs/heads/")
        if name in repo.branches:
            return repo.branches[name]
        self.resolve(repo, branch)
        raise Refusal(400, f"Commits go to a branch, and {branch} is none")

    def _load(self, repo: Repo, sha: str) -> Commit:
        path = self._commit_path(repo, sha)
        key = (path.parent, sha)
        if key not in self._commits:
            raw = json.loads(path.read_text("utf-8"))
            raw["files"] = {name: Entry(**entry) for name, entry in raw["files"].items()}
            self._commits[key] = Commit(**raw)
        return self._commits[key]

    def _save(self, repo: Repo) -> None:
        self._write(self._folder(repo.type, repo.id) / "repo.json", json.dumps(asdict(repo)).encode())

    def _write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.temporary() as (stream, temporary):
            stream.write(data)
            stream.close()
            os.replace(temporary, path)

    def _folder(self, repo_type: str, repo_id: str) -> Path:
        if repo_type not in REPO_TYPES:
            raise Refusal(400, f"Unknown repository type {repo_type!r}, known: {', '.join(REPO_TYPES)}")
        return self.root / "repos" / f"{repo_type}s" / repo_id

    def _commit_path(self, repo: Repo, sha: str) -> Path:
        return self._folder(repo.type, repo.id) / "commits" / f"{sha}.json"

    def _marker(self, repo: Repo, oid: str) -> Path:
        return self._folder(repo.type, repo.id) / "lfs" / oid

    def _object(self, oid: str) -> Path:
        return self.root / "lfs" / oid[:2] / oid

    def _blob(self, oid: str) -> Path:
        return self.root / "blobs" / oid[:2] / oid


def _states(commit: Commit) -> dict[str, str]:
    tree = folders(commit.files)
    return {**{path: entry.oid for path, entry in commit.files.items()}, **tree}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
