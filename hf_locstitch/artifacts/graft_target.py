"""A model in memory whose weights are changed in place: what it is under its wrappers, and which parameters can be.

Values are read and written at flat positions, in row-major order whatever the strides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_locstitch.errors import RequestError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # in which a weight is its own value
FOREIGN = {  # in a parameter's name: whose it is, and what to do
    "base_layer": ("PEFT adapters", "before adapters are added, or to what merge_and_unload() returns"),
    "original_module": ("PEFT adapters", "before adapters are added, or to what merge_and_unload() returns"),
    "_fsdp_wrapped_module": ("FSDP", "before the model is sharded"),
    "_flat_param": ("FSDP", "before the model is sharded"),
    "_orig_mod": ("torch.compile around a part of the model", "before that, or compile the whole model"),
    "_checkpoint_wrapped_module": ("activation checkpointing", "before the model is wrapped"),
}


def unwrapped(model: Any) -> Any:
    """The transformers model, without torch.compile or data parallelism around it.

    Raises TypeError if it is none, and RequestError if something else, such as PEFT, has changed its parameters.
    """
    from transformers import PreTrainedModel

    while (inner := _inside(model)) is not None:
        model = inner
    if isinstance(model, nn.Module):
        _check_own(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"a localized checkpoint goes into a transformers model, as from_pretrained loads it, not into "
            f"{'None' if model is None else f'a {type(model).__name__}'}."
        )
    return model


def _inside(model: Any) -> Any:
    """What a wrapper holds that leaves the parameters as they are; None if it is no such wrapper."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return model.module
    return model._modules.get("_orig_mod") if isinstance(model, nn.Module) else None


def _check_own(model: nn.Module) -> None:
    for name, _ in model.named_parameters():
        for part in FOREIGN.keys() & set(name.split(".")):
            whose, when = FOREIGN[part]
            raise RequestError(
                f"this {type(model).__name__} has parameters of {whose} (such as {name}), which a localized checkpoint "
                f"knows nothing of. Apply or remove it {when}."
            )


def unwritable(parameter: Tensor) -> str:
    """Why no values can be put into a parameter: what it is; what to do. Empty if they can."""
    kind = type(parameter.data)
    if kind.__name__ == "DTensor":
        return "is a DTensor, sharded over processes; apply and remove before the model is sharded"
    if kind is not Tensor:
        return f"is a {kind.__name__}, not a plain tensor; load the model without quantization"
    if parameter.is_meta:
        return "is on the meta device, without values; load the model so that all weights are in memory, not offloaded"
    if parameter.dtype not in FLOATS:
        return f"is quantized ({parameter.dtype}); load the model in bfloat16, float16 or float32"
    if parameter.is_inference() and not torch.is_inference_mode_enabled():
        return "was made in torch.inference_mode(), and can be changed only in it; load the model outside of it"
    if _overlaps(parameter):
        return f"has elements that share memory (strides {parameter.stride()}); replace it with a copy, its clone()"
    return ""


def _overlaps(tensor: Tensor) -> bool:
    """Whether two of its elements may lie in one place."""
    reach = 0  # from the first element to the last, of the dimensions so far
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def in_one_place(ones: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The first two, one of each side, whose elements lie in the same memory."""
    theirs = [(*_memory(tensor), name) for name, tensor in others.items()]
    for name, tensor in ones.items():
        device, start, stop = _memory(tensor)
        for where, first, last, other in theirs:
            if where == device and start < last and first < stop:
                return name, other
    return None


def _memory(tensor: Tensor) -> tuple[torch.device, int, int]:
    """The addresses from its first byte to its last; empty if it has none."""
    if unwritable(tensor):
        return tensor.device, 0, 0
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.device, tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def take(parameter: Tensor, at: Tensor) -> Tensor:
    """Its values at flat positions int64 [m]. Returns [m], on the CPU."""
    elements, index = _indexed(parameter, at)
    return elements[index].cpu()


def put(parameter: Tensor, at: Tensor, values: Tensor) -> None:
    """Write values [m] at flat positions int64 [m], in place."""
    elements, index = _indexed(parameter, at)
    elements[index] = values.to(elements.device, elements.dtype)


def _indexed(parameter: Tensor, at: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A view of the parameter, and where in it the positions are."""
    at, own = at.to(parameter.device), parameter.detach()
    return (own.view(-1), (at,)) if own.is_contiguous() else (own, torch.unravel_index(at, own.shape))
