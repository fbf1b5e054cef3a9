"""Writing the finetuned values under a mask: one dense row a tensor, at places that are known once all are counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_locstitch.artifacts.mask_source import MaskedValues, MaskSource
from hf_locstitch.checkpoints.header import TensorSpec
from hf_locstitch.checkpoints.writer import SafetensorsWriter
from hf_locstitch.runtime.chunks import Chunk, for_each
from hf_locstitch.runtime.dtypes import DTYPE, ITEM_BYTES, Values

FORMAT = "hf-locstitch values 1"


def values_metadata(name: str, base: str, finetuned: str) -> dict[str, str]:
    """What a file of values says about itself. base, finetuned: pinned."""
    return {"format": FORMAT, "name": name, "base": base, "finetuned": finetuned}


@dataclass(frozen=True)
class Layout:
    """ones, unchanged: of each chunk [chunks]; unchanged ones are taken from the base. dtypes: tensor -> on disk."""

    names: Sequence[str]
    chunks: Sequence[Chunk]
    ones: npt.NDArray[np.int64]
    unchanged: npt.NDArray[np.int64]
    dtypes: dict[str, str]

    @property
    def entries(self) -> list[TensorSpec]:
        """As a file's header has them. Wide dtypes first: then every value lies at a multiple of its size."""
        totals = dict.fromkeys(self.names, 0)
        for chunk, ones in zip(self.chunks, self.ones.tolist(), strict=True):
            totals[self.names[chunk.tensor]] += ones
        items = {name: ITEM_BYTES[self.dtypes[name]] for name in self.names}
        ordered = sorted(self.names, key=lambda name: -items[name])
        return [TensorSpec(name, self.dtypes[name], (totals[name],), totals[name] * items[name]) for name in ordered]

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """Ones of the same tensor before each chunk [chunks]."""
        before = np.cumsum(self.ones) - self.ones
        first = {chunk.tensor: before[chunk.index] for chunk in reversed(self.chunks)}
        return before - np.array([first[chunk.tensor] for chunk in self.chunks], dtype=np.int64)


def count_kept(selection: MaskSource, own: Sequence[Chunk], workers: int) -> npt.NDArray[np.int64]:
    """Ones, and how many of them are unchanged, of the chunks `own`. Returns [2, chunks]."""
    counts = np.zeros((2, len(selection.chunks)), dtype=np.int64)

    def count(chunk: Chunk) -> None:
        kept = selection.kept(chunk)
        counts[:, chunk.index] = len(kept.positions) + len(kept.unchanged), len(kept.unchanged)

    for_each(count, own, workers)
    return counts


def values_of(kept: MaskedValues, base: Values | None, dtype: np.dtype[Any]) -> Values:
    """Finetuned values of all that is kept of a chunk, in ascending order. Returns [ones] in `dtype`.

    base: the chunk [n]; None if no value is the base's.
    """
    values = kept.values.astype(dtype, copy=False)
    if base is None:
        return values
    order = np.argsort(np.concatenate([kept.positions, kept.unchanged]), kind="stable")
    same = base[kept.unchanged].astype(dtype, copy=False)
    return np.concatenate([values, same])[order]


def write_values(
    writer: SafetensorsWriter,
    layout: Layout,
    selection: MaskSource,
    own: Sequence[Chunk],
    base_of: Callable[[str, Chunk], Values],
    workers: int,
    advance: Callable[[int], object],
) -> None:
    """Put the values of the chunks `own` into a file laid out before. base_of: a chunk of a tensor of the base."""
    starts = layout.starts

    def write(chunk: Chunk) -> None:
        name = layout.names[chunk.tensor]
        base = base_of(name, chunk) if layout.unchanged[chunk.index] else None
        values = values_of(selection.kept(chunk), base, DTYPE[layout.dtypes[name]])
        writer.write(name, values.view(np.uint8).data, int(starts[chunk.index]) * values.itemsize)
        advance(values.nbytes)

    for_each(write, own, workers)
