"""One pass over the base and all finetuned models at once: scores in, the selections out."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch

from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.mapped import MappedCheckpoint
from hf_locstitch.chunks import Chunk, chunks_of, for_each
from hf_locstitch.errors import NonFiniteError
from hf_locstitch.localize.selection import (
    BINS,
    EVERYTHING,
    NON_FINITE,
    Bracket,
    BracketMissed,
    Selection,
    Spill,
    histogram_bracket,
    sample_bracket,
)
from hf_locstitch.processes import Processes

SAMPLE = 1 << 20  # elements of one model that the brackets are estimated from
SMALLEST_SAMPLE = 1 << 16  # of one group of tensors; smaller groups are kept whole
SAMPLE_RUN = 1 << 11  # neighbours sampled together: few places of a file are visited

Group = tuple[Sequence[int], int]


def magnitude_scores(finetuned: torch.Tensor, base: torch.Tensor, out: torch.Tensor) -> npt.NDArray[np.int32]:
    """Bits of |finetuned − base| in float32. base: float32 [n]; finetuned: any float [n]; out: float32 [≥ n]."""
    task_vector = out[: len(finetuned)].copy_(finetuned)
    task_vector.sub_(base).abs_()
    return task_vector.view(torch.int32).numpy()


class Scan:
    """base, finetuned: open checkpoints. tensors: the localized ones, as the base holds them.

    own: the names of those that this process scans; every process calls `run`.
    """

    def __init__(
        self,
        base: MappedCheckpoint,
        finetuned: Mapping[str, MappedCheckpoint],
        tensors: Sequence[TensorInfo],
        groups: Sequence[Group],
        spill_folder: Path,
        *,
        own: Collection[str],
        processes: Processes,
        chunk: int,
        workers: int,
        allow_non_finite: bool = False,
        advance: Callable[[int], object] = lambda _: None,
    ) -> None:
        self.base, self.finetuned, self.tensors, self.groups = base, finetuned, tensors, groups
        self.spill_folder, self.workers, self.advance = spill_folder, workers, advance
        self.allow_non_finite = allow_non_finite
        self.names = [info.name for info in tensors]
        self.chunks = chunks_of([info.numel for info in tensors], chunk)
        self.own_chunks = [chunk for chunk in self.chunks if self.names[chunk.tensor] in own]
        self.processes = processes
        self._buffers = threading.local()
        self._chunk = chunk

    def run(self) -> dict[str, Selection]:
        """The mask of each finetuned model. Raises NonFiniteError."""
        selections = self._pass({name: self._sampled_brackets(name) for name in self.finetuned})
        missed = [name for name, selection in selections.items() if not self._settled(selection)]
        for name in missed:
            selections[name].close()
        if missed:
            selections |= self._pass(self._exact_brackets(missed))
            for name in missed:
                selections[name].settle(self.workers)
        return selections

    def _settled(self, selection: Selection) -> bool:
        try:
            selection.settle(self.workers)
        except BracketMissed:
            return False
        return True

    def _pass(self, brackets: Mapping[str, Sequence[Bracket]]) -> dict[str, Selection]:
        """Offer every chunk of the models named in `brackets` to their selections."""
        selections = {
            name: Selection(self._spill(name, given), self.names, self.chunks, self.groups, given, self.processes)
            for name, given in brackets.items()
        }
        offer = partial(self._offer, selections)
        self.processes.together(lambda: for_each(offer, self.own_chunks, self.workers))
        return selections

    def _spill(self, name: str, brackets: Sequence[Bracket]) -> Spill:
        dtypes = {self.finetuned[name].dtype(tensor) for tensor in self.names} or {torch.float32}
        common = dtypes.pop() if len(dtypes) == 1 else torch.float64 if torch.float64 in dtypes else torch.float32
        heading = json.dumps([self._chunk, str(common), [(bracket.low, bracket.high) for bracket in brackets]])
        return Spill(
            self.spill_folder / f"{name}.{self.processes.rank}-of-{self.processes.count}",
            len(self.chunks),
            common,
            heading,
        )

    def _offer(self, selections: Mapping[str, Selection], chunk: Chunk) -> None:
        name = self.names[chunk.tensor]
        todo = {model: selection for model, selection in selections.items() if not selection.has(chunk)}
        self.advance(sum(self._nbytes(model, chunk) for model in selections if model not in todo))
        if not todo:
            return
        original = self.base.flat(name, chunk.first, chunk.count)
        base, out = self._two_buffers()
        base = base[: chunk.count].copy_(original)
        for model, selection in todo.items():
            finetuned = self.finetuned[model].flat(name, chunk.first, chunk.count)
            from_zero = selection.bracket(chunk).low == 0
            differs = differing_bits(finetuned, original) if from_zero else None
            scores = magnitude_scores(finetuned, base, out)
            largest = selection.offer(chunk, scores, None if differs is None else differs | (scores != 0), finetuned)
            if largest >= NON_FINITE and not self.allow_non_finite:
                self._raise_non_finite(model, name)
            self.finetuned[model].release(name, chunk.first, chunk.count)
            self.advance(self._nbytes(model, chunk))
        self.base.release(name, chunk.first, chunk.count)

    def _nbytes(self, model: str, chunk: Chunk) -> int:
        return chunk.count * self.finetuned[model].dtype(self.names[chunk.tensor]).itemsize

    def _raise_non_finite(self, model: str, name: str) -> NoReturn:
        """Say which of the two models is at fault."""
        numel = self.base.checkpoint.info(name).numel
        for checkpoint in (self.base, self.finetuned[model]):
            bad = int((~torch.isfinite(checkpoint.flat(name, 0, numel))).sum())
            if bad:
                raise_non_finite(checkpoint, name, bad, numel)
        raise NonFiniteError(
            f"the difference between {self.finetuned[model].where(name)} and the base overflows float32 in {name}. "
            "Leave the tensor out with --exclude."
        )

    def _two_buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """This thread's float32 [chunk] buffers."""
        if not hasattr(self._buffers, "pair"):
            self._buffers.pair = torch.empty(self._chunk), torch.empty(self._chunk)
        return self._buffers.pair

    def _exact_brackets(self, models: Sequence[str]) -> dict[str, list[Bracket]]:
        """From the histogram of every score: a pass more, for models that a sample misjudged."""
        groups_of = {tensor: group for group, (tensors, _) in enumerate(self.groups) for tensor in tensors}
        counts = np.zeros((len(models), len(self.groups), BINS), dtype=np.int64)
        lock = threading.Lock()

        def count(chunk: Chunk) -> None:
            name = self.names[chunk.tensor]
            base, out = self._two_buffers()
            base = base[: chunk.count].copy_(self.base.flat(name, chunk.first, chunk.count))
            for row, model in zip(counts, models, strict=True):
                scores = magnitude_scores(self.finetuned[model].flat(name, chunk.first, chunk.count), base, out)
                part = np.bincount(scores >> 16, minlength=BINS)
                with lock:
                    row[groups_of[chunk.tensor]] += part

        for_each(count, self.own_chunks, self.workers)
        counts = self.processes.sum(counts)
        return {
            model: [histogram_bracket(row, k) for row, (_, k) in zip(rows, self.groups, strict=True)]
            for model, rows in zip(models, counts, strict=True)
        }

    def _sampled_brackets(self, model: str) -> list[Bracket]:
        """A bracket for each group. It decides how much is spilled, never what is selected."""
        budget = max(SAMPLE // max(len(self.groups), 1), SMALLEST_SAMPLE)
        brackets = []
        for tensors, k in self.groups:
            n = sum(self.tensors[tensor].numel for tensor in tensors)
            sample = self._sample(model, tensors, n, budget // SAMPLE_RUN) if n > budget else None
            brackets.append(EVERYTHING if sample is None else sample_bracket(sample, k, n))
        return brackets

    def _sample(self, model: str, tensors: Sequence[int], n: int, runs: int) -> npt.NDArray[np.int32] | None:
        """Scores of runs of neighbours, spread evenly over n elements. Returns [runs, SAMPLE_RUN]."""
        ends = np.cumsum([self.tensors[tensor].numel for tensor in tensors])
        places = ((np.arange(runs) + np.random.default_rng(0).random(runs)) * n / runs).astype(np.int64)
        rows = []
        for place, at in zip(places, np.searchsorted(ends, places, side="right"), strict=True):
            info = self.tensors[tensors[at]]
            if info.numel < SAMPLE_RUN:
                continue
            first = min(int(place - ends[at]) + info.numel, info.numel - SAMPLE_RUN)
            base = self.base.flat(info.name, first, SAMPLE_RUN).float()
            finetuned = self.finetuned[model].flat(info.name, first, SAMPLE_RUN)
            rows.append(magnitude_scores(finetuned, base, torch.empty(SAMPLE_RUN)))
        return np.stack(rows) if rows else None


def differing_bits(finetuned: torch.Tensor, base: torch.Tensor) -> npt.NDArray[np.bool_]:
    """Where two tensors [n] differ in any bit, in float64 if their dtypes differ; 0.0 and −0.0 do. Returns [n]."""
    if finetuned.dtype != base.dtype:
        finetuned, base = finetuned.double(), base.double()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[base.element_size()]
    return finetuned.view(integer).numpy() != base.view(integer).numpy()


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value [n] is NaN or infinite; several times faster than torch.isfinite for the narrow dtypes."""
    if values.dtype == torch.float64:
        return bool(torch.isfinite(values).all())
    integer, infinity = {
        torch.float32: (torch.int32, 0x7F800000),
        torch.bfloat16: (torch.int16, 0x7F80),
        torch.float16: (torch.int16, 0x7C00),
    }[values.dtype]
    bits = values.view(integer)
    return len(bits) == 0 or int((bits & torch.iinfo(integer).max).max()) < infinity


def raise_non_finite(checkpoint: MappedCheckpoint, name: str, bad: int, numel: int) -> NoReturn:
    raise NonFiniteError(
        f"{name} in {checkpoint.where(name)} holds NaN or infinity in {bad} of {numel} places. The checkpoint is "
        "broken, or was saved in too narrow a dtype; --allow-non-finite lets such values through."
    )
