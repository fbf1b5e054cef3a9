"""Which elements of a chunk may be in a mask: those that reach a bracket. On the CPU or, with equal bits, a GPU."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from hf_locstitch import kernels
from hf_locstitch.kernels import SURE, Bools, Flagged, Positions, Scores, bits
from hf_locstitch.localize.bracket import Bracket

INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Candidates:
    """What may be kept of one chunk. flagged: positions [m], ascending; those above the bracket are flagged as SURE.

    values: finetuned [m]. scores: bits of the others' scores, in their order.
    """

    flagged: Flagged
    values: torch.Tensor
    scores: Scores

    @property
    def positions(self) -> Positions:
        return (self.flagged & np.uint32(SURE - 1)).view(np.int32)

    @property
    def sure(self) -> Bools:
        return self.flagged >= SURE

    def among(self, wanted: Bools) -> tuple[Positions, torch.Tensor]:
        """Positions and values of those that are sure and, of the others, the wanted ones [as scores]."""
        positions, values = np.empty(len(self.flagged) + 1, np.int32), self.values.new_empty(len(self.flagged) + 1)
        count = kernels.among(self.flagged, bits(self.values), wanted, positions, bits(values))
        return positions[:count], values[:count]

    def reaching(self, low: int) -> Candidates:
        """Those that are sure or whose scores are at least `low`."""
        enough = self.scores >= low
        chosen = ~self.sure
        chosen[chosen] = enough
        chosen |= self.sure
        return Candidates(self.flagged[chosen], self.values[torch.from_numpy(chosen)], self.scores[enough])


def magnitude_scores(finetuned: torch.Tensor, base: torch.Tensor, out: torch.Tensor) -> Scores:
    """Bits of |finetuned − base| in float32. base: float32 [n]; finetuned: any float [n]; out: float32 [≥ n]."""
    task_vector = out[: len(finetuned)].copy_(finetuned)
    task_vector.sub_(base).abs_()
    return task_vector.view(torch.int32).numpy()


class Finder(Protocol):
    """Looks at one chunk after the other; one instance for many threads."""

    def begin(self, base: torch.Tensor) -> None:
        """This thread's next chunk. base: [n], any float."""
        ...

    def find(self, finetuned: torch.Tensor, bracket: Bracket) -> tuple[Candidates, int]:
        """What reaches the bracket, and the largest score. finetuned: [n], any float.

        With a low of 0: what differs from the base in any bit. Overwritten by this thread's next.
        """
        ...


class OnCpu:
    """chunk: the largest n."""

    def __init__(self, chunk: int) -> None:
        self._chunk = chunk
        self._local = threading.local()

    def begin(self, base: torch.Tensor) -> None:
        local = self._local
        if not hasattr(local, "base"):
            local.buffers = [torch.empty(self._chunk) for _ in range(2)]
            local.flagged = np.empty(self._chunk + 1, np.uint32)
            local.chosen = torch.empty(self._chunk + 1, dtype=torch.float64)
            local.inside = np.empty(self._chunk + 1, np.int32)
        local.original, local.base = base, local.buffers[0][: len(base)].copy_(base)

    def find(self, finetuned: torch.Tensor, bracket: Bracket) -> tuple[Candidates, int]:
        return self.reaching(self.scores(finetuned), finetuned, bracket)

    def reaching(self, scores: Scores, finetuned: torch.Tensor, bracket: Bracket) -> tuple[Candidates, int]:
        """What `find` gives where the scores [n] are known."""
        local = self._local
        if bracket.low == 0:
            reach = differing(finetuned, local.original).numpy() | (scores != 0)
            return _candidates(np.flatnonzero(reach), scores[reach], finetuned, bracket.high)
        chosen = local.chosen.view(finetuned.dtype)
        count, inside, largest = kernels.reaching(
            scores, bracket.low, bracket.high, bits(finetuned), local.flagged, bits(chosen), local.inside
        )
        return Candidates(local.flagged[:count], chosen[:count], local.inside[:inside]), int(largest)

    def scores(self, finetuned: torch.Tensor) -> Scores:
        """Of all n elements; overwritten by this thread's next."""
        return magnitude_scores(finetuned, self._local.base, self._local.buffers[1])


class OnDevice:
    """The same on `device`. Every thread has a stream of its own: its copies overlap with others' arithmetic."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._local = threading.local()

    def begin(self, base: torch.Tensor) -> None:
        with self._stream():
            self._local.original = self._bring(base)

    def find(self, finetuned: torch.Tensor, bracket: Bracket) -> tuple[Candidates, int]:
        with self._stream():
            values, original = self._bring(finetuned), self._local.original
            scores = (values.float() - original.float()).abs_().view(torch.int32)
            reach = scores >= bracket.low if bracket.low else differing(values, original) | (scores != 0)
            positions = reach.nonzero().flatten()
            return _candidates(positions.cpu().numpy(), scores[positions].cpu().numpy(), finetuned, bracket.high)

    def _bring(self, values: torch.Tensor) -> torch.Tensor:
        if self._device.type != "cuda":
            return values.to(self._device)
        return values.pin_memory().to(self._device, non_blocking=True)

    def _stream(self) -> torch.cuda.StreamContext:
        if self._device.type == "cuda" and not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self._device)
        return torch.cuda.stream(getattr(self._local, "stream", None))


def _candidates(positions: np.ndarray, scores: Scores, finetuned: torch.Tensor, high: int) -> tuple[Candidates, int]:
    """Of those at `positions` [m], whose scores [m] reach the bracket; and the largest score."""
    sure = scores >= high
    flagged = positions.astype(np.uint32)
    flagged[sure] |= np.uint32(SURE)
    values = finetuned.index_select(0, torch.from_numpy(positions))
    return Candidates(flagged, values, scores[~sure]), int(scores.max(initial=0))


def differing(finetuned: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Where two tensors [n] differ in any bit, in float64 if their dtypes differ; 0.0 and −0.0 do. Returns bool [n]."""
    if finetuned.dtype != base.dtype:
        finetuned, base = finetuned.double(), base.double()
    integer = INTEGER[base.element_size()]
    return finetuned.view(integer) != base.view(integer)
