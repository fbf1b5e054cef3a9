"""What transformers' own classes say of embeddings and heads: whether the two are one, and which tensors have as many
rows as there are tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from hf_locstitch.checkpoints.config import architecture

TIED = "tie_word_embeddings"

Shapes = dict[str, tuple[int, ...]]


def ties_head(config: Mapping[str, Any]) -> bool:
    """Whether a head that a checkpoint does not store is its embedding: as its config says, or else by the default of
    the config's class; of a class that is not known, or a config that it does not read, no."""
    stated = config.get(TIED)
    if isinstance(stated, bool):
        return stated
    made = made_config(config)
    return made is not None and bool(getattr(made, TIED, False))


def shapes_in_memory(config: Mapping[str, Any], disk: Collection[str]) -> Shapes | None:
    """The shapes that these tensors have in the model that transformers builds from a config; None if it builds none.

    disk: their names in files. Tensors that are put together of several, or unknown, are left out.
    """
    import transformers

    from hf_locstitch.tasks.empty_model import attach_conversions, empty_model
    from hf_locstitch.tasks.parameter_names import state_shapes

    made, name = made_config(config), architecture(config)
    if made is None or not hasattr(getattr(transformers, name or "AutoModel", None), "from_pretrained"):
        return None
    try:
        model = empty_model(name or "AutoModel", made, "")
        attach_conversions(model, disk)
        return state_shapes(model, disk)
    except Exception:  # whatever a class makes of a stranger's values; nobody builds that model then
        return None


def made_config(config: Mapping[str, Any]) -> Any:
    """As transformers makes it of what the file says; None if it cannot."""
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    try:
        return CONFIG_MAPPING[model_type].from_dict(dict(config))
    except Exception:  # whatever a class makes of a stranger's values
        return None
