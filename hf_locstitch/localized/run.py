"""Carries out a plan that ends in a localized checkpoint: as a merge, but for what is written in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from hf_locstitch.checkpoints.dtypes import Values
from hf_locstitch.checkpoints.source import file_sha256
from hf_locstitch.checkpoints.writer import SafetensorsWriter
from hf_locstitch.chunks import Chunk
from hf_locstitch.inputs import Inputs
from hf_locstitch.localize.selection import Keeper
from hf_locstitch.localized.values import Layout, count_kept, write_values
from hf_locstitch.merger import Overlap
from hf_locstitch.run import Run
from hf_locstitch.workplace import ShardRecord


class LocalizeRun(Run):
    """Writes the values under the one mask, and nothing of the model beside them."""

    def write_shards(
        self, inputs: Inputs, selections: Mapping[str, Keeper], background: ThreadPoolExecutor
    ) -> tuple[Overlap, dict[str, ShardRecord]]:
        del background  # there is one file, and little to overlap its hashing with
        (shard,) = self.plan.shards
        ((name, selection),) = selections.items()
        path = self.place.stage / shard.file
        own = [chunk for chunk in selection.chunks if selection.names[chunk.tensor] in self.own]
        layout = self._layout(name, selection, own)

        def lay_out() -> None:
            path.parent.mkdir(exist_ok=True)
            SafetensorsWriter(path, layout.entries, shard.metadata).close()

        self.processes.on_first(lay_out)
        same = [chunk for chunk in own if layout.unchanged[chunk.index]]
        pieces = [(selection.names[chunk.tensor], chunk.first, chunk.count) for chunk in same]
        total = sum(nbytes for _, _, _, nbytes in layout.entries)
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
        return overlap, {shard.file: _record(path, overlap)} if self._first else {}

    def _layout(self, name: str, selection: Keeper, own: Sequence[Chunk]) -> Layout:
        counted = self.processes.together(lambda: count_kept(selection, own, self.settings.workers))
        ones, unchanged = self.processes.sum(counted)
        finetuned = self.plan.finetuned[name]
        dtypes = {tensor: finetuned.info(tensor).dtype for tensor in selection.names}
        return Layout(selection.names, selection.chunks, ones, unchanged, dtypes)

    def write_side_files(self) -> None:
        """The model's are no part of a localized checkpoint."""


def _with_nothing(n: int, ones: int) -> Overlap:
    """Of one mask alone."""
    return Overlap(np.array([n - ones, ones]), np.array([[ones]]))


def _record(path: Path, overlap: Overlap) -> ShardRecord:
    return ShardRecord(file_sha256(path), path.stat().st_size, overlap.covered.tolist(), overlap.pairs.tolist())
