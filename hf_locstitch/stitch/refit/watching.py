"""What passes through a model see of it: its padding, its last hidden states, its blocks, and its stacked experts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hf_locstitch.stitch.refit.passes import Pass
from hf_locstitch.stitch.refit.stops import ExpertsStop
from hf_locstitch.stitch.refit.weights import Part, part_of


def watch(model: Any) -> frozenset[str]:
    """Make passes through a model see its padding, last hidden states and blocks, and stop before stacked experts.
    Returns the names of their parameters."""
    model.register_forward_pre_hook(_note_padding, with_kwargs=True)
    _last_states(model).register_forward_hook(_note_hidden)
    stacked: set[str] = set()
    for module in model.modules():
        if stacks := _stacked_experts(module):
            module.forward = _stopping(module.forward, stacks)
            stacked |= {stack.parameter for stack in stacks}
    for name, block in _blocks(model).items():
        block.forward = _twice(block.forward, name)
    return frozenset(stacked)


def _last_states(model: Any) -> Any:
    """The module that gives the last hidden states: the decoder, where it stands beside the head."""
    beside = model.base_model is model and getattr(model.config, "is_encoder_decoder", False)
    return model.get_decoder() if beside else model.base_model


def _blocks(model: Any) -> dict[str, Any]:
    """The transformer blocks by name: the innermost modules that transformers can checkpoint; none in models that it
    cannot."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = {name: one for name, one in model.named_modules() if isinstance(one, GradientCheckpointingLayer)}
    return {name: one for name, one in found.items() if not any(other.startswith(f"{name}.") for other in found)}


def _twice(forward: Callable[..., Any], name: str) -> Callable[..., Any]:
    """See Pass.in_blocks."""

    def running(*args: Any, **kwargs: Any) -> Any:
        here = Pass.current()
        if here is None or here.in_blocks is None:
            return forward(*args, **kwargs)
        copies = tree_map(_copied, (args, kwargs))  # a block may add to its input in place
        with here.inside_block(name):
            forward(*copies[0], **copies[1])
        del copies
        with here.straight():
            return forward(*args, **kwargs)

    return running


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.is_floating_point() else value


def _stacked_experts(module: Any) -> tuple[Part, ...]:
    """The parameters [experts, …, …] of a module that routes tokens to its own experts; empty for other modules."""
    own = [part for parameter in module.parameters(recurse=False) if (part := part_of(parameter)) is not None]
    if not {"top_k_index", "top_k_weights"} <= set(inspect.signature(module.forward).parameters):
        return ()
    return tuple(part for part in own if part.dim == 3)


def _note_padding(_: Any, __: Any, kwargs: Mapping[str, Any]) -> None:
    here = Pass.current()
    masks = [kwargs.get("attention_mask"), kwargs.get("decoder_attention_mask")]
    if here is not None:
        here.inside = [mask.bool() for mask in masks if isinstance(mask, Tensor) and mask.dim() == 2]


def _note_hidden(_: Any, __: Any, output: Any) -> None:
    here, hidden = Pass.current(), getattr(output, "last_hidden_state", None)
    if here is not None and isinstance(hidden, Tensor):
        here.hidden = hidden


def _stopping(forward: Callable[..., Tensor], stacks: tuple[Part, ...]) -> Callable[..., Tensor]:
    parameters = inspect.signature(forward)

    def stopping(*args: Any, **kwargs: Any) -> Tensor:
        here = Pass.current()
        if here is None or not all(stack.parameter in here.stops for stack in stacks):
            return forward(*args, **kwargs)
        bound = dict(parameters.bind(*args, **kwargs).arguments)
        hidden, index = bound.pop("hidden_states"), bound.pop("top_k_index")
        shares = bound.pop("top_k_weights")

        def alone(expert: int, tokens: Tensor) -> Tensor:
            routed = torch.full((len(tokens), 1), expert, dtype=index.dtype, device=index.device)
            return forward(tokens, routed, torch.ones(len(tokens), 1, dtype=shares.dtype, device=index.device), **bound)

        here.ask(ExpertsStop(stacks, hidden.reshape(-1, hidden.shape[-1]), index, alone))
        with here.straight():
            return forward(hidden, index, shares, **bound)

    return stopping
