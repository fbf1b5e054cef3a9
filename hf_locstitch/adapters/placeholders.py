"""Stand-ins for weights: of the right shape, without memory, and such that any use of their values shows.

Each is a single NaN. What is computed from it is NaN, too, unless a comparison or an index was made of it on the way:
that is watched for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Calls that make plain numbers of a tensor.
TO_NUMBERS = ("item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "equal", "allclose")
# Copies of the base's own values that PEFT keeps to undo a merge, and never merges.
NOT_MERGED = ("trainable_tokens_original",)


def placeholder(shape: Iterable[int]) -> Tensor:
    """A float32 tensor that takes four bytes."""
    return torch.tensor(torch.nan).expand(*shape)


class Watch(TorchFunctionMode):
    """decided: whether, while this was active, anything but floating-point numbers was made of a NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.decided = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _decides(getattr(func, "__name__", ""), result):
            with torch._C.DisableTorchFunction():
                self.decided |= any(_is_nan(value) for value in args)
        return result


def _decides(name: str, result: Any) -> bool:
    parts = result if isinstance(result, tuple) else (result,)
    whole = any(isinstance(part, Tensor) and not part.is_floating_point() for part in parts)
    return whole or name in TO_NUMBERS


def _is_nan(value: Any) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0 or value.is_meta:
        return False
    one = value[(0,) * value.dim()] if not any(value.stride()) else value  # a placeholder is one number
    return bool(one.isnan().any())


def holds_nan(model: Any, but: Collection[int]) -> bool:
    """Whether any tensor that modules hold, also in plain attributes, has a NaN. but: ids of tensors to skip."""
    for name, module in model.named_modules():
        if not name.endswith(NOT_MERGED):
            for tensor in _tensors({**vars(module), **module._parameters, **module._buffers}):
                if id(tensor) not in but and tensor.is_floating_point() and bool(tensor.isnan().any()):
                    return True
    return False


def _tensors(held: Mapping[str, Any]) -> Iterator[Tensor]:
    for value in held.values():
        values = value.values() if isinstance(value, dict) else [value]
        yield from (one for one in values if isinstance(one, Tensor))
