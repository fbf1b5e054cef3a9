"""An adapter's weights, a tensor at a time: entries of sparse matrices, and whole parameters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hf_locstitch.checkpoints.tensors import TORCH_DTYPE
from hf_locstitch.checkpoints.writer import SafetensorsWriter
from hf_locstitch.exports.adapter_layout import (
    AdapterLayout,
    SparseLayer,
    WholeModule,
    indices_key,
    weight_key,
    whole_key,
)
from hf_locstitch.exports.form import MADE_OF
from hf_locstitch.tasks.parameter_names import Group, from_disk

if TYPE_CHECKING:
    from hf_locstitch.artifacts.mask_file import Positions
    from hf_locstitch.exports.changes import Changes
    from hf_locstitch.runtime.progress import Progress


def write_weights(path: Path, layout: AdapterLayout, changes: Changes, progress: Progress) -> int:
    """Write the file. Returns how many weights PEFT will compute that differ from the changed ones."""
    inexact, metadata = 0, {"format": "pt", MADE_OF: changes.record.fingerprint}
    with (
        SafetensorsWriter(path, layout.specs, metadata) as writer,
        progress.bar("exporting", layout.nbytes) as advance,
    ):

        def write(name: str, values: Tensor) -> None:
            content = values.contiguous().view(torch.uint8).numpy()
            writer.write(name, content.data)
            advance(content.nbytes)

        for layer in layout.sparse:
            before, after = changes.read(layer.tensor)
            at = padded(changes.positions(layer.tensor), layer.sizes.entries(layout.rank))
            deltas, off = deltas_at(before, after, torch.from_numpy(at))
            inexact += off
            write(weight_key(layer), deltas)
            write(indices_key(layer), _indices(layer, at))
        for module in layout.whole:
            for local, values in _whole(module, layout, changes):
                write(whole_key(module, local), values)
    return inexact


def padded(positions: Positions, count: int) -> Positions:
    """These positions and the first others, `count` in all. Returns int64 [count], ascending."""
    others = np.setdiff1d(np.arange(count), positions, assume_unique=True)
    return np.sort(np.concatenate([positions, others[: count - len(positions)]]))


def deltas_at(before: Tensor, after: Tensor, at: Tensor) -> tuple[Tensor, int]:
    """What to add to get from one to the other. before, after: [n]. at: positions, int64 [m].

    Returns float32 [m], and for how many the sum, as PEFT computes it, is another value.
    """
    start, goal = before[at].float(), after[at].float()
    deltas = torch.where(start == goal, -0.0, goal - start)  # to add 0.0 would turn −0.0 into 0.0
    made, due = (start + deltas).to(before.dtype), after[at]
    return deltas, int(((made != due) & ~(made.isnan() & due.isnan())).sum())


def _indices(layer: SparseLayer, at: Positions) -> Tensor:
    """Rows and columns [2, m]."""
    indices = np.stack(np.divmod(at, layer.sizes.columns))
    return torch.from_numpy(indices.astype(np.int16 if layer.sizes.index_bytes == 2 else np.int32))


def _whole(module: WholeModule, layout: AdapterLayout, changes: Changes) -> Iterator[tuple[str, Tensor]]:
    """A module's parameters as changed, in the base's dtypes."""
    made: dict[Group, dict[str, Tensor]] = {}
    for local, parameter in module.parameters.items():
        group = _changed(layout.skeleton.groups[parameter], changes)
        if group not in made:
            made[group] = _parameters(group, layout, changes)
        yield local, made[group][parameter]


def _changed(groups: list[Group], changes: Changes) -> Group:
    """Of those that form a parameter, which may be stored twice: the one that is changed."""
    return next((group for group in groups if not changes.ones.keys().isdisjoint(group.disk)), groups[0])


def _parameters(group: Group, layout: AdapterLayout, changes: Changes) -> dict[str, Tensor]:
    """canonical name -> [*shape]."""

    def read(name: str) -> Tensor:
        return changes.read(name)[1].view(changes.base.info(name).shape)

    shapes = layout.skeleton.shapes
    if group.direct:
        return {group.parameters[0]: read(group.disk[0]).reshape(shapes[group.parameters[0]])}
    values = from_disk(layout.skeleton.model, group, read)
    return {name: value.to(TORCH_DTYPE[layout.dtype(name)]) for name, value in values.items()}
