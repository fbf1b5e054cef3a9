"""What git and the Hub mean by files, folders, commits and names: pure functions and plain data."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

REGULAR_LIMIT = 10_000_000
REPO_TYPES = ("model", "dataset")
LFS_SUFFIXES = (
    "7z arrow avro bin bmp bz2 ckpt flac ftz gguf gif gz h5 ico jpeg jpg joblib lfs.* mlmodel model mp3 mp4"
    " msgpack npy npz onnx ot parquet pb pickle pkl png pt pth rar safetensors sqlite tar tflite tgz tiff"
    " wasm wav webm webp xz zip zst"
)
GITATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES.split())

_NAME = re.compile(r"\w(?:[\w.-]*\w)?", re.ASCII)
SHA1 = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BAD_REF = re.compile(r"[\s\x00-\x1f\x7f~^:?*\[\\]|\.\.|//|/\.|@\{|^[/.-]|[/.]$|\.lock$")


class Refusal(Exception):
    """A request the Hub refuses: an HTTP status, the Hub's error code (may be empty) and a message."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, dict(headers or {})

    def __str__(self) -> str:
        return f"{self.status} {self.code or 'Error'}: {self.message}"


@dataclass(frozen=True)
class Entry:
    """One file of a commit. oid: git blob sha1 (of the pointer if LFS); size: content bytes; lfs: sha256."""

    oid: str
    size: int
    lfs: str | None = None

    @property
    def etag(self) -> str:
        """What identifies the content to a client: sha256 of an LFS file, blob sha1 of a regular one."""
        return self.lfs or self.oid

    @property
    def pointer_size(self) -> int:
        """Bytes of the LFS pointer; 0 for a regular file."""
        return len(pointer(self.lfs, self.size)) if self.lfs else 0


@dataclass(frozen=True)
class Commit:
    """A commit and the complete file list it stands for."""

    sha: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, Entry]


@dataclass(frozen=True)
class Repo:
    """Settings and references of a repository. gated: False, "auto" or "manual"."""

    id: str
    type: str
    created: str
    private: bool = False
    gated: bool | str = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        """The user or organisation the repository belongs to."""
        return self.id.split("/")[0]


@dataclass(frozen=True)
class Change:
    """One operation of a commit: a file set to an entry, or (entry None) a file or folder deleted."""

    path: str
    entry: Entry | None = None
    folder: bool = False


def git_oid(kind: str, data: bytes) -> str:
    """sha1 that git gives an object of this kind ("blob", "tree", "commit")."""
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


def folders(files: Mapping[str, Entry]) -> dict[str, str]:
    """Git tree sha1 of every folder that these files imply, the root under the empty path."""
    children: dict[str, dict[str, bytes]] = {"": {}}
    for path, entry in files.items():
        *parents, name = path.split("/")
        for depth in range(1, len(parents) + 1):
            children.setdefault("/".join(parents[:depth]), {})
        children["/".join(parents)][name] = b"100644 %s\0" % name.encode() + bytes.fromhex(entry.oid)
    oids: dict[str, str] = {}
    for folder in sorted(children, key=lambda path: -path.count("/") if path else 1):
        lines = children[folder]
        oids[folder] = git_oid("tree", b"".join(lines[name] for name in sorted(lines, key=str.encode)))
        if folder:
            parent, _, name = folder.rpartition("/")
            # Git sorts a folder as if its name ended with a slash.
            children[parent][name + "/"] = b"40000 %s\0" % name.encode() + bytes.fromhex(oids[folder])
    return oids


def lfs_patterns(gitattributes: str) -> list[str]:
    """Patterns that a `.gitattributes` file sends to LFS."""
    rows = (line.split() for line in gitattributes.splitlines())
    return [row[0] for row in rows if row and not row[0].startswith("#") and "filter=lfs" in row[1:]]


def wants_lfs(path: str, size: int, sample: bytes, patterns: Iterable[str]) -> bool:
    """Whether the Hub stores this file as LFS: by size, by name, or because its beginning is binary."""
    if size == 0:
        return False
    name = path.rpartition("/")[2]
    listed = any(fnmatchcase(path if "/" in pattern else name, pattern) for pattern in patterns)
    return listed or size > REGULAR_LIMIT or b"\0" in sample


def check_path(path: object) -> str:
    """The path of a file in a repository, unchanged. Raises Refusal 400 if git or the Hub refuses it."""
    if not isinstance(path, str) or not path:
        raise Refusal(400, "A path must be a non-empty string")
    segments = path.split("/")
    if any(part in ("", ".", "..") or part.lower() == ".git" for part in segments) or re.search(
        r"[\x00-\x1f\x7f\\]", path
    ):
        raise Refusal(400, f"Invalid path in repository: {path!r}")
    return path


def check_sha256(oid: object) -> str:
    """The LFS object id, unchanged. Raises Refusal 422 if it is none."""
    if not isinstance(oid, str) or not _SHA256.fullmatch(oid):
        raise Refusal(422, f"Not a sha256: {oid!r}")
    return oid


def check_repo_id(repo_id: str) -> str:
    """owner/name, unchanged. Raises Refusal 400 if the Hub would not have it."""
    parts = repo_id.split("/")
    valid = len(parts) == 2 and all(_NAME.fullmatch(part) and len(part) <= 96 for part in parts)
    if not valid or "--" in repo_id or ".." in repo_id or repo_id.endswith((".git", ".ipynb")):
        raise Refusal(400, f"Invalid repository name: {repo_id!r}")
    return repo_id


def apply_changes(files: Mapping[str, Entry], changes: Iterable[Change]) -> dict[str, Entry]:
    """The file list after these changes. Raises Refusal 404 (nothing to delete) or 400 (conflict)."""
    result = dict(files)
    for change in changes:
        if change.entry is not None:
            result[check_path(change.path)] = change.entry
        elif change.folder:
            inside = [path for path in result if path.startswith(change.path.rstrip("/") + "/")]
            if not inside:
                raise Refusal(404, f"A folder with this name doesn't exist: {change.path}", "EntryNotFound")
            for path in inside:
                del result[path]
        elif result.pop(change.path, None) is None:
            raise Refusal(404, f"A file with this name doesn't exist: {change.path}", "EntryNotFound")
    clash = folders_of(result) & result.keys()
    if clash:
        raise Refusal(400, f"{min(clash)} would be a file and a folder at once")
    return dict(sorted(result.items()))


def folders_of(paths: Iterable[str]) -> set[str]:
    """Every folder that these file paths imply, but the root."""
    found: set[str] = set()
    for path in paths:
        while path := path.rpartition("/")[0]:
            found.add(path)
    return found


def check_ref(name: object) -> str:
    """The name of a branch or tag, unchanged. Raises Refusal 400 if git would refuse it."""
    if not isinstance(name, str) or not name or _BAD_REF.search(name) or SHA1.fullmatch(name):
        raise Refusal(400, f"Invalid reference name: {name!r}")
    return name


def pointer(sha256: str, size: int) -> bytes:
    """The text that git keeps in place of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
