"""Which bytes of a checkpoint's files a pass over pieces of its tensors reads, as pure data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.runtime.dtypes import ITEM_BYTES

Range = tuple[int, int]  # bytes start … stop of a file
Piece = tuple[str, int, int]  # tensor, its elements first … first + count
Pieces = Mapping[str, Sequence[Piece]]  # input -> what is read of it, in this order


def byte_ranges(checkpoint: Checkpoint, pieces: Iterable[Piece]) -> dict[str, list[Range]]:
    """Where pieces lie: file, in the order of the first need -> ranges, ascending, neighbours joined."""
    by_file: dict[str, list[Range]] = {}
    for name, first, count in pieces:
        for file, start, stop in stored(checkpoint, name, first, count):
            by_file.setdefault(file, []).append((start, stop))
    return {file: _joined(ranges) for file, ranges in by_file.items()}


def stored(checkpoint: Checkpoint, name: str, first: int, count: int) -> list[tuple[str, int, int]]:
    """Where a piece lies, as (file, start, stop): its own bytes, and then what else is read with them."""
    shard, info = checkpoint.tensors[name]
    item = ITEM_BYTES[info.dtype]
    return shard.stored(info.start + first * item, info.start + (first + count) * item)


def files_of(checkpoint: Checkpoint, names: Iterable[str]) -> set[str]:
    """The files that hold what tensors are read from; names that it lacks are left out."""
    known = [name for name in names if name in checkpoint.tensors]
    return {file for name in known for file, _, _ in stored(checkpoint, name, 0, checkpoint.info(name).numel)}


def _joined(ranges: Iterable[Range]) -> list[Range]:
    joined: list[Range] = []
    for start, stop in sorted(set(ranges)):
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        if stop > start:
            joined.append((start, stop))
    return joined


def without(one: Range, ranges: Iterable[Range]) -> list[Range]:
    """The parts of a range that lie in none of others, which ascend and do not overlap."""
    at, stop = one
    parts = []
    for first, last in ranges:
        if first >= stop:
            break
        if last > at:
            parts.append((at, first))
            at = last
    return [(first, last) for first, last in [*parts, (at, stop)] if first < last]


def most_held(checkpoint: Checkpoint, pieces: Sequence[Piece]) -> int:
    """Bytes that lie on the disk at most when pieces are read in this order from files that come in file order.

    A piece that lies before others of its file but is needed after them waits for its turn.
    """
    needs = byte_ranges(checkpoint, pieces)
    starts: dict[str, int] = {}  # of each file in the sequence of all needed bytes
    total = 0
    for file, ranges in needs.items():
        starts[file] = total
        total += sum(stop - start for start, stop in ranges)
    most = front = released = 0
    for name, first, count in pieces:
        places = stored(checkpoint, name, first, count)
        for file, _, stop in places:
            before = sum(min(last, stop) - start for start, last in needs[file] if start < stop)
            front = max(front, starts[file] + before)
        most = max(most, front - released)
        _, start, stop = places[0]
        released += stop - start
    return most
