"""From a ref to a checkpoint, of whatever kind."""

from __future__ import annotations

from hf_locstitch.checkpoints.checkpoint import INDEX, SINGLE, Checkpoint, open_source
from hf_locstitch.checkpoints.kinds import KINDS
from hf_locstitch.checkpoints.ref import Ref
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.errors import CheckpointError


def open_checkpoint(ref: Ref) -> Checkpoint:
    """Read the headers (and nothing else) of what `ref` names. Raises CheckpointError."""
    return read_checkpoint(open_source(ref))


def read_checkpoint(source: Source) -> Checkpoint:
    """Likewise. Raises CheckpointError."""
    for kind in sorted(KINDS.all(), key=lambda kind: kind.rank):
        if kind().matches(source.files):
            return kind().read(source)
    raise CheckpointError(f"{source.label} holds no weights (no {SINGLE}, no {INDEX}). Check the name.")
