"""One pass over the base and all finetuned models at once: scores in, the selections out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch

from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.mapped import MappedCheckpoint
from hf_locstitch.chunks import Chunk, chunks_of, for_each
from hf_locstitch.errors import NonFiniteError
from hf_locstitch.localize.selection import NON_FINITE, BoundTooHigh, Selection, Spill, sample_bound

SAMPLE = 1 << 20  # elements of one model that the bound is estimated from
SMALLEST_SAMPLE = 1 << 14  # of one group of tensors; smaller groups are kept whole
SAMPLE_RUN = 64  # neighbours sampled together: a page of the file yields more than one element

Group = tuple[Sequence[int], int]


def magnitude_scores(finetuned: torch.Tensor, base: torch.Tensor, out: torch.Tensor) -> npt.NDArray[np.int32]:
    """Bits of |finetuned − base| in float32. base: float32 [n]; finetuned: any float [n]; out: float32 [≥ n]."""
    task_vector = out[: len(finetuned)].copy_(finetuned)
    task_vector.sub_(base).abs_()
    return task_vector.view(torch.int32).numpy()


class Scan:
    """base, finetuned: open checkpoints. tensors: the localized ones, as the base holds them."""

    def __init__(
        self,
        base: MappedCheckpoint,
        finetuned: Mapping[str, MappedCheckpoint],
        tensors: Sequence[TensorInfo],
        groups: Sequence[Group],
        spill_folder: Path,
        *,
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
        self._buffers = threading.local()
        self._chunk = chunk

    def run(self) -> dict[str, Selection]:
        """The mask of each finetuned model. Raises NonFiniteError."""
        bounds = {name: self._sampled_bounds(name) for name in self.finetuned}
        selections = self._pass(bounds)
        again = {name: [0] * len(self.groups) for name, sel in selections.items() if not self._settled(sel)}
        if again:
            selections |= self._pass(again)
            for name in again:
                selections[name].settle(self.workers)
        return selections

    def _settled(self, selection: Selection) -> bool:
        try:
            selection.settle(self.workers)
        except BoundTooHigh:
            return False
        return True

    def _pass(self, bounds: Mapping[str, Sequence[int]]) -> dict[str, Selection]:
        """Offer every chunk of the models named in `bounds` to their selections."""
        selections = {
            name: Selection(self._spill(name), self.names, self.chunks, self.groups, bounds[name]) for name in bounds
        }
        for_each(lambda chunk: self._offer(chunk, selections), self.chunks, self.workers)
        return selections

    def _spill(self, name: str) -> Spill:
        dtypes = {self.finetuned[name].dtype(tensor) for tensor in self.names} or {torch.float32}
        common = dtypes.pop() if len(dtypes) == 1 else torch.float64 if torch.float64 in dtypes else torch.float32
        return Spill(self.spill_folder / f"{name}.candidates", len(self.chunks), common)

    def _offer(self, chunk: Chunk, selections: Mapping[str, Selection]) -> None:
        name = self.names[chunk.tensor]
        base, out = self._two_buffers()
        base = base[: chunk.count].copy_(self.base.flat(name, chunk.first, chunk.count))
        for model, selection in selections.items():
            finetuned = self.finetuned[model].flat(name, chunk.first, chunk.count)
            differs = differing_bits(finetuned, base, out) if selection.bound(chunk) == 0 else None
            scores = magnitude_scores(finetuned, base, out)
            selection.offer(chunk, scores, None if differs is None else differs | (scores != 0), finetuned)
            if not self.allow_non_finite and selection.spill.largest[chunk.index] >= NON_FINITE:
                self._raise_non_finite(model, name)
            self.finetuned[model].release(name, chunk.first, chunk.count)
            self.advance(chunk.count * finetuned.element_size())
        self.base.release(name, chunk.first, chunk.count)

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

    def _sampled_bounds(self, model: str) -> list[int]:
        """A bound for each group. It decides how much is spilled, never what is selected."""
        budget = max(SAMPLE // max(len(self.groups), 1), SMALLEST_SAMPLE)
        bounds = []
        for tensors, k in self.groups:
            n = sum(self.tensors[tensor].numel for tensor in tensors)
            sample = [self._sample(model, self.tensors[t], min(1.0, budget / n)) for t in tensors if n > budget]
            bounds.append(sample_bound(np.concatenate(sample), k, n) if sample else 0)
        return bounds

    def _sample(self, model: str, info: TensorInfo, share: float) -> npt.NDArray[np.int32]:
        """Scores of about this share of a tensor, in short runs spread over it."""
        runs = min(int(share * info.numel / SAMPLE_RUN) + 1, info.numel // SAMPLE_RUN)
        if runs == 0:
            return np.empty(0, dtype=np.int32)
        spread = np.random.default_rng(0).random(runs) + np.arange(runs)
        starts = (spread * (info.numel - SAMPLE_RUN) / runs).astype(np.int64)
        where = torch.from_numpy((starts[:, None] + np.arange(SAMPLE_RUN)).ravel())
        base = self.base.flat(info.name, 0, info.numel)[where].float()
        finetuned = self.finetuned[model].flat(info.name, 0, info.numel)[where]
        return magnitude_scores(finetuned, base, torch.empty(len(where)))


def differing_bits(finetuned: torch.Tensor, base: torch.Tensor, out: torch.Tensor) -> npt.NDArray[np.bool_]:
    """Where finetuned, as float32, differs from base in any bit; 0.0 and −0.0 do. Shapes as magnitude_scores."""
    as_float = out[: len(finetuned)].copy_(finetuned)
    return as_float.view(torch.int32).numpy() != base.view(torch.int32).numpy()


def raise_non_finite(checkpoint: MappedCheckpoint, name: str, bad: int, numel: int) -> NoReturn:
    raise NonFiniteError(
        f"{name} in {checkpoint.where(name)} holds NaN or infinity in {bad} of {numel} places. The checkpoint is "
        "broken, or was saved in too narrow a dtype; --allow-non-finite lets such values through."
    )
