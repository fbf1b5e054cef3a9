"""Models whose repos bring Python code of their own: it is never run."""

from __future__ import annotations

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.errors import CheckpointError

NEVER_RUN = "it needs Python code from its own repo, which is never run"


def refuse_custom_code(checkpoint: Checkpoint, purpose: str) -> None:
    """Raises CheckpointError if transformers has no code of its own for the model. purpose: what would load it.

    Such a model can be merged all the same where nothing loads it: its code goes along with the other files.
    """
    model_type = checkpoint.config.get("model_type")
    if not checkpoint.config.get("auto_map"):
        return
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"transformers has no model of type {model_type!r}, so {purpose} cannot load {checkpoint.label}: "
            f"{NEVER_RUN}. A merge by magnitude, without data and without evaluation, does not load it."
        )


def load_failure(error: Exception) -> str:
    """Why transformers could not load something, in one line, without its advice to trust the repo's code."""
    text = " ".join(str(error).split())
    return NEVER_RUN if "trust_remote_code" in text else text[:300]
