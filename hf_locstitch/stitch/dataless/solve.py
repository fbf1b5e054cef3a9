"""The dense solution D of the refit without data, and its values under masks: unit by unit, shared out over processes.

D is written down, four bytes an element: a joint mask is found from it, and the values under masks start from it.
Solving it again instead would take a third of all the work, a disk takes it in a few seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.errors import NonFiniteError
from hf_locstitch.runtime.chunks import Chunk, chunks_of
from hf_locstitch.runtime.dtypes import Values
from hf_locstitch.runtime.processes import Processes, divide
from hf_locstitch.runtime.progress import Progress
from hf_locstitch.runtime.settings import Settings
from hf_locstitch.stitch.dataless.cost import strip_size
from hf_locstitch.stitch.dataless.growing import GrowingTensors
from hf_locstitch.stitch.dataless.layers import Unit, is_vector
from hf_locstitch.stitch.dataless.opened import (
    Assembled,
    OpenedModels,
    OpenedWeights,
    Stored,
    finite,
    matrices,
    open_models,
)
from hf_locstitch.stitch.dataless.shared_inputs import SharedInput
from hf_locstitch.stitch.dataless.solution import (
    Moments,
    Threads,
    capped,
    dense,
    inside,
    moments,
    of_vectors,
    start,
    start_terms,
)
from hf_locstitch.stitch.fitted_values import FittedValues, FittedWriter, open_fitted
from hf_locstitch.stitch.refit.plain import PlainStitch
from hf_locstitch.stitch.refit.stops import Linear
from hf_locstitch.tasks.loading import find_device


@dataclass(frozen=True)
class DatalessJob:
    """readers: of the inputs by name, mapped. order: of the finetunes in sums. tensors: those that are merged. folder:
    shared by all processes; what earlier ones finished there is reused."""

    readers: Mapping[str, CheckpointReader]
    order: Sequence[str]
    tensors: Sequence[TensorInfo]
    folder: Path
    device: str
    settings: Settings
    processes: Processes
    progress: Progress


@dataclass(frozen=True)
class DenseSolution:
    """D, by names on disk. low_rank: whether updates are of low rank, and D stays near the mean of task vectors."""

    values: FittedValues
    low_rank: bool

    def elements(self, name: str, first: int, count: int) -> Tensor:
        """As `part`, a tensor."""
        return torch.from_numpy(self.part(name, first, count).copy())

    def part(self, name: str, first: int, count: int) -> Values:
        """Elements first … first + count of a tensor, float32 [count]."""
        return self.values.values(name, first, count)


@dataclass
class DatalessSolver:
    """Every process makes one, and the same calls. most: elements of the layers in memory at once, where those that
    share an input are more; it changes no bit."""

    job: DatalessJob
    opened: OpenedModels = field(init=False)
    threads: Threads = field(init=False)
    device: torch.device = field(init=False)
    most: int = field(init=False)

    def __post_init__(self) -> None:
        job = self.job
        self.device = job.processes.together(lambda: find_device(job.device, float64=True))
        self.threads = Threads(job.settings.workers if self.device.type == "cpu" else 1)
        self._infos = {info.name: info for info in job.tensors}
        self.opened = job.processes.together(self._open)
        self.most = strip_size(self.opened.layers, len(job.order), job.settings)
        units = self.opened.layers.units
        owners = divide([self._work(unit) for unit in units], job.processes.count)
        self._own = [unit for unit, rank in zip(units, owners, strict=True) if rank == job.processes.rank]

    def _open(self) -> OpenedModels:
        return open_models(self.job.readers["base"], self._finetuned, list(self._infos), self.device)

    def _work(self, unit: Unit) -> int:
        return sum(self._infos[name].numel * max(self._infos[name].shape, default=1) for name in unit.disk)

    @property
    def _own_others(self) -> list[str]:
        job = self.job
        return list(self.opened.layers.others[job.processes.rank :: job.processes.count])

    @property
    def _own_names(self) -> set[str]:
        return {name for unit in self._own for name in unit.disk} | set(self._own_others)

    @property
    def plain(self) -> dict[str, str]:
        """Localized tensors that are no linear layers, as far as a run showed, and no vectors: and why."""
        layers = self.opened.layers
        return {name: layers.why_plain(name) for name in layers.others if not is_vector(self._infos[name])}

    # ---- the dense solution --------------------------------------------------------------------------------------

    def solve(self) -> DenseSolution:
        """D of all localized tensors, from an earlier process if it left them."""
        job, folder = self.job, self.job.folder / "dense"
        heading = json.dumps(["dense", str(self.device.type)])
        found = open_fitted(folder, heading, self._own_names, job.processes)
        if found is None:
            low_rank = job.processes.gather(self.opened.is_low_rank() if job.processes.first else False)[0]
            writer = FittedWriter(folder, self._own_names, job.processes, resume=heading)
            job.processes.together(partial(self._write_dense, writer, low_rank))
            writer.finish(heading, low_rank=low_rank)
            found = open_fitted(folder, heading, self._own_names, job.processes)
            assert found is not None
        return DenseSolution(found, found.notes["low_rank"])

    def _write_dense(self, writer: FittedWriter, low_rank: bool) -> None:
        tensors = GrowingTensors(
            writer,
            self._chunks,
            lambda _: "F32",
            lambda name, _, change: _in_range(name, change.cpu()),
        )
        with self.job.progress.bar("solving", len(self._own), " layers") as advance:
            for unit in self._own:
                if not all([writer.known(name) for name in unit.disk]):
                    for name, values in self._dense_of(unit, low_rank):
                        tensors.add(name, values)
                advance(1)
        for name in self._own_others:
            if not writer.known(name):
                for values in self._outside(name):
                    tensors.add(name, values)

    def _dense_of(self, unit: Unit, low_rank: bool) -> Iterator[tuple[str, Tensor]]:
        assembled = Assembled(self.opened.layers, unit, self._mean)
        for shared in unit.inputs:
            strips = shared.strips(self.most)
            grams = self.opened.input_grams(shared, self.threads) if len(strips) > 1 else None
            share = self._share(shared, strips, grams) if grams and not low_rank else None
            for strip in strips:
                found = self._moments(shared, strip, grams)
                changes = dense(found, self.threads, low_rank, share)
                yield from self._assemble(assembled, shared, strip, changes, found.largest)

    def _moments(self, shared: SharedInput, strip: Sequence[Linear], grams: Sequence[Tensor] | None) -> Moments:
        return moments(self.opened.task_vectors(strip, shared.biased), self.threads, grams)

    def _share(self, shared: SharedInput, strips: Sequence[Sequence[Linear]], grams: Sequence[Tensor] | None) -> float:
        """a, of layers that are too large to be in memory at once."""
        terms: list[tuple[float, float]] = []
        for strip in strips:
            found = self._moments(shared, strip, grams)
            terms += start_terms(found, [self.threads.product(total, found.gram) for total in found.total])
        return start(terms)

    def _assemble(
        self,
        assembled: Assembled,
        shared: SharedInput,
        strip: Sequence[Linear],
        changes: Sequence[Tensor],
        largest: Sequence[float],
    ) -> Iterator[tuple[str, Tensor]]:
        """What becomes complete by the changes of some layers, none of which is longer than it may be; as
        `Assembled.add`."""
        for linear, change, longest in zip(strip, changes, largest, strict=True):
            (base,) = matrices(self.opened.base, [linear], shared.biased)
            yield from assembled.add(linear, capped(change, base, longest))

    def _mean(self, parameter: str) -> Tensor:
        """The mean of the task vectors of a parameter that is in no linear layer."""
        part = self.opened.layers.parts[parameter]
        return sum((w.load(part) - self.opened.base.load(part) for w in self.opened.finetuned), torch.zeros(())) / len(
            self.opened.finetuned
        )

    def _chunks(self, name: str) -> Sequence[Chunk]:
        return chunks_of([self._infos[name].numel], self.job.settings.chunk)

    def _outside(self, name: str) -> Iterator[Tensor]:
        """Of a tensor on disk that is in no linear layer, flat, piece by piece."""
        info, models = self._infos[name], [finite(one) for one in (self.job.readers["base"], *self._finetuned)]
        for chunk in self._chunks(name):
            base, *finetuned = (one.read(name, chunk.first, chunk.count).float() for one in models)
            for one in models:
                one.release(name, chunk.first, chunk.count)
            vectors = [values - base for values in finetuned]
            yield of_vectors(vectors) if is_vector(info) else torch.stack(vectors).mean(0)

    @property
    def _finetuned(self) -> list[CheckpointReader]:
        return [self.job.readers[name] for name in self.job.order]

    # ---- values under masks --------------------------------------------------------------------------------------

    def fit(self, dense: DenseSolution, plain: PlainStitch, scale: float, folder: Path, resume: str) -> FittedWriter:
        """Write the values under the masks, `scale` times as far from the base. plain: the masks, and the output's
        dtypes."""
        job = self.job
        writer = FittedWriter(folder, self._own_names, job.processes, resume=resume)
        masked = _Masked(self.opened, plain, dense, self._infos, self.device)
        base = finite(plain.base)

        def cut(name: str, chunk: Chunk, change: Tensor) -> Tensor:
            start = base.read(name, chunk.first, chunk.count).float()
            return plain.cut_chunk(name, chunk, start + _in_range(name, change.cpu()) * scale)

        tensors = GrowingTensors(writer, plain.chunks, plain.dtype_name, cut)

        def write() -> None:
            with job.progress.bar("refitting", len(self._own), " layers") as advance:
                for unit in self._own:
                    if not all([writer.known(name) for name in unit.disk]):
                        for name, change in self._inside(unit, masked, dense.low_rank):
                            tensors.add(name, change)
                    advance(1)
            for name in self._own_others:
                if is_vector(self._infos[name]) and not writer.known(name):
                    tensors.add(name, dense.elements(name, 0, self._infos[name].numel))

        job.processes.together(write)
        return writer

    def _inside(self, unit: Unit, masked: _Masked, low_rank: bool) -> Iterator[tuple[str, Tensor]]:
        """The changes of a unit's tensors on disk, of which those under the masks count; as `Assembled.add`."""
        assembled = Assembled(self.opened.layers, unit, masked.dense_of)
        for shared in unit.inputs:
            if masked.whole(shared):
                for linear in shared.linears:
                    yield from assembled.add(linear, masked.begin(shared, [linear])[0])
                continue
            strips = shared.strips(self.most)
            grams = self.opened.input_grams(shared, self.threads) if len(strips) > 1 else None
            for strip in strips:
                found = self._moments(shared, strip, grams)
                found.total.clear()  # of no use here
                masks = masked.masks(shared, strip)
                begin = [values.mul_(mask) for values, mask in zip(masked.begin(shared, strip), masks, strict=True)]
                changes = inside(found, begin, masks, self.threads, low_rank)
                yield from self._assemble(assembled, shared, strip, changes, found.largest)


def _in_range(name: str, change: Tensor) -> Tensor:
    """The change, which is finite, as the inputs are, unless float32 does not hold what comes between."""
    if not change.isfinite().all():
        raise NonFiniteError(
            f"{name}: the task vectors are too long to be solved for in float32. Check the finetunes, or exclude the "
            "tensor with --exclude."
        )
    return change


class _Masked:
    """D and the masks, as parameters in memory."""

    def __init__(
        self,
        opened: OpenedModels,
        plain: PlainStitch,
        dense: DenseSolution,
        infos: Mapping[str, TensorInfo],
        device: torch.device,
    ) -> None:
        layers = opened.layers
        self._parts = layers.parts

        def shape(name: str) -> Sequence[int]:
            return infos[name].shape

        self._dense = OpenedWeights(layers, Stored(layers.disk, shape, dense.elements), device)
        self._covered = OpenedWeights(layers, Stored(layers.disk, shape, plain.covered_part), device)

    def whole(self, shared: SharedInput) -> bool:
        """Whether the masks cover all of these layers."""
        return all(mask.all() for linear in shared.linears for mask in self.masks(shared, [linear]))

    def begin(self, shared: SharedInput, strip: Sequence[Linear]) -> list[Tensor]:
        return matrices(self._dense, strip, shared.biased)

    def masks(self, shared: SharedInput, strip: Sequence[Linear]) -> list[Tensor]:
        return [matrices(self._covered, [linear], shared.biased)[0] > 0 for linear in strip]

    def dense_of(self, parameter: str) -> Tensor:
        return self._dense.load(self._parts[parameter])
