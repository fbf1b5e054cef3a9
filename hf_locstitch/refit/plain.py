"""The plain stitch, tensor by tensor in memory: where a refit starts from, and what it may change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import numpy as np
import torch

from hf_locstitch.checkpoints.dtypes import DTYPE
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.checkpoints.tensors import TORCH_DTYPE, as_tensor
from hf_locstitch.chunks import chunks_by_name, chunks_of
from hf_locstitch.kernels import Positions
from hf_locstitch.localize.selection import Keeper
from hf_locstitch.methods import Masked
from hf_locstitch.plan import MergePlan
from hf_locstitch.stitch import coverage


class PlainStitch:
    """readers: the inputs by name, mapped. selections: the settled masks. chunk: elements of one of their chunks."""

    def __init__(
        self,
        plan: MergePlan,
        readers: Mapping[str, CheckpointReader],
        selections: Mapping[str, Keeper],
        chunk: int,
    ) -> None:
        self.base = readers["base"]
        self._plan, self._selections = plan, selections
        self._rest = next(readers[name] for name, checkpoint in plan.inputs.items() if checkpoint is plan.rest)
        self._order = plan.order
        self._dtypes = {t.name: t.dtype for shard in plan.shards for t in shard.tensors}
        tensors = plan.localized
        pieces = chunks_of([info.numel for info in tensors], chunk)
        self._chunks = chunks_by_name([info.name for info in tensors], pieces)

    def dtype(self, name: str) -> torch.dtype:
        """Of the output."""
        return TORCH_DTYPE[self._dtypes[name]]

    def is_localized(self, name: str) -> bool:
        return name in self._chunks

    def values(self, name: str) -> torch.Tensor:
        """As it would be written, [*shape] in the output's dtype; a tensor that is not localized: uncopied."""
        if name not in self._chunks:
            info = self._rest.checkpoint.info(name)
            return self._rest.flat(name, 0, info.numel).view(info.shape).to(TORCH_DTYPE.get(self._dtypes.get(name, "")))
        info = self.base.checkpoint.info(name)
        method = self._plan.method
        assert isinstance(method, Masked)
        dtype = DTYPE[self._dtypes[name]]
        pieces = [np.empty(0, dtype)]
        for chunk in self._chunks[name]:
            kept = [self._selections[model].kept(chunk) for model in self._order]
            pieces.append(
                method.combine(
                    self.base.values(name, chunk.first, chunk.count),
                    kept,
                    coverage(chunk.count, kept),
                    scale=self._plan.recipe.scale,
                    dtype=dtype,
                )
            )
        self.release(name)
        return as_tensor(np.concatenate(pieces)).view(info.shape)

    def release(self, name: str) -> None:
        """Nobody needs to look at what was read of a tensor soon."""
        reader = self.base if name in self._chunks else self._rest
        reader.release(name, 0, reader.checkpoint.info(name).numel)

    def union(self, name: str) -> list[Positions]:
        """Positions that some mask covers, ascending, of each chunk in turn, counted from its start."""
        found = []
        for chunk in self._chunks.get(name, ()):
            kept = [selection.kept(chunk).ascending() for selection in self._selections.values()]
            found.append(_union(kept))
        return found

    def cut(self, name: str, values: torch.Tensor) -> list[torch.Tensor]:
        """The values [*shape] of a tensor that some mask covers, of each chunk in turn, in the output's dtype."""
        flat = values.reshape(-1).to(self.dtype(name))
        chunks = zip(self._chunks[name], self.union(name), strict=True)
        return [flat[torch.from_numpy(positions).long() + chunk.first] for chunk, positions in chunks]

    def covered(self, name: str) -> torch.Tensor:
        """bool [*shape]: where some mask covers. Nowhere for a tensor that is not localized."""
        info = self.base.checkpoint.info(name)
        covered = torch.zeros(info.numel, dtype=torch.bool)
        for chunk, positions in zip(self._chunks.get(name, ()), self.union(name), strict=True):
            covered[torch.from_numpy(positions).long() + chunk.first] = True
        return covered.view(info.shape)


def _union(positions: Sequence[Positions]) -> Positions:
    return reduce(np.union1d, positions)
