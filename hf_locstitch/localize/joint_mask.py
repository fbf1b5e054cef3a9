"""A joint mask: the magnitude mask of the dense solution of the refit without data, the same for all finetunes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from hf_locstitch.artifacts.mask_source import MaskedValues, MaskSource
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.localize.job import LocalizeJob
from hf_locstitch.localize.scan import Scan
from hf_locstitch.runtime.chunks import Chunk
from hf_locstitch.runtime.dtypes import Values
from hf_locstitch.stitch.dataless.fit import dataless_folder
from hf_locstitch.stitch.dataless.solve import DatalessJob, DatalessSolver, DenseSolution

JOINT = "joint"


class JointMask:
    """The mask with the values of one finetune. Safe to share between threads."""

    def __init__(self, mask: MaskSource, finetuned: CheckpointReader) -> None:
        self._mask, self._finetuned = mask, finetuned

    @property
    def names(self) -> Sequence[str]:
        return self._mask.names

    @property
    def chunks(self) -> Sequence[Chunk]:
        return self._mask.chunks

    @property
    def ones(self) -> int:
        return self._mask.ones

    def kept(self, chunk: Chunk) -> MaskedValues:
        """The mask and the finetuned values in one chunk."""
        name, positions = self.names[chunk.tensor], self._mask.kept(chunk).positions
        values = self._finetuned.values(name, chunk.first, chunk.count)[positions]
        self._finetuned.release(name, chunk.first, chunk.count)
        return MaskedValues(positions, values)

    def close(self) -> None:
        self._mask.close()


def find_joint_mask(job: LocalizeJob, device: str) -> Mapping[str, MaskSource]:
    """The same mask for each finetune, by name. Raises RequestError or WorkError."""
    readers = job.inputs.fetch().readers
    folder = dataless_folder(job.folder)
    solver = DatalessSolver(
        DatalessJob(readers, job.order, job.tensors, folder, device, job.settings, job.processes, job.progress)
    )
    dense = solver.solve()
    with Scan(
        job.base,
        {JOINT: _Dense(dense)},  # pyright: ignore[reportArgumentType]
        job.tensors,
        job.groups,
        job.folder,
        own=job.own,
        processes=job.processes,
        chunk=job.settings.chunk,
        workers=job.settings.workers,
    ) as scan:
        mask = scan.select({"base": _Zero(), JOINT: _Dense(dense)})[JOINT]  # pyright: ignore[reportArgumentType]
    return {name: JointMask(mask, readers[name]) for name in job.finetuned}


class _Zero:
    """As the base of D, which is a change already."""

    def values(self, name: str, first: int, count: int) -> Values:
        return np.zeros(count, dtype=np.float32)

    def release(self, name: str, first: int, count: int) -> None:
        """Nothing is held."""


class _Dense(_Zero):
    """D, as a scan reads a finetune."""

    def __init__(self, dense: DenseSolution) -> None:
        self._dense = dense

    def values(self, name: str, first: int, count: int) -> Values:
        return self._dense.part(name, first, count) + np.float32(0)  # −0 is no change

    def info(self, name: str) -> Any:
        return SimpleNamespace(dtype="F32")

    @property
    def layout(self) -> Any:
        """It is read as it lies on the disk, not computed."""
        return self
