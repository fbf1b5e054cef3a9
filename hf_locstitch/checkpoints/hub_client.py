"""One way to call the Hub: transient failures are retried, rate limits waited out, lasting failures a clear error."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NoReturn, TypeVar

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# The transport's own base error; the client has changed its HTTP library before.
from huggingface_hub.errors import HTTPError as TransportError  # pyright: ignore[reportPrivateImportUsage]
from huggingface_hub.utils import parse_ratelimit_headers

from hf_locstitch.errors import CheckpointError, DownloadError

if TYPE_CHECKING:
    from huggingface_hub import GitRefInfo, HfApi

LOG = logging.getLogger("hf_locstitch")
ATTEMPTS = 6
LONGEST_WAIT = 30.0  # seconds; a server's Retry-After is honoured up to four times this
RATE_LIMITED = 429
LONGEST_LIMIT = 600.0  # seconds to wait for a rate limit to be lifted; the Hub's windows take 300
LONGEST_LIMITED = 3600.0  # seconds in which one call may be turned away for a rate limit, before it counts as failed
WORTH_SAYING = 5.0  # seconds of waiting
TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})

T = TypeVar("T")


def newest_pulls(api: HfApi, repo: str, count: int) -> list[GitRefInfo]:
    """Pull requests of a repo, the newest first, `count` at most."""
    pulls = api.list_repo_refs(repo, include_pull_requests=True).pull_requests or []
    return sorted(pulls, key=lambda pull: pull_number(pull.ref), reverse=True)[:count]


def pull_number(ref: str) -> int:
    """N of refs/pr/N."""
    return int(ref.rpartition("/")[2])


def on_the_wire(error: Exception) -> Exception:
    """What went wrong with the request: `hf_hub_download` says instead that the file is not in its cache."""
    cause = error.__cause__
    return cause if isinstance(error, LocalEntryNotFoundError) and isinstance(cause, Exception) else error


def _headers_of(error: Exception) -> Mapping[str, str]:
    return getattr(getattr(on_the_wire(error), "response", None), "headers", {})


def status_of(error: Exception) -> int | None:
    """The HTTP status behind an error, if a server answered at all."""
    return getattr(getattr(on_the_wire(error), "response", None), "status_code", None)


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed a moment later."""
    error = on_the_wire(error)
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, HfHubHTTPError):
        return status_of(error) in TRANSIENT_STATUS
    return isinstance(error, (TransportError, ConnectionError, TimeoutError))


def short(error: Exception) -> str:
    """One line, without request id and URL."""
    if isinstance(error, RepositoryNotFoundError):
        return "the repo does not exist or is not accessible with this token"
    if status_of(error) == 401:
        return "status 401: the token is invalid or has expired"
    if isinstance(error, HfHubHTTPError):
        return f"status {status_of(error)}: {str(error).splitlines()[0]}"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


class RateLimit:
    """A gate that all requests of this process pass; the Hub closes it when it answers that there were too many."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opens = 0.0  # time.monotonic()

    def wait(self) -> None:
        """Until the gate is open."""
        while (seconds := self._opens - time.monotonic()) > 0:
            time.sleep(seconds)

    def close(self, seconds: float) -> None:
        """From now on; a gate that is closed for longer stays so."""
        opens = time.monotonic() + seconds
        with self._lock:
            news = seconds >= WORTH_SAYING and opens > self._opens + WORTH_SAYING
            self._opens = max(self._opens, opens)
        if news:
            LOG.warning(f"the Hub limits the rate of requests: going on in {seconds:.0f} seconds.")


RATE_LIMIT = RateLimit()


class Attempts:
    """Of one call. Failures are counted; being turned away for a rate limit is none, but is not borne for ever."""

    def __init__(self) -> None:
        self._failures = self._turned_away = 0
        self._since = time.monotonic()  # of the last progress

    def wait_after(self, error: Exception, *, progress: bool = False, transient: bool | None = None) -> bool:
        """Wait until the call may be made again; False if it should not be.

        progress: the call got further than the one before. transient: whether it may succeed later, if the error does
        not tell.
        """
        if progress:
            self._failures, self._turned_away, self._since = -1, 0, time.monotonic()
        if status_of(error) == RATE_LIMITED:
            RATE_LIMIT.close(limited_for(self._turned_away, error))
            self._turned_away += 1
            return time.monotonic() - self._since < LONGEST_LIMITED
        self._failures += 1
        if self._failures >= ATTEMPTS or not (is_transient(error) if transient is None else transient):
            return False
        seconds = wait_before(max(self._failures - 1, 0), error)
        LOG.info(f"trying again in {seconds:.1f} s: {short(error)}")
        time.sleep(seconds)
        return True


def limited_for(attempt: int, error: Exception) -> float:
    """Seconds until a rate limit is lifted, by its headers. attempt: of this call, from 0, where they do not tell."""
    headers = _headers_of(error)
    limit = parse_ratelimit_headers(headers)
    told = limit.reset_in_seconds if limit is not None and limit.remaining == 0 else _retry_after(headers)
    if told is None:
        return wait_before(attempt, error)
    return min(max(told, 1), LONGEST_LIMIT)  # whole seconds: 0 stands for less than one


def wait_before(attempt: int, error: Exception) -> float:
    """Seconds to wait after failure number `attempt` (from 0)."""
    asked = _retry_after(_headers_of(error))
    return min(0.5 * 2**attempt, LONGEST_WAIT) if asked is None else min(float(asked), 4 * LONGEST_WAIT)


def _retry_after(headers: Mapping[str, str]) -> int | None:
    """Seconds, if the server says so."""
    asked = str(headers.get("Retry-After", ""))
    return int(asked) if asked.isdigit() else None


def retrying(call: Callable[[], T]) -> T:
    """The call's result; a transient failure is retried, ATTEMPTS calls in all, then raised as it is."""
    attempts = Attempts()
    while True:
        RATE_LIMIT.wait()
        try:
            return call()
        except Exception as error:
            if not attempts.wait_after(error):
                raise


def raise_clearly(error: Exception, repo: str, revision: str | None, endpoint: str) -> NoReturn:
    """Turn the client's error into one paragraph with a next step."""
    at = f"{repo}@{revision}" if revision else repo
    error = on_the_wire(error)
    if isinstance(error, GatedRepoError):
        raise CheckpointError(
            f"{at} is gated: ask for access at {endpoint}/{repo}, then log in with `hf auth login` or set HF_TOKEN."
        ) from error
    if isinstance(error, RevisionNotFoundError):
        raise CheckpointError(
            f"{repo} has no revision {revision!r}. Name a branch, a tag or a full commit "
            f"({endpoint}/{repo}/commits/main lists them)."
        ) from error
    if status_of(error) == 401 and not isinstance(error, RepositoryNotFoundError):
        raise CheckpointError(
            f"{endpoint} rejects the token that was sent with the request for {at} (status 401): it is invalid or has "
            "expired. To replace it log in with `hf auth login` or set HF_TOKEN; a public repo needs no token."
        ) from error
    if isinstance(error, RepositoryNotFoundError) or status_of(error) == 403:
        raise CheckpointError(
            f"{at} does not exist on {endpoint}, or is private and not accessible with this token. Check the "
            "name; for a private repo log in with `hf auth login` or set HF_TOKEN."
        ) from error
    if isinstance(error, OfflineModeIsEnabled):
        raise CheckpointError(
            f"{at} is not in the cache and HF_HUB_OFFLINE is set. Unset it, or fetch what is needed while online: "
            "hf download ORG/NAME."
        ) from error
    raise DownloadError(
        f"{at}: the request to {endpoint} failed ({type(error).__name__}: {error}). "
        "Run the same command again when the connection is back."
    ) from error
