"""A small sample of a model's weights, read before the work begins: from files on this machine, or ranges of the Hub's.

All models of a merge are sampled at the same places.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from hf_locstitch.checkpoints.byte_ranges import Piece, byte_ranges, files_of
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.mapped import MappedFile
from hf_locstitch.checkpoints.read_ahead import IN_ALL
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.checkpoints.tensor_file import TensorFile
from hf_locstitch.errors import LocstitchError
from hf_locstitch.runtime.dtypes import Values

TENSORS = 16  # that one piece each is read of: as many requests a model
ELEMENTS = 1 << 19  # of all pieces together
SHARE = 64  # of a model on the Hub at most one part in so many is fetched for a sample

Sample = Mapping[str, Values]  # tensor -> some of its values, in its own dtype


class RangedFile:
    """A TensorFile whose bytes are fetched from the Hub as they are asked for."""

    def __init__(self, source: Source, file: str) -> None:
        self._source, self._file = source, file

    def raw(self, start: int, stop: int) -> memoryview:
        return memoryview(self._source.read_range(self._file, start, stop))

    def private(self, start: int, stop: int) -> memoryview:
        return memoryview(bytearray(self.raw(start, stop)))

    def release(self, start: int, stop: int) -> None:
        """Nothing is kept."""


def sample_pieces(
    tensors: Sequence[TensorInfo], count: int = TENSORS, elements: int = ELEMENTS, vectors: bool = False
) -> list[Piece]:
    """A piece from the middle of each of `count` tensors, spread evenly.

    vectors: whether norms and biases are taken also where there are matrices: they are much the same in all models.
    """
    filled = [info for info in tensors if info.numel]
    some = filled if vectors else [info for info in filled if len(info.shape) > 1] or filled
    if len(some) > count:
        some = [some[i * (len(some) - 1) // (count - 1)] for i in range(count)]
    each = [min(info.numel, max(elements // len(some), 1)) for info in some]
    return [(info.name, (info.numel - size) // 2, size) for info, size in zip(some, each, strict=True)]


def stood_for(tensors: Sequence[TensorInfo], pieces: Sequence[Piece]) -> dict[str, int]:
    """Elements of all tensors that each piece stands for: those of its own, and of others that it is the nearest to, of
    those of their shape if there are such."""
    taken = {name for name, _, _ in pieces}
    sampled = [place for place, info in enumerate(tensors) if info.name in taken]
    of_shape: dict[tuple[int, ...], list[int]] = {}
    for place in sampled:
        of_shape.setdefault(tensors[place].shape, []).append(place)
    counts = dict.fromkeys(sampled, 0)
    for place, info in enumerate(tensors if sampled else ()):
        like = of_shape.get(info.shape, sampled)
        behind = bisect_left(like, place)
        nearest = min(like[max(behind - 1, 0) : behind + 1], key=lambda one: abs(one - place))
        counts[nearest] += info.numel
    return {tensors[place].name: count for place, count in counts.items()}


def read_samples(
    checkpoints: Mapping[str, Checkpoint], pieces: Sequence[Piece], fetch: bool = True
) -> dict[str, Sample]:
    """The same pieces of each checkpoint that can be sampled cheaply: no adapters, and on the Hub a small part only.

    A checkpoint that cannot be read now is left out: when it is merged, what is wrong is told. fetch: whether the Hub
    is asked for what is not here.
    """
    opened = {name: _cheap_reader(one, pieces, fetch) for name, one in checkpoints.items()}
    readers = {name: reader for name, reader in opened.items() if reader is not None}

    def read(reader: CheckpointReader, piece: Piece) -> Values | None:
        try:
            return reader.values(*piece)
        except LocstitchError:
            return None

    with ThreadPoolExecutor(IN_ALL) as pool:
        reading = {name: [pool.submit(read, reader, piece) for piece in pieces] for name, reader in readers.items()}
    found = {name: [part.result() for part in parts] for name, parts in reading.items()}
    return {
        name: {tensor: part for (tensor, _, _), part in zip(pieces, parts, strict=True) if part is not None}
        for name, parts in found.items()
        if not any(part is None for part in parts)
    }


def _cheap_reader(checkpoint: Checkpoint, pieces: Sequence[Piece], fetch: bool) -> CheckpointReader | None:
    """None where reading the pieces would take long."""
    names = [name for name, _, _ in pieces]
    if checkpoint.layout is not checkpoint or any(name not in checkpoint.tensors for name in names):
        return None
    try:
        files = {file: _opened(checkpoint.source, file) for file in files_of(checkpoint, names)}
    except (LocstitchError, OSError, ValueError):
        return None
    if any(isinstance(file, RangedFile) for file in files.values()):
        nbytes = sum(stop - start for ranges in byte_ranges(checkpoint, pieces).values() for start, stop in ranges)
        if not fetch or nbytes * SHARE > sum(shard.size for shard in checkpoint.shards):
            return None
    return CheckpointReader(checkpoint, files)


def _opened(source: Source, file: str) -> TensorFile:
    path = source.cached(file)
    return RangedFile(source, file) if path is None else MappedFile(path)
