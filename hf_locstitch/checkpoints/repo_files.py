"""The bytes of a repo's files at one commit, as the Hub gives them: over HTTP, or through hf_xet. None is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

from hf_locstitch.checkpoints.hub_client import RATE_LIMIT, Attempts, raise_clearly
from hf_locstitch.checkpoints.read_ahead import SLOTS, ReadAhead
from hf_locstitch.checkpoints.source import FileInfo
from hf_locstitch.checkpoints.xet import XetFiles
from hf_locstitch.errors import CheckpointError, DownloadError

PARTIAL = 206
EXPIRED = frozenset({400, 401, 403, 404, 410})  # statuses of storage whose link is no longer good
REFUSAL = "X-Error-Code"  # a header of the Hub's own answers, also where another server asks it


class RepoFiles:
    """files: of the repo. label: names the repo in errors, which are DownloadError and CheckpointError."""

    def __init__(self, repo: str, commit: str, files: Mapping[str, FileInfo], endpoint: str, label: str) -> None:
        self._repo, self._commit, self._files, self._endpoint, self._label = repo, commit, files, endpoint, label
        self._starts: dict[str, bytes] = {}  # read for the headers; not asked for again
        self._elsewhere: dict[str, str] = {}  # file -> the storage that the Hub sent on to
        self._xet = XetFiles(repo, commit, endpoint)
        self._whole: set[str] = set()  # files of which a range was asked for in vain

    def start(self, file: str, length: int) -> bytes:
        """The first `length` bytes of a file, or all that it has; none is asked for twice."""

        wanted, attempts = min(length, self._files[file].size), Attempts()
        while (known := len(self._starts.get(file, b""))) < wanted:
            RATE_LIMIT.wait()
            try:
                with self._get(file, known, length) as response:
                    for block in self._blocks(file, response, known, length):
                        self._starts[file] = self._starts.get(file, b"") + block
                if len(self._starts.get(file, b"")) < wanted:
                    raise ConnectionError(f"{len(self._starts.get(file, b''))} of {wanted} bytes were received")
            except Exception as error:
                if not attempts.wait_after(error, progress=len(self._starts.get(file, b"")) > known):
                    raise_clearly(error, self._repo, self._commit, self._endpoint)
        return self._starts.get(file, b"")[:length]

    def range_once(self, file: str, start: int, stop: int) -> bytes:
        """In one request that is not repeated: what only needs some bytes can do without them."""
        try:
            with self._get(file, start, stop) as response:
                hf_raise_for_status(response)
                content = b"".join(response.iter_bytes()) if response.status_code == PARTIAL else b""
            if len(content) != stop - start:
                raise ConnectionError(f"{len(content)} of {stop - start} bytes were received")
        except Exception as error:
            raise_clearly(error, self._repo, self._commit, self._endpoint)
        return content

    def stream(self, file: str, start: int = 0, ahead: ReadAhead | None = None) -> Iterator[bytes]:
        """A file's bytes from `start` on, in order. Not checked yet. ahead: through what they come, with others."""
        if self._files[file].sha256 is None:  # small
            yield self.start(file, self._files[file].size)[start:]
            return
        known = self._starts.get(file, b"")[start:]
        if known:
            yield known
        with nullcontext(ahead) if ahead else self.read_ahead([file]) as ahead:
            yield from ahead.read(file, start + len(known))

    def read_ahead(self, files: Iterable[str], begin: Callable[[str], int] | None = None) -> ReadAhead:
        """Several files at once, to be read one after another. begin: where the reading of each begins, as it seems."""

        def missing(file: str) -> int:
            return max(begin(file) if begin else 0, len(self._starts.get(file, b"")))

        sizes = {file: self._files[file].size for file in files}
        return ReadAhead(self._range, sizes, missing, lambda file: file in self._whole)

    def distrust(self, file: str) -> bool:
        """Forget what was read of a damaged file. Returns whether there is another way for it to come."""
        self._starts.pop(file, None)
        return self._xet.distrust(file)

    def _range(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes start … stop of a file, through as many connections as it takes, one after another."""
        at, attempts = start, Attempts()
        while at < stop:
            before, all_before = at, SLOTS.received
            try:
                for block in self._part(file, at, stop):
                    at += len(block)
                    SLOTS.received += len(block)
                    yield block
                if at < stop:
                    raise ConnectionError(f"the connection ended at byte {at} of {stop}")
            except Exception as error:
                if at == before:
                    SLOTS.turned_away()
                # While other connections get something, of this repo or another, this one's turn will come.
                if not attempts.wait_after(error, progress=SLOTS.received > all_before):
                    self._give_up(error)

    def _part(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes start … stop of a file, through hf_xet as far as it brings them, else over HTTP. May end early."""
        for block in self._xet.range(file, self._files[file].size, start, stop):
            start += len(block)
            yield block
        if start < stop:
            RATE_LIMIT.wait()
            with self._get(file, start, stop) as response:
                yield from self._blocks(file, response, start, stop)

    def _give_up(self, error: Exception) -> NoReturn:
        """In the middle of a file: access that worked when the headers were read has now failed."""
        try:
            raise_clearly(error, self._repo, self._commit, self._endpoint)
        except CheckpointError as refusal:
            raise DownloadError(
                f"{self._label} was accessible with this token but no longer is: {refusal} Then run the same "
                "command again; it resumes where it stopped."
            ) from error

    def _get(self, file: str, start: int, stop: int) -> AbstractContextManager[Any]:
        """A streamed response, not retried here: a retry must know how many bytes have arrived."""
        elsewhere = self._elsewhere.get(file)
        part = {"Range": f"bytes={start}-{stop - 1}"} if start or stop < self._files[file].size else {}
        return http_stream_backoff(
            "GET",
            elsewhere or hf_hub_url(self._repo, file, revision=self._commit, endpoint=self._endpoint),
            # The token is for the Hub, not for the storage that it sends on to.
            headers={**build_hf_headers(token=False if elsewhere else None), "Accept-Encoding": "identity", **part},
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            max_retries=0,
            retry_on_exceptions=(),
            retry_on_status_codes=(),
        )

    def _blocks(self, file: str, response: Any, start: int, stop: int) -> Iterator[bytes]:
        """Of a response to a request for bytes start … stop, as they arrive: buffered ones would be lost with the
        connection. A server that ignores ranges sends the file from its beginning; what is not wanted is skipped."""
        at_the_hub = str(response.url).startswith(f"{self._endpoint}/")
        if not at_the_hub and response.status_code in EXPIRED and REFUSAL not in response.headers:
            self._elsewhere.pop(file, None)  # unless another connection has dropped it
            raise ConnectionError(f"the link to {file} has expired (status {response.status_code})")
        hf_raise_for_status(response)
        if file not in self._elsewhere:
            self._xet.note(file, [answer.headers for answer in (*response.history, response)])
        if response.history and not at_the_hub:
            self._elsewhere[file] = str(response.url)  # to ask there from now on: the Hub counts its requests
        ranged = response.status_code == PARTIAL
        if not ranged and stop < self._files[file].size:
            self._whole.add(file)
        at = start if ranged else 0
        for block in response.iter_bytes():
            fresh = block[max(0, start - at) : stop - at]
            at += len(block)
            if fresh:
                yield fresh
            if at >= stop and (not ranged or at > stop):  # else the response is read to its end, for the next request
                return
