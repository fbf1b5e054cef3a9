"""Finding the candidates of a chunk on a device, bit for bit as the CPU does."""

from __future__ import annotations

import threading

import torch

from hf_locstitch.checkpoints.tensors import as_tensor
from hf_locstitch.localize.bracket import Bracket
from hf_locstitch.localize.candidates import Candidates, candidates_at
from hf_locstitch.runtime.dtypes import Values


class OnDevice:
    """OnCpu on `device`. Every thread has its own stream, so that its copies overlap with other threads' arithmetic."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._local = threading.local()

    def begin(self, base: Values) -> None:
        with self._stream():
            self._local.original = self._bring(base)

    def find(self, finetuned: Values, bracket: Bracket) -> tuple[Candidates, int]:
        with self._stream():
            values, original = self._bring(finetuned), self._local.original
            scores = (values.float() - original.float()).abs_().view(torch.int32)
            reach = scores >= bracket.low if bracket.low else _differing(values, original)
            positions = reach.nonzero().flatten()
            return candidates_at(positions.cpu().numpy(), scores[positions].cpu().numpy(), finetuned, bracket.high)

    def _bring(self, values: Values) -> torch.Tensor:
        if self._device.type != "cuda":
            return as_tensor(values).to(self._device)
        return as_tensor(values).pin_memory().to(self._device, non_blocking=True)

    def _stream(self) -> torch.cuda.StreamContext:
        if self._device.type == "cuda" and not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self._device)
        return torch.cuda.stream(getattr(self._local, "stream", None))


def _differing(finetuned: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """As candidates.differing."""
    if finetuned.dtype != base.dtype:
        finetuned, base = finetuned.double(), base.double()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[base.element_size()]
    return finetuned.view(integer) != base.view(integer)
