"""A small, correct Hugging Face Hub on loopback, for tests and for `hf-locstitch demo`.

The real `huggingface_hub` client speaks to it through `HF_ENDPOINT` or `endpoint=`:

    with LoopbackHub(folder) as hub:
        sha = hub.add_repo("demo/base", {"config.json": "{}", "model.safetensors": path})
        HfApi(endpoint=hub.endpoint, token="hf_loopback").model_info("demo/base")

Models and datasets, commits, references, pull requests, LFS (basic and multipart), ranges, private and gated
repositories, and on request Xet: without `xet` clients need HF_HUB_DISABLE_XET=1, which `environment` then sets.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType

from loopback_hub.api import Api
from loopback_hub.faults import Fault, FaultKind, Faults, Link, RateLimit, RateLimiter, Request
from loopback_hub.git import Change, Commit, Entry, Refusal, Repo, check_path, wants_lfs
from loopback_hub.rights import Rights
from loopback_hub.server import Server
from loopback_hub.store import Store
from loopback_hub.upload import check_readme
from loopback_hub.wire import CHUNK

__all__ = ["Commit", "Entry", "Fault", "FaultKind", "Link", "LoopbackHub", "RateLimit", "Refusal", "Request"]

DEFAULT_USERS: Mapping[str, str] = MappingProxyType({"hf_loopback": "demo"})
NO_ORGS: Mapping[str, Sequence[str]] = MappingProxyType({})


class LoopbackHub:
    """A Hub in a folder, served on 127.0.0.1 between `start` and `stop` (or as a context manager).

    users: token -> user name. orgs: user name -> organisations the user may write to.
    port: 0 takes a free one.
    Everything is kept in the folder: a new LoopbackHub on it goes on where the last one ended.
    The methods below act on the folder itself, without token and without HTTP, started or not;
    what the Hub would refuse raises `Refusal`.

    Settings that may be changed at any time:
    page_size: entries in a page of a tree or commit list.
    multipart_chunk: bytes of a part; larger LFS files are then uploaded in parts. None: never in parts.
    read_tokens: those that may only read.
    rate_limit: how many requests are answered in a window of time. None: all.
    link: how fast every connection is, how long an answer takes to begin, how many are served at a time.
    redirect_lfs: LFS files are answered with a 302 to another origin (localhost), as the real Hub does.
    xet: LFS files can also be had, and are uploaded, through Xet.
    """

    def __init__(
        self,
        root: Path,
        *,
        users: Mapping[str, str] = DEFAULT_USERS,
        orgs: Mapping[str, Sequence[str]] = NO_ORGS,
        port: int = 0,
    ) -> None:
        self._port = port
        self._server: Server | None = None
        self._store = Store(root)
        self._rights = Rights(self._store, users, orgs)
        self._api = Api(self._store, self._rights, lambda: self.endpoint)
        self._faults = Faults()
        self._limiter = RateLimiter()
        self._link = Link()
        self._log: list[Request] = []

    def start(self) -> LoopbackHub:
        """Listen; returns itself. A hub that was stopped listens on its old port again."""
        if self._server is None:
            faults, limiter = self._faults, self._limiter
            self._server = Server(self._port, self._api.respond, self._rights.identify, faults, limiter, self._log)
            self._server.link = self._link
            self._port = self._server.server_address[1]
            threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def stop(self) -> None:
        """End every connection and stop listening."""
        if self._server is not None:
            self._server.close()
            self._server.settle(1.0)
            self._server = None

    def __enter__(self) -> LoopbackHub:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        """Base URL. Raises RuntimeError before the first start."""
        if not self._port:
            raise RuntimeError("the loopback Hub has no endpoint before it is started")
        return f"http://127.0.0.1:{self._port}"

    @property
    def requests(self) -> list[Request]:
        """The log: one entry for every request that ended, also one that was cut, in the order in which they
        began. The list is live: clear it at will. Reading it waits a moment for requests that are about to end."""
        if self._server is not None:
            self._server.settle(1.0)
        return self._log

    @property
    def page_size(self) -> int:
        """Entries in a page of a tree or commit list."""
        return self._api.page_size

    @page_size.setter
    def page_size(self, entries: int) -> None:
        self._api.page_size = entries

    @property
    def multipart_chunk(self) -> int | None:
        """Bytes of a part of a multipart upload; None: LFS files arrive in one piece."""
        return self._api.uploads.multipart_chunk

    @multipart_chunk.setter
    def multipart_chunk(self, size: int | None) -> None:
        self._api.uploads.multipart_chunk = size

    @property
    def read_tokens(self) -> Collection[str]:
        """Tokens that may only read."""
        return self._rights.read_tokens

    @read_tokens.setter
    def read_tokens(self, tokens: Collection[str]) -> None:
        self._rights.read_tokens = tokens

    @property
    def rate_limit(self) -> RateLimit | None:
        """How many requests are answered in a window of time; None: all."""
        return self._limiter.limit

    @rate_limit.setter
    def rate_limit(self, limit: RateLimit | None) -> None:
        self._limiter.limit = limit

    @property
    def link(self) -> Link:
        """What the network does to every connection, from the next request on."""
        return self._link

    @link.setter
    def link(self, link: Link) -> None:
        self._link = link
        if self._server is not None:
            self._server.link = link

    @property
    def redirect_lfs(self) -> bool:
        """Whether LFS files are answered with a redirect to another origin."""
        return self._api.redirect_lfs

    @redirect_lfs.setter
    def redirect_lfs(self, redirect: bool) -> None:
        self._api.redirect_lfs = redirect

    @property
    def xet(self) -> bool:
        """Whether LFS files can be had, and are uploaded, through Xet."""
        return self._api.xet.enabled

    @xet.setter
    def xet(self, enabled: bool) -> None:
        self._api.xet.enabled = enabled

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str | Path],
        *,
        repo_type: str = "model",
        private: bool = False,
        gated: bool | str = False,
        message: str = "Add files",
    ) -> str:
        """Add one commit with these files to main, and return its sha.

        files: path in the repository -> content, or a Path to a local file.
        A repository that is missing is made first, with the settings given and the Hub's own first commit;
        the settings of one that exists are left alone.
        """
        repo = self._ensure(repo_id, repo_type, private, gated)
        patterns = self._store.patterns(repo, "main")
        changes = [
            Change(check_path(path), self._keep(repo, path, content, patterns)) for path, content in files.items()
        ]
        commit, _ = self._store.commit(repo_type, repo_id, "main", changes, title=message, author=repo.owner)
        return commit.sha

    def head(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> str:
        """Full sha of the commit a revision stands for."""
        return self._store.resolve(self._store.get(repo_type, repo_id), revision)

    def commits(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[Commit]:
        """Commits of a revision, newest first."""
        return list(self._store.history(self._store.get(repo_type, repo_id), revision))

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, int]:
        """Path -> size in bytes."""
        commit = self._store.commit_at(self._store.get(repo_type, repo_id), revision)
        return {path: entry.size for path, entry in commit.files.items()}

    def read(self, repo_id: str, path: str, revision: str = "main", repo_type: str = "model") -> bytes:
        """Content of a file."""
        _, entry = self._store.entry(self._store.get(repo_type, repo_id), revision, path)
        return self._store.content(entry).read_bytes()

    def fail(self, fault: Fault) -> None:
        """Let a fault wait for the requests it matches; it is gone after its last use."""
        self._faults.add(fault)

    @property
    def faults(self) -> list[Fault]:
        """What is left of the faults that are not used up."""
        return self._faults.pending()

    def environment(self, home: Path, token: str | None = "hf_loopback") -> dict[str, str]:
        """Variables that point a subprocess at this Hub, with its own caches under `home`.

        Lay them over an environment without HF_TOKEN and HF_HUB_CACHE: without a token there is no HF_TOKEN.
        """
        variables = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "0" if self.xet else "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        return variables if token is None else {**variables, "HF_TOKEN": token}

    def _ensure(self, repo_id: str, repo_type: str, private: bool, gated: bool | str) -> Repo:
        try:
            return self._store.get(repo_type, repo_id)
        except Refusal:
            return self._store.create(repo_type, repo_id, repo_id.split("/")[0], private, gated)

    def _keep(self, repo: Repo, path: str, content: bytes | str | Path, patterns: list[str]) -> Entry:
        if isinstance(content, Path):
            with content.open("rb") as stream:
                if wants_lfs(path, content.stat().st_size, stream.read(512), patterns):
                    stream.seek(0)
                    chunks = iter(lambda: stream.read(CHUNK), b"")
                    return self._store.lfs_entry(repo, self._store.put_object(repo, chunks))
            content = content.read_bytes()
        data = content.encode() if isinstance(content, str) else content
        if wants_lfs(path, len(data), data[:512], patterns):
            return self._store.lfs_entry(repo, self._store.put_object(repo, _once(data)))
        check_readme(path, data, repo.type)
        return self._store.put_blob(data)


def _once(data: bytes) -> Iterator[bytes]:
    yield data
