"""A model as transformers builds it, without its weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from hf_locstitch.errors import RequestError
from hf_locstitch.tasks.custom_code import load_failure

NO_SHAPES: Mapping[str, Sequence[int]] = MappingProxyType({})


def empty_model(auto_class: str, config: Any, cure: str) -> Any:
    """The model on the meta device, except its buffers, in evaluation mode.

    auto_class: of transformers, or a class of one architecture. config: of transformers; it is changed.
    Raises RequestError that ends with `cure`.
    """
    import transformers
    from accelerate import init_empty_weights

    loader = getattr(transformers, auto_class)
    automatic = hasattr(loader, "from_config")  # such as AutoModel; a class of one architecture runs its own code only
    make = partial(loader.from_config, trust_remote_code=False) if automatic else loader._from_config
    config.use_cache = False
    try:
        with init_empty_weights(include_buffers=False):
            model = make(config, dtype=torch.float32, experts_implementation="eager")
    except (ValueError, OSError, KeyError) as error:
        raise RequestError(f"{auto_class} cannot build the model ({load_failure(error)}). {cure}") from error
    model.tie_weights()
    return model.eval()


def attach_conversions(model: Any, disk: Collection[str], shapes: Mapping[str, Sequence[int]] = NO_SHAPES) -> None:
    """Attach the conversions that transformers would record on loading these tensors; parameter_names.py reverses
    them. shapes: of the tensors on disk, by name; where they are known, what is stored transposed comes back so."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict(keep_vars=True)
    patterns, transposed = set(), set()
    for name in disk:
        key, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        patterns.add(pattern)
        if name in shapes and key in state and tuple(shapes[name]) != tuple(state[key].shape):
            transposed.add(pattern)
    used = [entry for entry in renamings if entry.was_used()]
    used += [entry for entry in converters if patterns & set(entry.source_patterns)]
    turned = [entry for entry in used if transposed & set(entry.source_patterns)]
    for step in (step for entry in turned for step in getattr(entry, "operations", ())):
        if hasattr(step, "check_dims"):  # reversed, it would see the parameter's own shape and do nothing
            step.check_dims = False
    model._weight_conversions = [entry for entry in mapping if entry in used]
