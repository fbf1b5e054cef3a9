"""Faults that the loopback Hub lets happen on demand, and the log of what it was asked."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

FaultKind = Literal["status", "reset", "cut", "stall", "flip", "ignore_range", "lost_answer"]


@dataclass(frozen=True)
class Fault:
    """A failure for the requests that match.

    kind:
    - "status": answers `status` (with Retry-After if `retry_after` is set); nothing is carried out.
    - "reset": TCP RST. Without `after_bytes` before anything is done or answered; else after that many bytes
      of the answer's body, or (PUT, POST) of the request's body, which is then not carried out.
    - "cut": the answer promises its whole length and ends (FIN) after `after_bytes` of its body.
    - "stall": `after_bytes` of the body, then silence for `seconds`, then the rest.
    - "flip": all bits of the byte at `offset` of the answer's body are inverted.
    - "ignore_range": 200 with the whole file for a request with Range.
    - "lost_answer": the request is carried out, then the connection is reset without an answer.

    method: any if None. path: regular expression searched in the request target, with its query, as sent.
    skip: matches that pass unharmed first. times: uses before the fault is spent.
    Faults wait in order, and a request meets at most one before, one after and one while it is answered.
    A request that the fault cannot harm (HEAD or a body too short for "cut", no Range for "ignore_range")
    is no match.
    """

    kind: FaultKind
    path: str = ""
    method: str | None = None
    skip: int = 0
    times: int = 1
    status: int = 503
    retry_after: int | None = None
    after_bytes: int | None = None
    seconds: float = 30.0
    offset: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(FaultKind):
            raise ValueError(f"unknown kind of fault {self.kind!r}, known: {', '.join(get_args(FaultKind))}")
        if self.times < 1 or min(self.skip, self.offset, self.after_bytes or 0, self.seconds) < 0:
            raise ValueError(f"a count of this fault is out of range: {self}")
        re.compile(self.path)


@dataclass(frozen=True)
class Request:
    """What the log keeps of a request. status: 0 if the connection ended before a status was sent. number: in the order
    in which requests began.
    """

    method: str
    path: str
    user: str | None
    authorization: bool
    range: str | None
    status: int
    sent: int
    received: int
    fault: FaultKind | None = None
    number: int = 0


@dataclass(frozen=True)
class RateLimit:
    """requests: how many calls of a kind ("api", or "resolvers" for files) are answered in each window of so many
    seconds; others get a 429. headers: what the answers tell of it, as the Hub's `RateLimit` or as `Retry-After`, or
    nothing.
    """

    requests: int
    seconds: float
    headers: Literal["RateLimit", "Retry-After", ""] = "RateLimit"


@dataclass(frozen=True)
class Link:
    """What a real network does to every connection. speed: bytes of an answer or a request per second; latency:
    seconds before an answer begins; connections: answered at a time, others get a 503. 0: no limit.
    """

    speed: float = 0.0
    latency: float = 0.0
    connections: int = 0

    def pass_on(self, nbytes: int) -> None:
        """Take as long as so many bytes do."""
        if self.speed:
            time.sleep(nbytes / self.speed)


class RateLimiter:
    """Counts requests against the limit of the moment, in fixed windows."""

    def __init__(self) -> None:
        self.limit: RateLimit | None = None
        self._lock = threading.Lock()
        self._windows: dict[str, tuple[float, int]] = {}  # kind -> when its window began, requests in it

    def count(self, path: str) -> tuple[bool, dict[str, str]]:
        """Whether a request is answered, and headers of its answer."""
        if (limit := self.limit) is None:
            return True, {}
        kind, now = "resolvers" if "/resolve/" in path else "api", time.monotonic()
        with self._lock:
            began, count = self._windows.get(kind, (now, 0))
            if now >= began + limit.seconds:
                began, count = now, 0
            self._windows[kind] = began, count + 1
        resets, left = math.ceil(round(began + limit.seconds - now, 3)), max(0, limit.requests - count - 1)
        told = {"RateLimit": f'"{kind}";r={left};t={resets}'} if limit.headers == "RateLimit" else {}
        if count < limit.requests:
            return True, told
        return False, told | ({"Retry-After": str(resets)} if limit.headers == "Retry-After" else {})


class Faults:
    """Faults that wait for their requests."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[Fault] = []

    def add(self, fault: Fault) -> None:
        """Let a fault wait for its requests."""
        with self._lock:
            self._waiting.append(fault)

    def pending(self) -> list[Fault]:
        """What is left of the faults: `skip` and `times` count down."""
        with self._lock:
            return list(self._waiting)

    def take(self, method: str, path: str, harms: Callable[[Fault], bool]) -> Fault | None:
        """The first waiting fault for this request among those that `harms` it; one use is spent."""
        with self._lock:
            for place, fault in enumerate(self._waiting):
                matches = fault.method in (None, method) and re.search(fault.path, path)
                if not matches or not harms(fault):
                    continue
                if fault.skip:
                    self._waiting[place] = replace(fault, skip=fault.skip - 1)
                    continue
                left = [replace(fault, times=fault.times - 1)] if fault.times > 1 else []
                self._waiting[place : place + 1] = left
                return fault
        return None
