"""Whether all values of a merge are finite."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.finite import all_finite
from hf_locstitch.checkpoints.localizable import is_buffer
from hf_locstitch.checkpoints.mapped import MappedCheckpoint
from hf_locstitch.inspection.verification.report import Finding
from hf_locstitch.runtime.chunks import chunks_of

PIECE = 1 << 20  # elements looked at once


def absent_shards(weights: Checkpoint) -> list[str]:
    """The files that are not on this machine."""
    return [shard.file for shard in weights.shards if weights.source.cached(shard.file) is None]


def check_all_finite(weights: Checkpoint) -> Iterator[Finding]:
    """A finding for each tensor with NaN or infinity, among the files on this machine; buffers may hold them."""
    here = {shard.file: path for shard in weights.shards if (path := weights.source.cached(shard.file)) is not None}
    shards = tuple(shard for shard in weights.shards if shard.file in here)
    reader = MappedCheckpoint(replace(weights, shards=shards), here)
    for name, (shard, info) in weights.tensors.items():
        if shard.file in here and info.floating and not is_buffer(info):
            wrong, first = 0, -1
            for chunk in chunks_of([info.numel], PIECE):
                values = reader.values(name, chunk.first, chunk.count)
                if not all_finite(values):
                    places = np.flatnonzero(~np.isfinite(values))
                    wrong, first = wrong + len(places), first if first >= 0 else chunk.first + int(places[0])
                reader.release(name, chunk.first, chunk.count)
            if wrong:
                index = [int(i) for i in np.unravel_index(first, info.shape)]
                what, found = "the number of values that are NaN or infinite", f"{wrong} (the first at {index})"
                yield Finding("values", name, what, found, 0)
