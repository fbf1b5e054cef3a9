"""HTTP/1.1 under the loopback Hub: connections, the log of requests, faults where they belong."""

from __future__ import annotations

import bisect
import itertools
import logging
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from loopback_hub.faults import Fault, FaultKind, Faults, Link, RateLimiter, Request
from loopback_hub.git import Refusal
from loopback_hub.wire import Answer, Body, Call, Dropped, refusal

try:
    import fcntl
    import termios
except ImportError:  # on Windows
    fcntl = termios = None

TELLS_UNSENT = fcntl is not None and termios is not None

logger = logging.getLogger(__name__)
PACKET = 1 << 15  # bytes that a slow link passes on together
NUMBERS = itertools.count()  # of requests, also of a Hub that was started again


class Server(ThreadingHTTPServer):
    """A threaded server that knows its connections, so that stopping ends them all."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self,
        port: int,
        respond: Callable[[Call], Answer],
        identify: Callable[[str, str | None], str | None],
        faults: Faults,
        limiter: RateLimiter,
        log: list[Request],
    ) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.respond, self.identify, self.faults, self.limiter, self.log = respond, identify, faults, limiter, log
        self.link = Link()
        self.stopping = threading.Event()
        self.idle = threading.Condition()
        self.active = 0
        self.connections: set[socket.socket] = set()

    def close(self) -> None:
        """Stop listening and end every open connection."""
        self.stopping.set()
        self.shutdown()
        self.server_close()
        with self.idle:
            connections = list(self.connections)
        for connection in connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def settle(self, seconds: float) -> None:
        """Wait until every request that has begun is in the log, but not for ever."""
        with self.idle:
            self.idle.wait_for(lambda: self.active == 0, seconds)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no event; anything else is a defect and is shown."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            logger.exception("the loopback Hub failed")


class Handler(BaseHTTPRequestHandler):
    """One connection: reads requests, lets faults happen, writes answers and the log."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    server_version = "LoopbackHub"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        """Announce the connection to the server."""
        super().setup()
        with self.server.idle:
            self.server.connections.add(self.connection)

    def finish(self) -> None:
        """Take the connection off the server's list."""
        with self.server.idle:
            self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr: the log of requests tells more."""

    def do_GET(self) -> None:
        """Answer a request of any method, and log it however it ends."""
        self._status, self._sent = 0, 0
        self._fault: FaultKind | None = None
        self._user: str | None = None
        self._link = self.server.link
        self._body = Body(self.rfile, self.headers, self._link)
        with self.server.idle:
            self.server.active += 1
            self._full = 0 < self._link.connections < self.server.active
            self._number = next(NUMBERS)
        try:
            self._exchange()
        except Dropped:
            self._reset()
        except ConnectionError:
            self.close_connection = True
        finally:
            self._record()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _record(self) -> None:
        authorization = self.headers.get("Authorization")
        entry = Request(
            self.command,
            self.path,
            self._user,
            authorization is not None,
            self.headers.get("Range"),
            self._status,
            self._sent,
            self._body.received,
            self._fault,
            self._number,
        )
        with self.server.idle:
            bisect.insort(self.server.log, entry, key=lambda one: one.number)
            self.server.active -= 1
            self.server.idle.notify_all()

    def _exchange(self) -> None:
        early = self._take(self._harms_request)
        if early and early.kind == "reset":
            if early.after_bytes is None:
                raise Dropped("fault")
            self._body = Body(self.rfile, self.headers, self._link, early.after_bytes)
        answered, limits = self.server.limiter.count(self.path)
        time.sleep(self._link.latency)
        if self._full:
            answer = Answer({"error": "Too many connections"}, 503)
        else:
            answer = self._answer(early) if answered else Answer({"error": "Too Many Requests"}, 429)
        answer = replace(answer, headers={**answer.headers, **limits})
        self._body.drain()
        if self._take(lambda fault: fault.kind == "lost_answer"):
            raise Dropped("fault")
        self._send(answer)

    def _answer(self, early: Fault | None) -> Answer:
        if early and early.kind == "status":
            headers = {} if early.retry_after is None else {"Retry-After": str(early.retry_after)}
            return Answer({"error": "fault"}, early.status, headers)
        try:
            self._user = self.server.identify(self.path, self.headers.get("Authorization"))
            ignore_range = early is not None and early.kind == "ignore_range"
            call = Call(self.command, self.path, self.headers, self._body, self._user, ignore_range)
            return self.server.respond(call)
        except Refusal as error:
            return refusal(error)
        except ConnectionError:
            raise
        except Exception:
            logger.exception("the loopback Hub failed on %s %s", self.command, self.path)
            return Answer({"error": "Internal Server Error"}, 500)

    def _harms_request(self, fault: Fault) -> bool:
        if fault.kind == "ignore_range":
            return "Range" in self.headers and self.command == "GET"
        if fault.kind == "reset":
            announced = int(self.headers.get("Content-Length") or sys.maxsize)
            return fault.after_bytes is None or (self.command in ("PUT", "POST") and fault.after_bytes < announced)
        return fault.kind == "status"

    def _take(self, harms: Callable[[Fault], bool]) -> Fault | None:
        fault = self.server.faults.take(self.command, self.path, harms)
        self._fault = fault.kind if fault else self._fault
        return fault

    def _send(self, answer: Answer) -> None:
        payload = answer.payload()
        self.send_response(answer.status, _reason(answer.status))
        self._status = answer.status
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        if self.command == "HEAD":
            return
        length = len(payload)
        fault = self._take(lambda fault: answer.status < 300 and _harms_body(fault, self.command, length))
        for chunk in (payload,) if isinstance(payload, bytes) else payload:
            if fault is None:
                self._put(chunk)
            else:
                self._put_harmed(chunk, fault)

    def _put_harmed(self, chunk: bytes, fault: Fault) -> None:
        if fault.kind == "flip":
            self._put(_flipped(chunk, fault.offset - self._sent))
            return
        at = (fault.after_bytes or 0) - self._sent
        if not 0 <= at < len(chunk):
            self._put(chunk)
            return
        self._put(chunk[:at])
        if fault.kind == "reset":
            raise Dropped("fault")
        if fault.kind == "cut":
            raise ConnectionError("fault")
        self.server.stopping.wait(fault.seconds)
        self._put(chunk[at:])

    def _put(self, data: bytes) -> None:
        for start in range(0, len(data), PACKET):
            self.wfile.write(data[start : start + PACKET])
            self._link.pass_on(min(PACKET, len(data) - start))
        self._sent += len(data)

    def _reset(self) -> None:
        """End the connection with RST, once the peer has all that was written before."""
        self.close_connection = True
        deadline = time.monotonic() + 5
        while _unsent(self.connection) and time.monotonic() < deadline:
            time.sleep(0.001)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()


def _harms_body(fault: Fault, method: str, length: int) -> bool:
    if fault.kind == "flip":
        return fault.offset < length
    if fault.kind == "reset":
        return fault.after_bytes is not None and method == "GET" and fault.after_bytes < length
    return fault.kind in ("cut", "stall") and (fault.after_bytes or 0) < length


def _flipped(chunk: bytes, at: int) -> bytes:
    return chunk[:at] + bytes([chunk[at] ^ 0xFF]) + chunk[at + 1 :] if 0 <= at < len(chunk) else chunk


def _reason(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Fault"


def _unsent(connection: socket.socket) -> int:
    """Bytes the kernel still holds for the peer; 0 where it cannot tell."""
    if fcntl is None or termios is None:
        return 0
    try:
        return struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, b"\0\0\0\0"))[0]
    except OSError:
        return 0
