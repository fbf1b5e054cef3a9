"""A checkpoint whose tensors are cut otherwise than the base's: experts one by one, or as one stack.

Its shards are shown as the files that they would be under the base's names. A tensor is put together of runs of bytes
of the real files, when it is read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from hf_locstitch.checkpoints.checkpoint import Checkpoint, Shard
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.tensor_file import TensorFile
from hf_locstitch.runtime.dtypes import ITEM_BYTES


@dataclass(frozen=True)
class Part:
    """What a tensor is a part of, by any name that both sides have for it. order: among the parts."""

    whole: str
    order: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Run:
    """Bytes start … stop of a shard."""

    shard: Shard
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Cut:
    """A tensor that is put together of runs."""

    info: TensorInfo
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class RearrangedShard(Shard):
    """runs: what each tensor of the header consists of."""

    runs: tuple[tuple[Run, ...], ...]

    def stored(self, start: int, stop: int) -> list[tuple[str, int, int]]:
        return [place for run in self.find(start, stop) for place in run.shard.stored(run.start, run.stop)]

    def opened(self, files: Mapping[str, TensorFile]) -> TensorFile:
        return RearrangedFile(self, files)

    def find(self, start: int, stop: int) -> list[Run]:
        """What lies at bytes start … stop as they are shown, all of one tensor."""
        number = self.header.number_at(start)
        shown = self.header.tensors[number]
        return _between(self.runs[number], start - shown.start, stop - shown.start)


class RearrangedFile:
    """A TensorFile of a shard as it is shown. files: the real ones, open, by name."""

    def __init__(self, shard: RearrangedShard, files: Mapping[str, TensorFile]) -> None:
        self._shard, self._files = shard, files
        self._opened: dict[str, TensorFile] = {}

    def raw(self, start: int, stop: int) -> memoryview:
        found = [self._file(run).raw(run.start, run.stop) for run in self._shard.find(start, stop)]
        return found[0] if len(found) == 1 else memoryview(b"".join(found))

    def private(self, start: int, stop: int) -> memoryview:
        runs = self._shard.find(start, stop)
        if len(runs) == 1:
            return self._file(runs[0]).private(runs[0].start, runs[0].stop)
        return memoryview(bytearray(self.raw(start, stop)))

    def release(self, start: int, stop: int) -> None:
        for run in self._shard.find(start, stop):
            self._file(run).release(run.start, run.stop)

    def _file(self, run: Run) -> TensorFile:
        """Opened once: what is computed from a file is told by it when it was read."""
        return self._opened.setdefault(run.shard.file, run.shard.opened(self._files))


def rearranged(base: Checkpoint, other: Checkpoint, due: Mapping[str, Part], own: Mapping[str, Part]) -> Checkpoint:
    """The other checkpoint with its tensors cut as the base's are, where they are parts of the same.

    due: of the base's tensors; own: of the other's.
    """
    lacking = _by_whole({name: part for name, part in due.items() if name not in other.tensors})
    free = _by_whole({name: part for name, part in own.items() if name not in base.tensors})
    cut: list[Cut] = []
    renamed: dict[str, str] = {}
    for whole, names in lacking.items():
        sources = [other.tensors[name] for name in free.get(whole, ())]
        wanted = [base.info(name) for name in names]
        if sources and _fit(wanted, [info for _, info in sources]):
            cut += _cut(wanted, sources)
            renamed |= {info.name: names[0] for _, info in sources}
    if not cut:
        return other
    shards = tuple(_shown(shard, cut, renamed) for shard in other.shards)
    tensors = {info.name: (shard, info) for shard in shards for info in shard.header.tensors}
    return replace(other, shards=shards, tensors=tensors, recut={name: source for source, name in renamed.items()})


def _by_whole(parts: Mapping[str, Part]) -> dict[str, list[str]]:
    """The parts' names in their order."""
    found: dict[str, list[str]] = {}
    for name in sorted(parts, key=lambda name: parts[name].order):
        found.setdefault(parts[name].whole, []).append(name)
    return found


def _fit(due: Sequence[TensorInfo], own: Sequence[TensorInfo]) -> bool:
    """Whether two lists of tensors are one flat sequence, cut in two ways, with rows of one length."""
    widths = {info.shape[-1:] for info in (*due, *own)}
    same_size = sum(info.numel for info in due) == sum(info.numel for info in own)
    return same_size and len(widths) == 1 and len({info.dtype for info in own}) == 1


def _cut(due: Sequence[TensorInfo], sources: Sequence[tuple[Shard, TensorInfo]]) -> Iterator[Cut]:
    """The sources' bytes, one after another, as the tensors that are due."""
    runs = [Run(shard, info.start, info.stop) for shard, info in sources]
    dtype, at = sources[0][1].dtype, 0
    for info in due:
        stop = at + info.numel * ITEM_BYTES[dtype]
        yield Cut(replace(info, dtype=dtype), tuple(_between(runs, at, stop)))
        at = stop


def _between(runs: Iterable[Run], start: int, stop: int) -> list[Run]:
    """Bytes start … stop of what the runs are together."""
    found, at = [], 0
    for run in runs:
        first, last = max(start - at, 0), min(stop - at, run.nbytes)
        if first < last:
            found.append(replace(run, start=run.start + first, stop=run.start + last))
        at += run.nbytes
    return found


def _shown(shard: Shard, cut: Sequence[Cut], gone: Collection[str]) -> Shard:
    """A shard with what remains in it, and those new tensors that begin in it."""
    own = [Cut(info, (Run(shard, info.start, info.stop),)) for info in shard.header.tensors if info.name not in gone]
    own += [one for one in cut if one.runs and one.runs[0].shard is shard]
    at, infos = shard.header.data_start, []
    for one in own:
        stop = at + sum(run.nbytes for run in one.runs)
        infos.append(replace(one.info, start=at, stop=stop))
        at = stop
    header = replace(shard.header, tensors=tuple(infos))
    return RearrangedShard(shard.file, shard.size, header, tuple(one.runs for one in own))
