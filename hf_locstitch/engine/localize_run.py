"""Carries out a plan that ends in a localized checkpoint: as a merge, but for what is written in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_locstitch.artifacts.mask_source import MaskedValues, MaskSource
from hf_locstitch.artifacts.overlap import Overlap
from hf_locstitch.artifacts.values_file import Layout, count_kept, write_values
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.checkpoints.source import file_sha256
from hf_locstitch.checkpoints.writer import SafetensorsWriter
from hf_locstitch.engine.inputs import Inputs
from hf_locstitch.engine.run import Run, localize
from hf_locstitch.engine.work_dir import ShardRecord
from hf_locstitch.plan.plans import LocalizePlan
from hf_locstitch.runtime.chunks import Chunk
from hf_locstitch.stitch.view import StitchView

if TYPE_CHECKING:
    from hf_locstitch.stitch.fitted_values import FittedValues


class LocalizeRun(Run[LocalizePlan]):
    """Writes the values under the one mask, and nothing of the model beside them."""

    def find_masks(self, inputs: Inputs) -> Mapping[str, MaskSource]:
        return localize(self, inputs)

    def view(
        self,
        readers: Mapping[str, CheckpointReader],
        masks: Mapping[str, MaskSource],
        fitted: FittedValues | None = None,
    ) -> StitchView:
        """Values are kept in the finetuned dtypes."""
        plan = self.plan
        finetuned = next(iter(plan.finetuned.values()))
        return StitchView(
            method=plan.recipe.method,
            scale=1.0,
            base=readers["base"],
            unmasked=readers["base"],
            finetuned=[],
            masks=list(masks.values()),
            dtypes={info.name: finetuned.info(info.name).dtype for info in plan.mask_tensors},
            tensors=plan.mask_tensors,
            chunk=self.settings.chunk,
            fitted=fitted,
        )

    def write_shards(
        self, inputs: Inputs, masks: Mapping[str, MaskSource], background: ThreadPoolExecutor
    ) -> tuple[Overlap, dict[str, ShardRecord]]:
        del inputs, background  # the values lie with the mask, in one file with little to overlap its hashing with
        (shard,) = self.plan.shards
        ((name, mask),) = masks.items()
        if self.fitted is not None:
            mask = FittedMask(mask, self.fitted)
        path = self.work.stage / shard.file
        own = [chunk for chunk in mask.chunks if mask.names[chunk.tensor] in self.own]
        layout = self._layout(name, mask, own)

        def lay_out() -> None:
            path.parent.mkdir(exist_ok=True)
            SafetensorsWriter(path, layout.entries, shard.metadata).close()

        self.processes.on_first(lay_out)
        nbytes = sum(spec.nbytes for spec in layout.entries if spec.name in self.own)
        with self.progress.bar("writing", nbytes) as advance:

            def write() -> None:
                with SafetensorsWriter(path, layout.entries, shard.metadata, new=False) as writer:
                    write_values(writer, layout, mask, own, self.settings.workers, advance)

            self.processes.together(write)
        overlap = _with_nothing(self.plan.n, mask.ones)
        return overlap, {shard.file: _record(path, overlap)} if self.first else {}

    def _layout(self, name: str, mask: MaskSource, own: Sequence[Chunk]) -> Layout:
        counted = self.processes.together(lambda: count_kept(mask, own, self.settings.workers))
        ones, finetuned = self.processes.sum(counted), self.plan.inputs[name]
        dtypes = {tensor: finetuned.info(tensor).dtype for tensor in mask.names}
        return Layout(mask.names, mask.chunks, ones, dtypes)


class FittedMask:
    """A mask with values that were fitted in place of the finetuned ones, where there are such."""

    def __init__(self, mask: MaskSource, fitted: FittedValues) -> None:
        self.names, self.chunks, self.ones, self.close = mask.names, mask.chunks, mask.ones, mask.close
        self._mask, self._fitted = mask, fitted
        self._first = {chunk.tensor: chunk.index for chunk in reversed(mask.chunks)}

    def kept(self, chunk: Chunk) -> MaskedValues:
        """The mask and the values in one chunk."""
        kept, name = self._mask.kept(chunk), self.names[chunk.tensor]
        if name not in self._fitted:
            return kept
        return replace(kept, values=self._fitted.chunk(name, chunk.index - self._first[chunk.tensor]))


def _with_nothing(n: int, ones: int) -> Overlap:
    """Of one mask alone."""
    return Overlap(np.array([n - ones, ones]), np.array([[ones]]))


def _record(path: Path, overlap: Overlap) -> ShardRecord:
    return ShardRecord(file_sha256(path), path.stat().st_size, overlap.covered.tolist(), overlap.pairs.tolist())
