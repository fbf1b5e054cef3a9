"""Writing the finetuned values under a mask: one dense row a tensor, at places that are known once all are counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hf_locstitch.artifacts.mask_source import MaskSource
from hf_locstitch.checkpoints.header import TensorSpec
from hf_locstitch.checkpoints.writer import SafetensorsWriter
from hf_locstitch.runtime.chunks import Chunk, for_each
from hf_locstitch.runtime.dtypes import DTYPE, ITEM_BYTES

FORMAT = "hf-locstitch values 1"


def values_metadata(name: str, base: str, finetuned: str) -> dict[str, str]:
    """What a file of values says about itself. base, finetuned: pinned."""
    return {"format": FORMAT, "name": name, "base": base, "finetuned": finetuned}


@dataclass(frozen=True)
class Layout:
    """ones: of each chunk [chunks]. dtypes: tensor -> on disk."""

    names: Sequence[str]
    chunks: Sequence[Chunk]
    ones: npt.NDArray[np.int64]
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


def count_kept(mask: MaskSource, own: Sequence[Chunk], workers: int) -> npt.NDArray[np.int64]:
    """Ones of the chunks `own`. Returns [chunks]."""
    counts = np.zeros(len(mask.chunks), dtype=np.int64)

    def count(chunk: Chunk) -> None:
        counts[chunk.index] = len(mask.kept(chunk).positions)

    for_each(count, own, workers)
    return counts


def write_values(
    writer: SafetensorsWriter,
    layout: Layout,
    mask: MaskSource,
    own: Sequence[Chunk],
    workers: int,
    advance: Callable[[int], object],
) -> None:
    """Put the values of the chunks `own` into a file laid out before."""
    starts = layout.starts

    def write(chunk: Chunk) -> None:
        name = layout.names[chunk.tensor]
        values = mask.kept(chunk).values.astype(DTYPE[layout.dtypes[name]], copy=False)
        writer.write(name, values.view(np.uint8).data, int(starts[chunk.index]) * values.itemsize)
        advance(values.nbytes)

    for_each(write, own, workers)
