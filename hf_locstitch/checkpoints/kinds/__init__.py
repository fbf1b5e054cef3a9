"""The kinds of checkpoint, one file each, and those of other packages (entry points hf_locstitch.checkpoint_kinds)."""

from __future__ import annotations

from hf_locstitch.checkpoints.kind import CheckpointKind
from hf_locstitch.runtime.registry import Registry

KINDS: Registry[CheckpointKind] = Registry(__name__, __path__, "hf_locstitch.checkpoint_kinds")
