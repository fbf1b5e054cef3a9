"""Weights in place of a model's placeholders, wherever torch is about to compute with one; and which calls are linear
layers: products with a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from hf_locstitch.stitch.refit.states import States
from hf_locstitch.stitch.refit.stops import Key, LinearStop
from hf_locstitch.stitch.refit.weights import Weights, part_of, turned_part_of

LABELS = frozenset({"shape", "dtype", "device", "ndim", "is_cuda", "is_meta", "requires_grad", "layout", "is_sparse",
                    "is_quantized", "is_nested", "is_mkldnn", "is_leaf", "grad", "names", "itemsize"})  # fmt: skip
SUMS, VIEWS = (torch.add, Tensor.add), (Tensor.view, Tensor.reshape)
IN_PLACE = frozenset({"__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__"})
TRANSPOSES = (Tensor.t, torch.t)
TURNED = frozenset({"T", "mT"})  # attributes
SWAPS = (Tensor.transpose, torch.transpose)
PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


class Borrower(Protocol):
    """What runs a model on borrowed weights; its fields are those of Pass."""

    weights: Weights
    stops: frozenset[str]
    sums: frozenset[Key]
    states: States | None
    added: set[Key]
    used: set[Key]

    def ask(self, stop: LinearStop) -> Any: ...


class Lending(TorchFunctionMode):
    """Gives torch's functions the weights in place of the model's placeholders."""

    def __init__(self, passing: Borrower) -> None:
        super().__init__()
        self._pass = passing

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if (linear := _as_linear(func, args, kwargs)) is not None:
            return self._linear(linear)
        if func is F.embedding and (table := part_of(_argument(args, kwargs, 1, "weight"))) is not None:
            result = self._pass.weights.stored(table)
            rest = _without(kwargs, "input", "weight")
            return self._made(func(args[0] if args else kwargs["input"], result, *args[2:], **rest).float())
        if func is Tensor.__getitem__ and (part := part_of(args[0])) is not None and _is_number(args[1]):
            return part.hole_of(int(args[1]))
        if func.__name__ == "__get__" and getattr(func.__self__, "__name__", "") in LABELS:
            return func(*args, **kwargs)
        if _turns(func, args, kwargs) and (part := part_of(args[0])) is not None and part.dim == 2:
            return part.turned_hole()
        if func in SUMS and len(args) == 2 and not kwargs and (result := self._sum(func, *args)) is not None:
            return self._made(result)
        lent = tree_map(self._lend, (tuple(args), kwargs))
        result = self._made(func(*lent[0], **lent[1]), lent)
        for stop in list(filter(None, map(product_of, tree_leaves((tuple(args), kwargs))))):
            if _writes(func):
                self._pass.used.add(stop.key)
                result.__dict__.pop("locstitch_product", None)
            elif func in VIEWS:
                result.locstitch_product = stop
            elif product_of(result) is not stop:  # dropout returns its input
                self._pass.used.add(stop.key)
        return result

    def _made(self, result: Any, given: Any = ()) -> Any:
        if self._pass.states is not None:
            self._pass.states.note(result, given)
        return result

    def _lend(self, value: Any) -> Any:
        if (turned := turned_part_of(value)) is not None:
            return self._pass.weights.held(turned).T
        part = part_of(value)
        return value if part is None else self._pass.weights.held(part)

    def _sum(self, func: Any, left: Any, right: Any) -> Tensor | None:
        """The sum of a linear layer's output (requested now if it was deferred) and another tensor; None for other
        sums."""
        first, second = product_of(left), product_of(right)
        stop, product, residual = (first, left, right) if first else (second, right, left)
        if stop is None or (first and second) or not isinstance(residual, Tensor) or part_of(residual) is not None:
            return None
        if product.shape != residual.shape:
            return None
        self._pass.added.add(stop.key)
        if stop.key in self._pass.sums:
            product = self._pass.ask(replace(stop, residual=residual)).reshape(residual.shape)
        return func(product, residual) if first else func(residual, product)

    def _linear(self, stop: LinearStop) -> Tensor:
        here, weights = self._pass, self._pass.weights
        if stop.weight.parameter in here.stops:
            product = stop.awaited() if stop.key in here.sums else here.ask(stop)
            product.locstitch_product = stop  # pyright: ignore[reportAttributeAccessIssue]
            return product
        bias = None if stop.bias is None else weights.held(stop.bias)
        return self._made(weights.product(stop.x, stop.weight, bias, stop.transposed))


def product_of(value: Any) -> LinearStop | None:
    """The linear layer whose output a tensor is, if the pass stopped there, or will."""
    return value.__dict__.get("locstitch_product") if isinstance(value, Tensor) else None


def _as_linear(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> LinearStop | None:
    """The linear layer that a call computes, if it is a product with a weight."""
    if func is F.linear:
        weight, bias = part_of(_argument(args, kwargs, 1, "weight")), _argument(args, kwargs, 2, "bias")
        x, transposed = _argument(args, kwargs, 0, "input"), False
    elif func is torch.addmm and len(args) == 3 and not kwargs:
        (bias, x), weight, transposed = args[:2], part_of(args[2]), True
    elif func in PRODUCTS and len(args) == 2 and not kwargs:
        turned = turned_part_of(args[1])
        x, weight, bias, transposed = args[0], turned or part_of(args[1]), None, turned is None
    else:
        return None
    if weight is None or weight.dim != 2 or part_of(x) is not None or (bias is not None and part_of(bias) is None):
        return None
    return LinearStop(weight, part_of(bias), transposed, x)


def _turns(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is the transpose of a matrix, as some linear layers write it: x @ weight.T."""
    if func.__name__ == "__get__":
        return getattr(func.__self__, "__name__", "") in TURNED
    if len(args) == 1 and not kwargs:
        return func in TRANSPOSES
    return func in SWAPS and len(args) == 3 and not kwargs and sorted(size % 2 for size in args[1:]) == [0, 1]


def _writes(func: Any) -> bool:
    """Whether a function changes its first argument: `x += y`, `x.add_(y)`."""
    name = func.__name__
    return name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if place < len(args) else kwargs.get(name)


def _without(kwargs: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in names}


def _is_number(index: Any) -> bool:
    return isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0 and index.dtype != torch.bool)
