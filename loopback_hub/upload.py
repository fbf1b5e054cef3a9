"""How files come to the loopback Hub: preupload, LFS objects (whole or in parts), commits."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from loopback_hub import card
from loopback_hub.git import (
    REGULAR_LIMIT,
    Change,
    Entry,
    Refusal,
    Repo,
    check_path,
    check_sha256,
    wants_lfs,
)
from loopback_hub.rights import Rights
from loopback_hub.store import Store
from loopback_hub.wire import CHUNK, Answer, Call, content, json_object, object_list
from loopback_hub.xorb import packed_range


class Uploads:
    """Everything that writes files. url: web address of a repository; origin: base of all addresses."""

    def __init__(
        self,
        store: Store,
        rights: Rights,
        origin: Callable[[], str],
        url: Callable[[str, str], str],
    ) -> None:
        self.multipart_chunk: int | None = None
        self._store, self._rights, self._origin, self._url = store, rights, origin, url
        self._secret = store.secret()

    def preupload(self, call: Call, repo: Repo, rest: list[str]) -> Answer:
        """How each file is to be uploaded, and what is at its path already."""
        self.committer(call, repo)
        revision = "/".join(rest)
        files = self._store.commit_at(repo, revision).files
        patterns = self._store.patterns(repo, revision)
        modes = []
        for item in object_list(call.body.json(), "files"):
            path, size = check_path(item.get("path")), item.get("size")
            if not isinstance(size, int) or size < 0:
                raise Refusal(400, f"size of {path} must be a number of bytes, not {size!r}")
            lfs = wants_lfs(path, size, _decoded(item.get("sample") or ""), patterns)
            remote = {"oid": files[path].etag} if path in files else {}
            modes.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, **remote})
        return Answer({"files": modes, "commitOid": self._store.resolve(repo, revision)})

    def commit(self, call: Call, repo: Repo, rest: list[str]) -> Answer:
        """One commit from NDJSON lines: a header, then operations."""
        pull = call.flag("create_pr")
        user = self.committer(call, repo)
        branch = "/".join(rest)
        lines = (json_object(line) for line in call.body.lines())
        header = next(lines, {})
        about = header.get("value") if header.get("key") == "header" else None
        if not isinstance(about, dict) or not about.get("summary"):
            raise Refusal(400, "The first line must be a header with a summary")
        changes = list(self._changes(repo, branch, lines))
        if not changes:
            raise Refusal(400, "The commit has no operation")
        commit, ref = self._store.commit(
            repo.type,
            repo.id,
            branch,
            changes,
            title=str(about["summary"]),
            message=str(about.get("description") or ""),
            author=user,
            parent=None if about.get("parentCommit") is None else str(about["parentCommit"]),
            pull=pull,
        )
        url = self._url(repo.type, repo.id)
        answer = {"success": True, "commitOid": commit.sha, "commitUrl": f"{url}/commit/{commit.sha}"}
        if pull:
            answer["pullRequestUrl"] = f"{url}/discussions/{ref.removeprefix('refs/pr/')}"
        return Answer({**answer, "hookOutput": ""})

    def _changes(self, repo: Repo, branch: str, lines: Iterable[dict]) -> Iterator[Change]:
        patterns = self._store.patterns(repo, branch)
        for line in lines:
            key, value = line.get("key"), line.get("value")
            if not isinstance(value, dict):
                raise Refusal(400, f"Operation {key!r} has no value")
            path = check_path(str(value.get("path", "")).rstrip("/"))
            if key == "file":
                yield Change(path, self._regular(repo, path, value, patterns))
            elif key == "lfsFile":
                if value.get("algo") != "sha256":
                    raise Refusal(400, f"Unknown hash of an LFS file: {value.get('algo')!r}")
                yield Change(path, self._store.lfs_entry(repo, value.get("oid"), value.get("size")))
            elif key in ("deletedFile", "deletedFolder"):
                yield Change(path, folder=key == "deletedFolder")
            else:
                raise Refusal(400, f"Unknown operation {key!r}")

    def _regular(self, repo: Repo, path: str, value: Mapping[str, object], patterns: list[str]) -> Entry:
        content = value.get("content")
        data = _decoded(content) if value.get("encoding") == "base64" else str(content).encode()
        if wants_lfs(path, len(data), data[:512], patterns):
            raise Refusal(400, f"{path} is binary or larger than {REGULAR_LIMIT} bytes: upload it with LFS")
        check_readme(path, data, repo.type)
        return self._store.put_blob(data)

    def committer(self, call: Call, repo: Repo) -> str:
        """The user, who may commit or propose what the call asks for. Raises Refusal."""
        if call.flag("create_pr"):
            return self._rights.signed_in(call)
        return self._rights.writer(call, repo.owner)

    def lfs_batch(self, call: Call, repo: Repo) -> Answer:
        """Where to upload objects; nothing for those the repository has."""
        wish = call.body.json()
        if wish.get("operation") != "upload":
            raise Refusal(422, f"Unsupported LFS operation {wish.get('operation')!r}")
        self._rights.writer(call, repo.owner) if wish.get("ref") else self._rights.signed_in(call)
        multipart = "multipart" in (wish.get("transfers") or ())
        return Answer(
            {
                "transfer": "multipart" if multipart and self.multipart_chunk else "basic",
                "objects": [self._lfs_object(repo, item, multipart) for item in object_list(wish, "objects")],
            },
            headers={"Content-Type": "application/vnd.git-lfs+json"},
        )

    def _lfs_object(self, repo: Repo, item: Mapping[str, object], multipart: bool) -> dict:
        oid, size = check_sha256(item.get("oid")), item.get("size")
        if not isinstance(size, int) or size <= 0:
            return {"oid": oid, "size": size, "error": {"code": 422, "message": "Invalid size"}}
        answer = {"oid": oid, "size": size, "authenticated": True}
        if self._store.has_object(repo, oid):
            return answer
        chunk = self.multipart_chunk
        if multipart and chunk and size > chunk:
            count = math.ceil(size / chunk)
            parts = {str(n): self.signed("part", repo, oid, size, n) for n in range(1, count + 1)}
            upload = {
                "href": self.signed("complete", repo, oid, size, count),
                "header": {"chunk_size": str(chunk), **parts},
            }
        else:
            upload = {"href": self.signed("upload", repo, oid, size)}
        verify = {"href": f"{self._url(repo.type, repo.id)}.git/info/lfs/objects/verify"}
        return {**answer, "actions": {"upload": upload, "verify": verify}}

    def lfs_verify(self, call: Call, repo: Repo) -> Answer:
        """Whether an object arrived."""
        self._rights.signed_in(call)
        wish = call.body.json()
        self._store.lfs_entry(repo, wish.get("oid"), wish.get("size"))
        return Answer({})

    def signed(self, action: str, repo: Repo, oid: str, size: int, number: int = 0) -> str:
        """A link to the storage that lets its bearer do one thing with one object."""
        path = f"/_lfs/{action}/{repo.type}s/{repo.id}/{oid}/{size}/{number}"
        return f"{self._origin()}{path}?signature={self.signature(path)}"

    def is_signed(self, path: str, signature: str) -> bool:
        """Whether this Hub signed a path."""
        return hmac.compare_digest(signature, self.signature(path))

    def signature(self, path: str) -> str:
        """What only this Hub can make of a path."""
        return hmac.new(self._secret, path.encode(), "sha256").hexdigest()

    def object(self, call: Call, method: str, parts: list[str]) -> Answer:
        """The storage behind LFS: whoever has a link may use it, as with a presigned URL."""
        given = call.query.get("signature", [""])[0]
        if len(parts) != 7 or not self.is_signed(urlsplit(call.target).path, given):
            raise Refusal(403, "SignatureDoesNotMatch")
        action, folder, owner, name, oid, size, number = parts
        repo = self._store.get(folder.removesuffix("s"), f"{owner}/{name}")
        if (method, action) == ("GET", "download"):
            entry = self._store.lfs_entry(repo, oid)
            return content(call, self._store.content(entry), {"ETag": f'"{oid}"'})
        if (method, action) == ("GET", "xorb"):
            return packed_range(call, self._store.content(self._store.lfs_entry(repo, oid)), int(number))
        if (method, action) == ("PUT", "upload"):
            self._store.put_object(repo, _sized(call.body, int(size)), oid)
            return Answer(headers={"ETag": f'"{oid}"'})
        if (method, action) == ("PUT", "part"):
            return self._put_part(call, self._store.parts_folder(repo, oid), int(number))
        if (method, action) == ("POST", "complete"):
            return self._complete(call, repo, oid, int(size), int(number))
        raise Refusal(405, "MethodNotAllowed")

    def _put_part(self, call: Call, folder: Path, number: int) -> Answer:
        digest = hashlib.md5(usedforsecurity=False)
        folder.mkdir(exist_ok=True)
        with self._store.temporary() as (stream, path):
            for chunk in call.body:
                digest.update(chunk)
                stream.write(chunk)
            stream.close()
            os.replace(path, folder / str(number))
        return Answer(headers={"ETag": f'"{digest.hexdigest()}"'})

    def _complete(self, call: Call, repo: Repo, oid: str, size: int, count: int) -> Answer:
        named = {part.get("partNumber"): part.get("etag") for part in object_list(call.body.json(), "parts")}
        if self._store.has_object(repo, oid):
            return Answer({})
        folder = self._store.parts_folder(repo, oid)
        paths = [folder / str(number) for number in range(1, count + 1)]
        for number, path in enumerate(paths, 1):
            if not path.exists() or named.get(number) != f'"{_md5(path)}"':
                raise Refusal(400, f"InvalidPart: {number}")
        self._store.put_object(repo, _sized(_joined(paths), size), oid)
        shutil.rmtree(folder)
        return Answer({})


def check_readme(path: str, data: bytes, repo_type: str) -> None:
    """Raises Refusal 400 if this is a README.md with metadata that the Hub refuses."""
    if path == "README.md":
        errors, _ = card.problems(data.decode("utf-8", "replace"), repo_type)
        if errors:
            raise Refusal(400, "Invalid metadata in README.md: " + "; ".join(errors))


def _decoded(content: object) -> bytes:
    try:
        return base64.b64decode(str(content), validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(400, "Content is not base64") from None


def _sized(chunks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The chunks. Raises Refusal 400 unless they have this many bytes together."""
    seen = 0
    for chunk in chunks:
        seen += len(chunk)
        yield chunk
    if seen != size:
        raise Refusal(400, f"{seen} bytes arrived, {size} were announced")


def _joined(paths: Iterable[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                yield chunk


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for chunk in _joined([path]):
        digest.update(chunk)
    return digest.hexdigest()
