"""HTTP messages of the loopback Hub: request bodies as they come, answers, ranges."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from io import BufferedIOBase
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from loopback_hub.faults import Link
from loopback_hub.git import Refusal

CHUNK = 1 << 18
_JSON_LIMIT = 64 << 20
_RANGE = re.compile(r"bytes=\s*(\d*)-(\d*)\s*")


class Dropped(ConnectionError):
    """The connection is to be reset now."""


class Body:
    """A request's body, by Content-Length or chunked, read as it comes."""

    def __init__(self, stream: BufferedIOBase, headers: Message, link: Link, reset_after: int | None = None) -> None:
        self._stream, self._link = stream, link
        self._left = int(headers.get("Content-Length") or 0)
        self._chunked = "chunked" in (headers.get("Transfer-Encoding") or "").lower()
        self._reset_after = reset_after
        self.received = 0

    def __iter__(self) -> Iterator[bytes]:
        while data := self._next():
            self.received += len(data)
            self._link.pass_on(len(data))
            if self._reset_after is not None and self.received >= self._reset_after:
                raise Dropped("fault")
            yield data

    def read(self) -> bytes:
        """The whole body. Raises Refusal 413 beyond what a JSON request needs."""
        data = bytearray()
        for chunk in self:
            data += chunk
            if len(data) > _JSON_LIMIT:
                raise Refusal(413, "Request body is too large")
        return bytes(data)

    def json(self) -> dict:
        """The body as a JSON object; {} if it is empty. Raises Refusal 400."""
        return json_object(self.read() or b"{}")

    def lines(self) -> Iterator[bytes]:
        """The body's lines that are not blank, one in memory at a time. Raises Refusal 413."""
        rest = bytearray()
        for chunk in self:
            rest += chunk
            *lines, tail = rest.split(b"\n") if b"\n" in chunk else (rest,)
            yield from (bytes(line) for line in lines if line.strip())
            rest = tail
            if len(rest) > _JSON_LIMIT:
                raise Refusal(413, "A line of the request is too large")
        if rest.strip():
            yield bytes(rest)

    def drain(self) -> None:
        """Read what nobody wanted, so that the connection can go on."""
        for _ in self:
            pass

    def _next(self) -> bytes:
        if self._chunked and self._left == 0:
            self._left = self._chunk_size()
        if self._left <= 0:
            return b""
        limit = CHUNK if self._reset_after is None else min(CHUNK, self._reset_after - self.received)
        data = self._stream.read(min(self._left, max(1, limit)))
        if not data:
            raise ConnectionError("the request ended early")
        self._left -= len(data)
        if self._chunked and self._left == 0:
            self._stream.readline()
        return data

    def _chunk_size(self) -> int:
        line = self._stream.readline(1024)
        try:
            size = int(line.split(b";")[0], 16)
        except ValueError:
            raise ConnectionError("the request ended early") from None
        if size == 0:
            self._chunked = False
            while self._stream.readline(65536).strip():
                pass
        return size


@dataclass(frozen=True)
class FileSlice:
    """Bytes of a file: `length` of them from `start`."""

    path: Path
    start: int
    length: int

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[bytes]:
        left = self.length
        with self.path.open("rb") as stream:
            stream.seek(self.start)
            while left:
                data = stream.read(min(CHUNK, left))
                if not data:
                    raise ConnectionError(f"{self.path.name} is shorter than it was")
                left -= len(data)
                yield data


@dataclass
class Answer:
    """What a request is answered with. body: bytes, a piece of a file, or anything JSON."""

    body: object = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    def payload(self) -> bytes | FileSlice:
        """The body to send; sets Content-Type for JSON."""
        if isinstance(self.body, (bytes, FileSlice)):
            return self.body
        self.headers.setdefault("Content-Type", "application/json; charset=utf-8")
        return json.dumps(self.body, default=str).encode()


@dataclass
class Call:
    """A request as the endpoints see it. user: who the token belongs to; None without a token."""

    method: str
    target: str
    headers: Message
    body: Body
    user: str | None
    ignore_range: bool = False

    @property
    def range(self) -> str | None:
        """The Range header, unless it is to be ignored."""
        return None if self.ignore_range or self.method == "HEAD" else self.headers.get("Range")

    @property
    def query(self) -> dict[str, list[str]]:
        """Values of every query parameter."""
        return parse_qs(urlsplit(self.target).query)

    def flag(self, name: str) -> bool:
        """Whether a query parameter says yes."""
        return is_true(self.query.get(name))


def is_true(values: list[str] | None) -> bool:
    """Whether a form or query parameter says yes."""
    return bool(values) and values[0].lower() in ("true", "1")


def json_object(data: bytes) -> dict:
    """A JSON object. Raises Refusal 400 if the bytes are anything else."""
    try:
        value = json.loads(data)
    except ValueError as error:
        raise Refusal(400, f"Invalid JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(400, "A JSON object is expected")
    return value


def object_list(wish: Mapping[str, object], key: str) -> list[dict]:
    """A list of JSON objects under a key. Raises Refusal 400."""
    items = wish.get(key)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise Refusal(400, f"{key} must be a list of objects")
    return items


def refusal(error: Refusal) -> Answer:
    """The answer that carries a refusal the way the Hub's client reads it."""
    one_line = " ".join(error.message.encode("ascii", "replace").decode().split())
    headers = {"X-Error-Message": one_line, **error.headers}
    if error.code:
        headers["X-Error-Code"] = error.code
    return Answer({"error": error.message}, error.status, headers)


def select_range(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and length that a Range header selects; None for the whole file.

    A header with several ranges, or of another form, is ignored, as HTTP allows. Raises Refusal 416.
    """
    match = _RANGE.fullmatch(header or "")
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if first and last and int(last) < int(first):
        return None
    start = int(first) if first else max(0, size - int(last))
    end = min(size - 1, int(last)) if first and last else size - 1
    if start > end:
        raise Refusal(416, "Requested range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return start, end - start + 1


def content(call: Call, path: Path, headers: dict[str, str]) -> Answer:
    """A file, or the range of it that was asked for."""
    size = path.stat().st_size
    headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    changed = call.headers.get("If-Range") not in (None, headers["ETag"])
    piece = None if changed else select_range(call.range, size)
    if piece is None:
        return Answer(FileSlice(path, 0, size), 200, headers)
    start, length = piece
    headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{size}"
    return Answer(FileSlice(path, start, length), 206, headers)
