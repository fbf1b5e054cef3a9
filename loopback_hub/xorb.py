"""The two files of Xet, as its client writes and reads them: xorbs, which hold chunks, and shards, which tell of files.

Chunks that the client compressed are unpacked here; what this Hub packs itself is not compressed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loopback_hub.git import Refusal
from loopback_hub.wire import Answer, Call, FileSlice, select_range

CHUNK = 1 << 16  # bytes of a file in each chunk but the last
IN_XORB = 1 << 10  # chunks
_HEADER = 8
_PACKED = _HEADER + CHUNK
_PLAIN, _LZ4, _GROUPED_LZ4 = range(3)
_FOOTER = b"XETBLOB"
_LZ4_MAGIC = b"\x04\x22\x4d\x18"
_RECORD = 48  # bytes of everything in a shard, also of its head
_VERIFIED, _WITH_SHA256 = 1 << 31, 1 << 30
_END = b"\xff" * 32


@dataclass(frozen=True)
class Term:
    """Chunks first … end of a xorb, which are a part of a file."""

    xorb: str
    first: int
    end: int


@dataclass(frozen=True)
class ShardFile:
    """What a shard tells of a file. sha256: None if it does not say."""

    terms: list[Term]
    sha256: str | None


@dataclass(frozen=True)
class PackedSlice(FileSlice):
    """Bytes of the xorb that a part of a file would make: `length` of them from `start`. offset: of the part."""

    offset: int = 0

    def __iter__(self) -> Iterator[bytes]:
        number, skip = divmod(self.start, _PACKED)
        left = self.length
        with self.path.open("rb") as stream:
            stream.seek(self.offset + number * CHUNK)
            while left:
                data = stream.read(CHUNK)
                packed = (_header(len(data)) + data)[skip : skip + left]
                skip, left = 0, left - len(packed)
                yield packed


def packed_bytes(nbytes: int) -> int:
    """Bytes of a xorb that holds so many of a file."""
    return nbytes + _HEADER * -(-nbytes // CHUNK)


def _header(nbytes: int) -> bytes:
    length = nbytes.to_bytes(3, "little")
    return b"\0" + length + bytes([_PLAIN]) + length


def chunks(xorb: bytes) -> list[bytes]:
    """The chunks of a xorb, unpacked. Raises Refusal 400 if it is none."""
    try:
        return _chunks(xorb)
    except IndexError:
        raise Refusal(400, "Not a xorb: a chunk ends early") from None


def _chunks(xorb: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(xorb) and not xorb.startswith(_FOOTER, at):
        packed, scheme = int.from_bytes(xorb[at + 1 : at + 4], "little"), xorb[at + 4]
        data = xorb[at + _HEADER : at + _HEADER + packed]
        chunk = data if scheme == _PLAIN else _unpacked(data)
        chunk = _ungrouped(chunk) if scheme == _GROUPED_LZ4 else chunk
        if xorb[at] or scheme > _GROUPED_LZ4 or len(chunk) != int.from_bytes(xorb[at + 5 : at + 8], "little"):
            raise Refusal(400, f"Not a xorb: chunk {len(found)} at byte {at} is damaged or of an unknown kind")
        found.append(chunk)
        at += _HEADER + packed
    return found


def _ungrouped(data: bytes) -> bytes:
    """Of bytes grouped by their place in four: all first ones, all second ones, …"""
    whole, at = bytearray(len(data)), 0
    for place in range(4):
        count = len(range(place, len(data), 4))
        whole[place::4] = data[at : at + count]
        at += count
    return bytes(whole)


def _unpacked(frame: bytes) -> bytes:
    """Of an LZ4 frame: https://github.com/lz4/lz4/blob/dev/doc/lz4_Frame_format.md"""
    if not frame.startswith(_LZ4_MAGIC):
        raise Refusal(400, "Not a xorb: a chunk is no LZ4 frame")
    flags = frame[4]
    at = 7 + 8 * bool(flags & 0x08) + 4 * bool(flags & 0x01)
    out = bytearray()
    while size := int.from_bytes(frame[at : at + 4], "little"):
        nbytes = size & 0x7FFFFFFF
        block = frame[at + 4 : at + 4 + nbytes]
        if size >> 31:
            out += block
        else:
            _unpack_block(block, out)
        at += 4 + nbytes + 4 * bool(flags & 0x10)
    return bytes(out)


def _unpack_block(block: bytes, out: bytearray) -> None:
    """Append what an LZ4 block holds: literal bytes, then a copy of what came before, and again."""

    def length(short: int) -> int:
        nonlocal at
        more = 255 if short == 15 else 0
        while more == 255:
            more = block[at]
            short, at = short + more, at + 1
        return short

    at = 0
    while at < len(block):
        token, at = block[at], at + 1
        literal = length(token >> 4)
        out += block[at : at + literal]
        at += literal
        if at >= len(block):
            return
        back, at = int.from_bytes(block[at : at + 2], "little"), at + 2
        if not 0 < back <= len(out):
            raise Refusal(400, "Not a xorb: a chunk is copied from nowhere")
        left = length(token & 15) + 4
        while left:  # a copy may overlap itself
            start = len(out) - back
            part = out[start : start + left]
            out += part
            left -= len(part)


def shard_files(shard: bytes) -> list[ShardFile]:
    """The files that a shard tells of. Raises Refusal 400 if it is none."""
    try:
        return list(_shard_files(shard))
    except struct.error:
        raise Refusal(400, "Not a shard: it ends early") from None


def _shard_files(shard: bytes) -> Iterator[ShardFile]:
    at = _RECORD
    while True:
        key, flags, count = struct.unpack_from("<32sII", shard, at)
        if key == _END:
            return
        at += _RECORD
        terms = [struct.unpack_from("<32sIIII", shard, at + _RECORD * n) for n in range(count)]
        at += _RECORD * count * (2 if flags & _VERIFIED else 1)
        sha256 = printed(struct.unpack_from("<32s", shard, at)[0]) if flags & _WITH_SHA256 else None
        at += _RECORD * bool(flags & _WITH_SHA256)
        yield ShardFile([Term(printed(xorb), first, end) for xorb, _, _, first, end in terms], sha256)


def printed(key: bytes) -> str:
    """A hash as Xet writes it: four little-endian numbers in hexadecimal."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", key))


def xorbs_of(path: Path) -> Iterator[tuple[int, int]]:
    """The parts that a file is cut into, a xorb each: (first byte, bytes)."""
    size, most = path.stat().st_size, CHUNK * IN_XORB
    return ((offset, min(most, size - offset)) for offset in range(0, size, most))


def packed_range(call: Call, path: Path, number: int) -> Answer:
    """The range that is asked for of the xorb with this number that a file is packed into."""
    offset, nbytes = list(xorbs_of(path))[number]
    size = packed_bytes(nbytes)
    start, length = select_range(call.range, size) or (0, size)
    headers = {"Content-Range": f"bytes {start}-{start + length - 1}/{size}"}
    return Answer(PackedSlice(path, start, length, offset), 206, headers)
