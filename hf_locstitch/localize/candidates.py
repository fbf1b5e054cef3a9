"""Which elements of a chunk may belong to a mask: where scores reach a bound. On the CPU or, with equal bits, a GPU."""

from __future__ import annotations

import threading
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

Found = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def magnitude_scores(finetuned: torch.Tensor, base: torch.Tensor, out: torch.Tensor) -> npt.NDArray[np.int32]:
    """Bits of |finetuned − base| in float32. base: float32 [n]; finetuned: any float [n]; out: float32 [≥ n]."""
    task_vector = out[: len(finetuned)].copy_(finetuned)
    task_vector.sub_(base).abs_()
    return task_vector.view(torch.int32).numpy()


def reaching(scores: npt.NDArray[np.int32], finetuned: torch.Tensor, base: torch.Tensor, low: int) -> Found:
    """What Finder.find gives where the scores [n] are known. finetuned, base: [n], any float."""
    reach = scores >= low
    if low == 0:
        reach = differing(finetuned, base).numpy() | (scores != 0)
    positions = np.flatnonzero(reach)
    return positions, scores.take(positions)


class Finder(Protocol):
    """Looks at one chunk after the other; one instance for many threads."""

    def begin(self, base: torch.Tensor) -> None:
        """This thread's next chunk. base: [n], any float."""
        ...

    def find(self, finetuned: torch.Tensor, low: int) -> Found:
        """Positions [m], ascending, and scores [m] as bits, of those that reach `low`. finetuned: [n], any float.

        With a low of 0: of those that differ from the base in any bit.
        """
        ...


class OnCpu:
    """chunk: the largest n."""

    def __init__(self, chunk: int) -> None:
        self._chunk = chunk
        self._local = threading.local()

    def begin(self, base: torch.Tensor) -> None:
        local = self._local
        if not hasattr(local, "buffers"):
            local.buffers = torch.empty(self._chunk), torch.empty(self._chunk)
        local.original, local.base = base, local.buffers[0][: len(base)].copy_(base)

    def find(self, finetuned: torch.Tensor, low: int) -> Found:
        return reaching(self.scores(finetuned), finetuned, self._local.original, low)

    def scores(self, finetuned: torch.Tensor) -> npt.NDArray[np.int32]:
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

    def find(self, finetuned: torch.Tensor, low: int) -> Found:
        with self._stream():
            values, original = self._bring(finetuned), self._local.original
            scores = (values.float() - original.float()).abs_().view(torch.int32)
            reach = scores >= low if low else differing(values, original) | (scores != 0)
            positions = reach.nonzero().flatten()
            return positions.cpu().numpy(), scores[positions].cpu().numpy()

    def _bring(self, values: torch.Tensor) -> torch.Tensor:
        if self._device.type != "cuda":
            return values.to(self._device)
        return values.pin_memory().to(self._device, non_blocking=True)

    def _stream(self) -> torch.cuda.StreamContext:
        if self._device.type == "cuda" and not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self._device)
        return torch.cuda.stream(getattr(self._local, "stream", None))


def differing(finetuned: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Where two tensors [n] differ in any bit, in float64 if their dtypes differ; 0.0 and −0.0 do. Returns bool [n]."""
    if finetuned.dtype != base.dtype:
        finetuned, base = finetuned.double(), base.double()
    integer = INTEGER[base.element_size()]
    return finetuned.view(integer) != base.view(integer)
