"""Ranges of files that the Hub keeps in Xet, through hf_xet: what it does not bring has to come over HTTP."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.utils import build_hf_headers

from hf_locstitch.checkpoints.hub_client import retrying
from hf_locstitch.runtime.files import is_writable

LOG = logging.getLogger("hf_locstitch")
MB = 1_000_000
HASH = "X-Xet-Hash"  # https://huggingface.co/docs/xet/file-id
# Of what hf_xet would do by itself it needs less here: a few ranges of some MB at a time, and HTTP to fall back on.
CAREFUL = {
    "client.retry_max_attempts": 1,
    "client.retry_base_delay": timedelta(seconds=0.5),
    "telemetry.enabled": not constants.HF_HUB_DISABLE_TELEMETRY,
}
# Unless HF_XET_HIGH_PERFORMANCE is set: its buffers may take gigabytes, and it begins with few connections.
MODEST = {
    "client.ac_initial_download_concurrency": 16,
    "reconstruction.min_reconstruction_fetch_size": 8 * MB,
    "reconstruction.max_reconstruction_fetch_size": 64 * MB,
    "reconstruction.min_prefetch_buffer": 16 * MB,
    "reconstruction.download_buffer_size": 64 * MB,
    "reconstruction.download_buffer_perfile_size": 8 * MB,
    "reconstruction.download_buffer_limit": 128 * MB,
}


class Failures:
    """Whether hf_xet has failed in this process: it is then not tried again, since its storage is that of all repos."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failed = False

    def __bool__(self) -> bool:
        return self._failed

    def note(self, what: str) -> None:
        """Say so the first time."""
        with self._lock:
            first, self._failed = not self._failed, True
        if first:
            LOG.warning(f"{what}: going on over HTTP, without hf_xet.")


FAILURES = Failures()


class XetFiles:
    """A repo's files at a commit, as far as they are in Xet."""

    def __init__(self, repo: str, commit: str, endpoint: str) -> None:
        self._repo, self._commit, self._endpoint = repo, commit, endpoint
        self._usable = is_usable()
        provide_folder()
        self._lock = threading.Lock()
        self._hashes: dict[str, str | None] = {}  # of files, as far as they were told of; None: not in Xet
        self._group: Any = None  # hf_xet's connection to the storage
        self._brought: set[str] = set()  # files of which it brought something

    def range(self, file: str, size: int, start: int, stop: int) -> Iterator[bytes]:
        """Bytes start … stop of a file, which may end early, at once where hf_xet is of no use. size: of the file."""
        if not self._usable:
            return
        try:
            yield from self._range(file, size, start, stop)
        except Exception as error:
            FAILURES.note(f"hf_xet did not bring {file} of {self._repo} ({type(error).__name__}: {error})")

    def note(self, file: str, headers: Iterable[Mapping[str, str]]) -> None:
        """What the Hub's answers to a request for a file tell of it. headers: of each answer."""
        self._hashes[file] = next((one[HASH] for one in headers if HASH in one), None)

    def distrust(self, file: str) -> bool:
        """A file came damaged: whether through hf_xet, at least in part. If so that is not used again."""
        if file not in self._brought:
            return False
        FAILURES.note(f"{file} of {self._repo} came damaged through hf_xet")
        return True

    def _range(self, file: str, size: int, start: int, stop: int) -> Iterator[bytes]:
        from hf_xet import XetFileInfo  # pyright: ignore[reportAttributeAccessIssue]

        with self._lock:
            key = None if FAILURES else self._hash_of(file)
            if key is None:
                return
            group = self._open_group()
        stream = group.download_stream(XetFileInfo(key, size), start, stop)
        try:
            for block in stream:
                start += len(block)
                if start > stop:
                    raise ValueError(f"{start - stop} bytes too many")
                self._brought.add(file)
                yield block
        finally:
            with suppress(Exception):  # of what has ended by itself
                stream.cancel()
        if start < stop:
            raise EOFError(f"{stop - start} bytes are missing")

    def _hash_of(self, file: str) -> str | None:
        """None if the file is not in Xet. Where nothing was told of it, all are asked for."""
        if file not in self._hashes:
            api = HfApi(endpoint=self._endpoint)
            listed = retrying(lambda: list(api.list_repo_tree(self._repo, revision=self._commit, recursive=True)))
            self._hashes = {file: None} | {entry.path: getattr(entry, "xet_hash", None) for entry in listed}
        return self._hashes[file]

    def _open_group(self) -> Any:
        if self._group is None:
            headers = build_hf_headers()
            self._group = _session().new_download_stream_group(
                token_refresh_url=f"{self._endpoint}/api/models/{self._repo}/xet-read-token/{self._commit}",
                token_refresh_headers=headers,
                # The token is for the Hub, not for the storage behind it.
                custom_headers={name: value for name, value in headers.items() if name.lower() != "authorization"},
            )
        return self._group


def is_usable() -> bool:
    """Whether hf_xet is there and wanted."""
    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


def provide_folder() -> None:
    """Without a folder to write to, hf_xet fails and logs to standard output: it then gets one that goes with this
    process. To be called before hf_xet is first used, also by the Hub's client."""
    if not is_writable(Path(constants.HF_XET_CACHE)):
        os.environ["HF_XET_CACHE"] = _passing_folder().name


@lru_cache(1)
def _passing_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="hf-locstitch-xet-", ignore_cleanup_errors=True)


@lru_cache(1)
def _session() -> Any:
    """A session of hf_xet's own for ranges: that of the Hub's client is set up for whole files."""
    from hf_xet import XetConfig, XetSession  # pyright: ignore[reportAttributeAccessIssue]

    return XetSession(XetConfig().with_config(settings()))


def settings() -> dict[str, Any]:
    """Of hf_xet, where they differ from its own; what the user sets (group.field as HF_XET_GROUP_FIELD) stays."""
    timeout = timedelta(seconds=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    wanted = CAREFUL | {"client.read_timeout": timeout, "client.connect_timeout": timeout}
    if not constants.HF_XET_HIGH_PERFORMANCE:
        wanted |= MODEST
    return {
        name: value for name, value in wanted.items() if f"HF_XET_{name.replace('.', '_').upper()}" not in os.environ
    }
