"""One way to call the Hub: transient failures are retried, lasting ones become a clear error."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# The transport's own base error; the client has changed its HTTP library before.
from huggingface_hub.errors import HTTPError as TransportError  # pyright: ignore[reportPrivateImportUsage]

from hf_locstitch.errors import CheckpointError, DownloadError

ATTEMPTS = 6
LONGEST_WAIT = 30.0  # seconds; a server's Retry-After is honoured up to four times this
TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})

T = TypeVar("T")


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error, if a server answered at all."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later."""
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, HfHubHTTPError):
        return status_of(error) in TRANSIENT_STATUS
    return isinstance(error, (TransportError, ConnectionError, TimeoutError))


def wait_before(attempt: int, error: BaseException) -> float:
    """Seconds to wait after failure number `attempt` (from 0)."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    asked = str(headers.get("Retry-After", ""))
    if asked.isdigit():
        return min(float(asked), 4 * LONGEST_WAIT)
    return min(0.5 * 2**attempt, LONGEST_WAIT)


def retrying(call: Callable[[], T]) -> T:
    """The call's result; a transient failure is retried, ATTEMPTS calls in all, then raised as it is."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
            time.sleep(wait_before(attempt, error))
    return call()


def raise_clearly(error: Exception, repo: str, revision: str | None, endpoint: str) -> NoReturn:
    """Turn the client's error into one paragraph with a next step."""
    at = f"{repo}@{revision}" if revision else repo
    if isinstance(error, GatedRepoError):
        raise CheckpointError(
            f"{at} is gated: ask for access at {endpoint}/{repo}, then log in with `hf auth login` or set HF_TOKEN."
        ) from error
    if isinstance(error, RevisionNotFoundError):
        raise CheckpointError(
            f"{repo} has no revision {revision!r}. Name a branch, a tag or a full commit "
            f"({endpoint}/{repo}/commits/main lists them)."
        ) from error
    if isinstance(error, RepositoryNotFoundError) or status_of(error) in (401, 403):
        raise CheckpointError(
            f"{at} does not exist on {endpoint}, or is private and not accessible with this token. Check the "
            "name; for a private repo log in with `hf auth login` or set HF_TOKEN."
        ) from error
    if isinstance(error, OfflineModeIsEnabled):
        raise CheckpointError(
            f"{at} is not in the cache and HF_HUB_OFFLINE is set. Unset it, or fetch it first."
        ) from error
    raise DownloadError(
        f"{at}: the request to {endpoint} failed ({type(error).__name__}: {error}). "
        "Run the same command again when the connection is back."
    ) from error
