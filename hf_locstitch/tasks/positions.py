"""How many tokens a model has positions for: torch refuses longer texts in the middle of the work, in its own words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from hf_locstitch.checkpoints.config import part
from hf_locstitch.errors import RecipeError
from hf_locstitch.tasks.objective import Objective

STATED = ("max_position_embeddings", "n_positions")  # keys of config.json
TABLE = re.compile(r"(?:^|\.)(?:wpe|positions_embed|embed_positions|position_embeddings?)$")
OF_IMAGES = re.compile("vision|visual|image")

AnyObjective = TypeVar("AnyObjective", bound=Objective)


def within_positions(objective: AnyObjective, config: Mapping[str, Any], label: str) -> AnyObjective:
    """The objective, on texts that the model has positions for.

    Args:
        objective: Its `max_length`, if it has one, is in tokens.
        config: The model's config.json.
        label: The model, for messages.

    Returns:
        The same objective, or one with fewer tokens where its default `max_length` is more than the model has
        positions.

    Raises:
        RecipeError: If the `max_length` that is asked for is.

    Example:
        >>> within_positions(CausalLM(), {"model_type": "gpt2", "n_positions": 128, …}, "org/gpt").max_length
        128
    """
    length = getattr(objective, "max_length", None)
    if length is None or (count := fewer_positions(objective.auto_class, config, length)) is None:
        return objective
    if "max_length" in objective.model_fields_set:
        raise RecipeError(
            f"max_length: {length} tokens are asked for, but {label} has positions for {count} only. Set max_length: "
            f"{count} or less in the data's objective ({{kind: {objective.kind}, max_length: {count}}})."
        )
    return objective.model_copy(update={"max_length": count})


def fewer_positions(auto_class: str, config: Mapping[str, Any], wanted: int) -> int | None:
    """How many tokens a text may have, if they are fewer than `wanted`; else None, as where positions are rotary or
    relative and have no end, or where that is not known.

    auto_class: of transformers, that loads the model.
    """
    if _states_enough(config, wanted):
        return None
    from hf_locstitch.tasks.empty_model import empty_model  # imports torch
    from hf_locstitch.tasks.token_shapes import made_config

    made = made_config(config)
    if made is None or getattr(made, "position_embedding_type", None) == "rotary":
        return None
    try:
        model = empty_model(auto_class, made, "")
    except Exception:  # whatever a class makes of a stranger's values; who loads the model says so
        return None
    return min((count for count in _tables(model) if count < wanted), default=None)


def _states_enough(config: Mapping[str, Any], wanted: int) -> bool:
    """Whether config.json says that there are enough, also for models that number positions after that of
    the padding."""
    parts = (config, part(config, "text_config"))
    stated = [number for one in parts for key in STATED if isinstance(number := one.get(key), int)]
    padding = config.get("pad_token_id")
    return bool(stated) and min(stated) - (padding + 1 if isinstance(padding, int) else 0) >= wanted


def _tables(model: Any) -> Iterator[int]:
    """How many positions each of a model's tables has for tokens."""
    import torch

    for name, module in model.named_modules():
        if TABLE.search(name) and isinstance(module, torch.nn.Embedding) and not OF_IMAGES.search(name):
            before = getattr(module, "offset", 0)  # rows that are no positions, as in BART
            if module.padding_idx is not None:  # positions begin after it, as in RoBERTa
                before = module.padding_idx + 1
            yield module.num_embeddings - before
            numbers = getattr(model.get_submodule(name.rpartition(".")[0]), "position_ids", None)
            if numbers is not None:  # fewer than rows, as in Nystromformer
                yield numbers.shape[-1]
    for name, buffer in model.named_buffers():  # of sines, as in GPT-J
        if TABLE.search(name) and buffer.ndim == 2 and not OF_IMAGES.search(name):
            yield len(buffer)
