"""Forward passes that stop at every multiplication with a weight, so that many run through a model side by side.

A pass runs in its own thread, which is resumed for one step at a time. Everything between the linear layers (norms,
attention, activations, whatever the architecture does) is transformers' own code, and the order of the layers is the
order of its calls. The model holds no weights: a pass asks for each weight when it needs it.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from hf_locstitch.runtime.chunks import keep_to_itself
from hf_locstitch.stitch.refit.states import States
from hf_locstitch.stitch.refit.weights import Part, Weights, part_of, turned_part_of

LABELS = frozenset({"shape", "dtype", "device", "ndim", "is_cuda", "is_meta", "requires_grad", "layout", "is_sparse",
                    "is_quantized", "is_nested", "is_mkldnn", "is_leaf", "grad", "names", "itemsize"})  # fmt: skip
SUMS, VIEWS = (torch.add, Tensor.add), (Tensor.view, Tensor.reshape)
IN_PLACE = frozenset({"__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__"})
TRANSPOSES = (Tensor.t, torch.t)
TURNED = frozenset({"T", "mT"})  # attributes
SWAPS = (Tensor.transpose, torch.transpose)
PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
Key = tuple[Any, ...]


class _Abandoned(BaseException):
    """Ends the thread of an abandoned pass."""


@dataclass(frozen=True)
class Linear:
    """weight: [outputs, inputs], or the transpose if `transposed`."""

    weight: Part
    bias: Part | None
    transposed: bool

    @property
    def key(self) -> Key:
        return self.weight.key

    def load(self, weights: Weights) -> tuple[Tensor, Tensor | None]:
        """Weight [outputs, inputs] and bias [outputs], read from `weights`, those of a model with these parts."""
        weight = weights.load(self.weight)
        bias = None if self.bias is None else weights.load(self.bias)
        return weight.T if self.transposed else weight, bias


@dataclass(frozen=True)
class LinearStop(Linear):
    """A pass waits for x · weightᵀ + bias. x: [..., inputs].

    residual: [..., outputs], the tensor that the model adds the output to, for layers in Pass.sums.
    """

    x: Tensor
    residual: Tensor | None = None

    def awaited(self) -> Tensor:
        """A placeholder for the product until it is added: NaN of its shape, so that any other use shows."""
        outputs = self.weight.shape[1 if self.transposed else 0]
        return self.x.new_full((), math.nan).expand(*self.x.shape[:-1], outputs)

    @property
    def place(self) -> Linear:
        return Linear(self.weight, self.bias, self.transposed)


@dataclass(frozen=True)
class Experts:
    """A module with stacked experts."""

    stacks: tuple[Part, ...]

    @property
    def key(self) -> Key:
        return tuple(part.key for part in self.stacks)


@dataclass(frozen=True)
class ExpertsStop(Experts):
    """A pass waits before a module of experts. hidden: [tokens, width]; index: each token's experts [tokens, chosen].

    alone: runs one expert (by index) on tokens [m, width].
    """

    hidden: Tensor
    index: Tensor
    alone: Callable[[int, Tensor], Tensor]

    @property
    def place(self) -> Experts:
        return Experts(self.stacks)


class Pass:
    """One forward pass. weights: of its model. work: runs it. stops: parameters at which it waits for `go_on`.
    sums: keys of linear layers at which it waits only when their output is added to something.

    states: where it offloads its hidden states while it waits; None: it keeps them.

    inside: which rows of a layer's input are not padding, bool [examples, tokens], possibly of several shapes.
    added, used: keys of layers it stopped at whose output was added to another tensor, or used in any other way.
    hidden: the last hidden states before any head, [..., width], where the model has such.
    """

    _here = threading.local()

    def __init__(
        self,
        weights: Weights,
        work: Callable[[], Any],
        stops: frozenset[str],
        sums: frozenset[Key] = frozenset(),
        states: States | None = None,
    ) -> None:
        self.weights, self.stops, self.sums, self.states = weights, stops, sums, states
        self.inside: list[Tensor] = []
        self.added: set[Key] = set()
        self.used: set[Key] = set()
        self.stop: LinearStop | ExpertsStop | None = None
        self.result: Any = None
        self.hidden: Tensor | None = None
        self._work, self._error = work, None
        self._answer: Any = None
        self._abandoned = False
        self._go, self._arrived = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Run to the first stop, or to the end."""
        self._thread.start()
        self._await()

    def go_on(self, answer: Any = None) -> None:
        """Answer the current stop and run to the next, or to the end."""
        self.take_back()
        self._answer, self.stop = answer, None
        self._go.release()
        self._await()

    def multiply(self, weight: Tensor, bias: Tensor | None) -> None:
        """Continue with the output of a layer with this weight [outputs, inputs] and bias."""
        self.take_back()
        self.go_on(F.linear(linear_stop(self).x, weight, bias))

    def end(self) -> None:
        """Abandon the pass."""
        if self._thread.is_alive():
            self._abandoned, self.stop = True, None
            self._go.release()
            self._thread.join()

    def take_back(self) -> None:
        """Bring its hidden states back to the device, as `go_on` does anyway."""
        if self.states is not None:
            self.states.take_back()

    def at_hand(self) -> AbstractContextManager[None]:
        """While inside, the tensors of its stop may be read, and `rows` asked for; they may always be told apart."""
        held = [value for value in vars(self.stop).values() if isinstance(value, Tensor)] if self.stop else []
        return self.states.at_hand([*held, *self.inside]) if self.states is not None else nullcontext()

    def rows(self, x: Tensor) -> Tensor:
        """Numbers of the rows of a linear's input [..., inputs], flattened, that are no padding. Returns int64."""
        kept = torch.ones(x.shape[:-1].numel(), dtype=torch.bool, device=x.device)
        for inside in self.inside:
            if x.shape[:-1] in (inside.shape, (inside.numel(),)):
                kept &= inside.reshape(-1)
        return kept.nonzero().flatten()

    def ask(self, stop: LinearStop | ExpertsStop) -> Any:
        """Called by the pass's own thread: wait for the answer."""
        self.stop = stop
        self._arrived.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned
        answer, self._answer = self._answer, None
        if self.states is not None:
            self.states.note(answer, ())
        return answer

    @contextmanager
    def straight(self) -> Iterator[None]:
        """Inside, the pass does not stop."""
        stops, self.stops = self.stops, frozenset()
        try:
            yield
        finally:
            self.stops = stops

    @classmethod
    def current(cls) -> Pass | None:
        """The pass that runs in this thread."""
        return getattr(cls._here, "value", None)

    def _await(self) -> None:
        self._arrived.acquire()
        if self._error is not None:
            raise self._error
        if self.states is not None and self.stop is not None:
            self.states.put_away()

    def _run(self) -> None:
        Pass._here.value = self
        keep_to_itself()
        try:
            with torch.no_grad(), Lending(self):
                self.result = self._work()
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.stop = None
            self._arrived.release()


class Lending(TorchFunctionMode):
    """Gives torch's functions the weights in place of the model's placeholders."""

    def __init__(self, passing: Pass) -> None:
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


def watch(model: Any) -> frozenset[str]:
    """Make passes through a model see its padding and last hidden states, and stop before stacked experts. Returns the
    names of their parameters."""
    model.register_forward_pre_hook(_note_padding, with_kwargs=True)
    _last_states(model).register_forward_hook(_note_hidden)
    stacked: set[str] = set()
    for module in model.modules():
        if stacks := _stacked_experts(module):
            module.forward = _stopping(module.forward, stacks)
            stacked |= {stack.parameter for stack in stacks}
    return frozenset(stacked)


def _last_states(model: Any) -> Any:
    """The module that gives the last hidden states: the decoder, where it stands beside the head."""
    beside = model.base_model is model and getattr(model.config, "is_encoder_decoder", False)
    return model.get_decoder() if beside else model.base_model


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


def linear_stop(one: Pass) -> LinearStop:
    assert isinstance(one.stop, LinearStop)
    return one.stop
