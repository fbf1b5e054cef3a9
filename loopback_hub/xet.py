"""Xet at the loopback Hub: tokens, and the content-addressed storage (CAS) behind them.

What is uploaded becomes an LFS object, and every LFS object can be downloaded: it is packed into xorbs when they are
asked for. Its SHA-256 serves as its Xet hash, which the client does not look into.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from urllib.parse import quote

from loopback_hub.git import Commit, Entry, Refusal, Repo, check_sha256
from loopback_hub.rights import CAS, Rights
from loopback_hub.store import Store
from loopback_hub.upload import Uploads
from loopback_hub.wire import Answer, Call, select_range
from loopback_hub.xorb import CHUNK, Term, chunks, packed_bytes, shard_files, xorbs_of

LIFETIME = 3600  # seconds that a token is good for


class Xet:
    """enabled: whether LFS files are announced and taken through Xet."""

    def __init__(self, store: Store, rights: Rights, origin: Callable[[], str], uploads: Uploads) -> None:
        self.enabled = False
        self._store, self._rights, self._origin, self._uploads = store, rights, origin, uploads

    def read_token(self, call: Call, repo: Repo, rest: list[str]) -> Answer:
        """Lets its bearer download what the repository has."""
        self._rights.open_gate(call, repo)
        return self._token("read", repo)

    def write_token(self, call: Call, repo: Repo, rest: list[str]) -> Answer:
        """Lets its bearer upload to the repository."""
        self._uploads.committer(call, repo)
        return self._token("write", repo)

    def _token(self, right: str, repo: Repo) -> Answer:
        self._check_enabled()
        url, expires = f"{self._origin()}/{CAS}", int(time.time()) + LIFETIME
        path = f"{right}/{repo.type}s/{repo.id}/{expires}"
        token = f"{path}/{self._uploads.signature(path)}"
        headers = {
            "X-Xet-Cas-Url": url,
            "X-Xet-Access-Token": token,
            "X-Xet-Token-Expiration": str(expires),
        }
        return Answer({"casUrl": url, "accessToken": token, "exp": expires}, headers=headers)

    def _check_enabled(self) -> None:
        if not self.enabled:
            raise Refusal(404, "Sorry, we can't find the page you are looking for.")

    def headers(self, repo: Repo, commit: Commit, entry: Entry) -> dict[str, str]:
        """Of the answer to a download: where else the file can be had."""
        if not self.enabled or entry.lfs is None:
            return {}
        token = f"{self._origin()}/api/{repo.type}s/{quote(repo.id)}/xet-read-token/{commit.sha}"
        plan = f"{self._origin()}/{CAS}/v1/reconstructions/{entry.lfs}"
        return {
            "X-Xet-Hash": entry.lfs,
            "Link": f'<{token}>; rel="xet-auth", <{plan}>; rel="xet-reconstruction-info"',
        }

    def listed(self, entry: Entry) -> dict[str, str]:
        """Of a line in a list of files."""
        return {"xetHash": entry.lfs} if self.enabled and entry.lfs else {}

    def cas(self, call: Call, method: str, parts: list[str]) -> Answer:
        """The storage. Raises Refusal."""
        self._check_enabled()
        right, repo = self._bearer(call)
        if method == "GET" and parts[0] in ("v1", "v2") and parts[1:2] == ["reconstructions"]:
            return self._reconstruction(call, repo, "".join(parts[2:]), parts[0])
        if parts[:3] == ["v1", "xorbs", "default"]:
            key = check_sha256("".join(parts[3:]))
            if method == "POST" and right == "write":
                return self._put_xorb(call, key)
            if method == "GET" and self._store.xorb(key).exists():
                return Answer()
        if (method, parts[:2], right) == ("POST", ["v1", "shards"], "write"):
            return self._put_shard(call, repo)
        raise Refusal(404, "Not found")

    def _bearer(self, call: Call) -> tuple[str, Repo]:
        token = (call.headers.get("Authorization") or "").removeprefix("Bearer ")
        path, _, signature = token.rpartition("/")
        if not self._uploads.is_signed(path, signature):
            raise Refusal(401, "Not a token of this storage")
        right, folder, owner, name, expires = path.split("/")
        if time.time() >= int(expires):
            raise Refusal(401, "The token has expired")
        return right, self._store.get(folder.removesuffix("s"), f"{owner}/{name}")

    def _reconstruction(self, call: Call, repo: Repo, oid: str, version: str) -> Answer:
        """From which chunks a file, or a range of it, is put together."""
        entry = self._store.lfs_entry(repo, oid)
        start, length = select_range(call.range, entry.size) or (0, entry.size)
        terms, fetches = [], {}
        for number, (offset, nbytes) in enumerate(xorbs_of(self._store.content(entry))):
            first, end = max(start - offset, 0) // CHUNK, -(-min(start + length - offset, nbytes) // CHUNK)
            if first >= end:
                continue
            part = {"start": first, "end": end}
            unpacked = min(end * CHUNK, nbytes) - first * CHUNK
            key = hashlib.sha256(f"{oid}/{number}".encode()).hexdigest()
            packed = {"start": packed_bytes(first * CHUNK), "end": packed_bytes(min(end * CHUNK, nbytes)) - 1}
            url = self._uploads.signed("xorb", repo, oid, entry.size, number)
            terms.append({"hash": key, "unpacked_length": unpacked, "range": part})
            fetches[key] = (
                {"range": part, "url": url, "url_range": packed}
                if version == "v1"
                else {"url": url, "ranges": [{"chunks": part, "bytes": packed}]}
            )
        told = {key: [fetch] for key, fetch in fetches.items()}
        kind = "fetch_info" if version == "v1" else "xorbs"
        return Answer({"offset_into_first_range": start % CHUNK, "terms": terms, kind: told})

    def _put_xorb(self, call: Call, key: str) -> Answer:
        new = not self._store.xorb(key).exists()
        if new:
            xorb = b"".join(call.body)
            chunks(xorb)
            self._store.put_xorb(key, xorb)
        return Answer({"was_inserted": new})

    def _put_shard(self, call: Call, repo: Repo) -> Answer:
        for file in shard_files(b"".join(call.body)):
            self._store.put_object(repo, self._content(file.terms), file.sha256)
        return Answer({"result": 1})

    def _content(self, terms: list[Term]) -> Iterator[bytes]:
        for term in terms:
            path = self._store.xorb(term.xorb)
            if not path.exists():
                raise Refusal(400, f"Xorb {term.xorb} was not uploaded")
            yield from chunks(path.read_bytes())[term.first : term.end]
