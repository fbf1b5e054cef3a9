"""Carries out a plan that ends in a localized checkpoint: as a merge, but for what is written in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from hf_locstitch.artifacts.mask_source import MaskSource
from hf_locstitch.artifacts.overlap import Overlap
from hf_locstitch.artifacts.values_file import Layout, count_kept, write_values
from hf_locstitch.checkpoints.source import file_sha256
from hf_locstitch.checkpoints.writer import SafetensorsWriter
from hf_locstitch.engine.inputs import Inputs
from hf_locstitch.engine.run import Run, localize
from hf_locstitch.engine.work_dir import ShardRecord
from hf_locstitch.plan.plans import LocalizePlan
from hf_locstitch.runtime.chunks import Chunk
from hf_locstitch.runtime.dtypes import Values


class LocalizeRun(Run[LocalizePlan]):
    """Writes the values under the one mask, and nothing of the model beside them."""

    def find_masks(self, inputs: Inputs) -> Mapping[str, MaskSource]:
        return localize(self, inputs)

    def write_shards(
        self, inputs: Inputs, masks: Mapping[str, MaskSource], background: ThreadPoolExecutor
    ) -> tuple[Overlap, dict[str, ShardRecord]]:
        del background  # there is one file, and little to overlap its hashing with
        (shard,) = self.plan.shards
        ((name, selection),) = masks.items()
        path = self.work.stage / shard.file
        own = [chunk for chunk in selection.chunks if selection.names[chunk.tensor] in self.own]
        layout = self._layout(name, selection, own)

        def lay_out() -> None:
            path.parent.mkdir(exist_ok=True)
            SafetensorsWriter(path, layout.entries, shard.metadata).close()

        self.processes.on_first(lay_out)
        same = [chunk for chunk in own if layout.unchanged[chunk.index]]
        pieces = [(selection.names[chunk.tensor], chunk.first, chunk.count) for chunk in same]
        total = sum(spec.nbytes for spec in layout.entries)
        with (
            self.progress.bar("writing", total) as advance,
            inputs.opened({"base": pieces} if pieces else {}) as opened,
        ):

            def base_of(tensor: str, chunk: Chunk) -> Values:
                base = opened.readers["base"]
                values = base.values(tensor, chunk.first, chunk.count).copy()
                base.release(tensor, chunk.first, chunk.count)
                return values

            def write() -> None:
                with SafetensorsWriter(path, layout.entries, shard.metadata, new=False) as writer:
                    write_values(writer, layout, selection, own, base_of, self.settings.workers, advance)

            self.processes.together(write)
            opened.verify()
        overlap = _with_nothing(self.plan.n, selection.ones)
        return overlap, {shard.file: _record(path, overlap)} if self.first else {}

    def _layout(self, name: str, selection: MaskSource, own: Sequence[Chunk]) -> Layout:
        counted = self.processes.together(lambda: count_kept(selection, own, self.settings.workers))
        ones, unchanged = self.processes.sum(counted)
        finetuned = self.plan.inputs[name]
        dtypes = {tensor: finetuned.info(tensor).dtype for tensor in selection.names}
        return Layout(selection.names, selection.chunks, ones, unchanged, dtypes)


def _with_nothing(n: int, ones: int) -> Overlap:
    """Of one mask alone."""
    return Overlap(np.array([n - ones, ones]), np.array([[ones]]))


def _record(path: Path, overlap: Overlap) -> ShardRecord:
    return ShardRecord(file_sha256(path), path.stat().st_size, overlap.covered.tolist(), overlap.pairs.tolist())
