"""Models that use the same layers several times in a pass, as an Albert does."""

from __future__ import annotations

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.sizes import find_size


def shared_layers(checkpoint: Checkpoint) -> str | None:
    """That a model does so, as a clause with what says so in its config; None if it does not."""
    groups, layers = (find_size(checkpoint.config, name) for name in ("num_hidden_groups", "num_hidden_layers"))
    if not 0 < groups < layers:
        return None
    return (
        f"{checkpoint.label} uses each of its layers several times in a pass (num_hidden_groups: {groups}, "
        f"num_hidden_layers: {layers})"
    )
