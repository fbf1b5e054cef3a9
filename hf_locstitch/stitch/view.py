"""Merged values, chunk by chunk, from the base, the masks, the method, the order of the finetunes and the dtypes.

The engine reads them to write shards; a refit starts from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_locstitch.artifacts.mask_source import MaskedValues, MaskSource
from hf_locstitch.artifacts.overlap import Overlap
from hf_locstitch.checkpoints.finite import check_finite, check_fits
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.localizable import is_buffer
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.runtime.chunks import Chunk, chunks_by_name, chunks_of
from hf_locstitch.runtime.dtypes import DTYPE, Values
from hf_locstitch.stitch.mean import coverage, overlaps
from hf_locstitch.stitch.method import Context, DenseMethod, MaskedMethod, Method, Place, TensorMethod
from hf_locstitch.stitch.per_tensor import NO_WEIGHTS, Weights

if TYPE_CHECKING:
    from hf_locstitch.stitch.fitted_values import FittedValues  # imports torch


@dataclass(frozen=True)
class StitchView:
    """base, unmasked: readers; unmasked provides the tensors that are not merged. finetuned, masks: in summation order;
    a masked method needs no readers of the finetuned models, a dense one no masks. dtypes: of the output, by tensor.
    tensors: those that are merged. chunk: elements. fitted:
    values that replace those of the method. weights: of the finetuned, for methods that take any.
    """

    method: Method
    scale: float
    base: CheckpointReader
    unmasked: CheckpointReader
    finetuned: Sequence[CheckpointReader]
    masks: Sequence[MaskSource]
    dtypes: Mapping[str, str]
    tensors: Sequence[TensorInfo]
    chunk: int
    allow_non_finite: bool = False
    fitted: FittedValues | None = None
    weights: Weights = NO_WEIGHTS

    @cached_property
    def chunks(self) -> Mapping[str, Sequence[Chunk]]:
        """The chunks of each merged tensor, in order: one of each for a method that takes whole tensors."""
        numels = [info.numel for info in self.tensors]
        whole = isinstance(self.method, TensorMethod)
        pieces = chunks_of(numels, max([1, *numels]) if whole else self.chunk)
        return chunks_by_name([info.name for info in self.tensors], pieces)

    def kept(self, chunk: Chunk) -> list[MaskedValues]:
        """What each mask keeps of a chunk."""
        return [mask.kept(chunk) for mask in self.masks]

    def merge(self, tensor: str, chunk: Chunk) -> tuple[Values, Overlap | None]:
        """The merged values of a chunk [n] in the output's dtype, and how the masks overlap there, if there are any.

        Raises NonFiniteError.
        """
        merged, overlap = self._merged(tensor, chunk, DTYPE[self.dtypes[tensor]])
        if not self._may_be_infinite(self.base, tensor):
            check_fits(tensor, chunk, merged, lambda: self._merged(tensor, chunk, np.dtype(np.float64))[0])
        for reader in (self.base, *self.finetuned):
            reader.release(tensor, chunk.first, chunk.count)
        return merged, overlap

    def _merged(self, tensor: str, chunk: Chunk, dtype: np.dtype[Any]) -> tuple[Values, Overlap | None]:
        with np.errstate(over="ignore", invalid="ignore"):  # checked above, with a clearer message
            if isinstance(self.method, MaskedMethod):
                return self._merge_masked(self.method, tensor, chunk, dtype)
            if isinstance(self.method, TensorMethod):
                return self._merge_tensor(self.method, tensor, chunk, dtype), None
            assert isinstance(self.method, DenseMethod)
            return self._merge_dense(self.method, tensor, chunk, dtype), None

    def values(self, tensor: str, chunk: Chunk) -> Values:
        """The merged values alone."""
        return self.merge(tensor, chunk)[0]

    def _merge_masked(
        self, method: MaskedMethod, tensor: str, chunk: Chunk, dtype: np.dtype[Any]
    ) -> tuple[Values, Overlap]:
        kept = self.kept(chunk)
        covered = coverage(chunk.count, kept)
        overlap = Overlap(*overlaps(covered, kept))
        base = self.base.values(tensor, chunk.first, chunk.count)
        if self.fitted is not None and tensor in self.fitted:
            merged = base.astype(dtype)
            number = chunk.index - self.chunks[tensor][0].index
            merged[np.flatnonzero(covered.times)] = self.fitted.chunk(tensor, number)
        else:
            merged = method.combine(base, kept, covered, self._context(tensor, chunk, dtype))
        return merged, overlap

    def _merge_dense(self, method: DenseMethod, tensor: str, chunk: Chunk, dtype: np.dtype[Any]) -> Values:
        base = self.checked(self.base, tensor, chunk)
        context = self._context(tensor, chunk, dtype)
        if self.fitted is not None and tensor in self.fitted:
            finetuned, context = [self.fitted.values(tensor, chunk.first, chunk.count)], replace(context, weights=[1.0])
        else:
            finetuned = [self.checked(reader, tensor, chunk) for reader in self.finetuned]
        return method.combine(base, finetuned, context)

    def _merge_tensor(self, method: TensorMethod, tensor: str, chunk: Chunk, dtype: np.dtype[Any]) -> Values:
        """chunk: all of the tensor."""
        shape = self.base.checkpoint.info(tensor).shape or (1,)
        base, *finetuned = [
            self.checked(reader, tensor, chunk).reshape(shape) for reader in (self.base, *self.finetuned)
        ]
        merged = method.merge(base, finetuned, self._context(tensor, chunk, dtype))
        return np.ascontiguousarray(merged).reshape(-1)

    def _context(self, tensor: str, chunk: Chunk, dtype: np.dtype[Any]) -> Context:
        return Context(self.weights.of(tensor), Place(tensor, chunk.first), self.scale, dtype)

    def copied(self, tensor: str, chunk: Chunk) -> Values:
        """The values of a chunk that is not merged, in the output's dtype. Raises NonFiniteError."""
        values = self.checked(self.unmasked, tensor, chunk)
        with np.errstate(over="ignore", invalid="ignore"):
            written = values.astype(DTYPE[self.dtypes[tensor]], copy=False)
        if not self._may_be_infinite(self.unmasked, tensor):
            check_fits(tensor, chunk, written, lambda: values.astype(np.float64))
        return written

    def _may_be_infinite(self, model: CheckpointReader, tensor: str) -> bool:
        """Whether infinite values are let through: if the recipe says so, and in buffers, such as attention masks."""
        return self.allow_non_finite or is_buffer(model.checkpoint.info(tensor))

    def checked(self, model: CheckpointReader, tensor: str, chunk: Chunk) -> Values:
        """A chunk of a model. Raises NonFiniteError."""
        values = model.values(tensor, chunk.first, chunk.count)
        if not self._may_be_infinite(model, tensor):
            check_finite(model, tensor, chunk, values)
        return values
