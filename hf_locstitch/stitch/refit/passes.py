"""Forward passes that stop wherever a weight is multiplied with, so that many go through a model side by side.

A pass runs in a thread of its own, of which only one step at a time is let go. What stands between the linears
(norms, attention, activations, whatever the architecture does) is transformers' own code, and the order of the
linears is the order in which it calls them. Weights are not in the model: a pass asks for each when it meets it.
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
from hf_locstitch.stitch.refit.weights import Part, Weights, part_of

LABELS = frozenset({"shape", "dtype", "device", "ndim", "is_cuda", "is_meta", "requires_grad", "layout", "is_sparse",
                    "is_quantized", "is_nested", "is_mkldnn", "is_leaf", "grad", "names", "itemsize"})  # fmt: skip
SUMS, VIEWS = (torch.add, Tensor.add), (Tensor.view, Tensor.reshape)
PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
Key = tuple[Any, ...]


class _Abandoned(BaseException):
    """Ends the thread of a pass that nobody goes on with."""


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
        """Weight [outputs, inputs] and bias [outputs], read afresh. weights: of a model whose parts these are."""
        weight = weights.load(self.weight)
        bias = None if self.bias is None else weights.load(self.bias)
        return weight.T if self.transposed else weight, bias


@dataclass(frozen=True)
class LinearStop(Linear):
    """x · weightᵀ + bias is due. x: [..., inputs].

    residual: [..., outputs], what the model adds to it and does nothing else with it, if the pass looks for that.
    """

    x: Tensor
    residual: Tensor | None = None

    def awaited(self) -> Tensor:
        """What stands for the product until it is added: of its shape, and NaN, which shows if it is used as it is."""
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
    """It is about to run. hidden: [tokens, width]; index: its experts [tokens, chosen].

    alone: runs one expert (by number) on tokens [m, width].
    """

    hidden: Tensor
    index: Tensor
    alone: Callable[[int, Tensor], Tensor]

    @property
    def place(self) -> Experts:
        return Experts(self.stacks)


class Pass:
    """One forward pass. weights: of its model. work: makes it. stops: at these parameters it waits for `go_on`.
    sums: keys of linears at which it waits no sooner than their product is added to something.

    states: where it puts what it holds while it waits; None: it keeps it.

    inside: which rows of a linear's input are no padding, bool [examples, tokens], any number of shapes.
    added, used: keys of the linears it stopped at whose product was added to another tensor, or used in any other way.
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
        """Give what is due at the present stop and run to the next, or to the end."""
        self.take_back()
        self._answer, self.stop = answer, None
        self._go.release()
        self._await()

    def multiply(self, weight: Tensor, bias: Tensor | None) -> None:
        """Go on with what such a linear makes of the input that it waits with. weight: [outputs, inputs]."""
        self.take_back()
        self.go_on(F.linear(linear_stop(self).x, weight, bias))

    def end(self) -> None:
        """Leave it where it is."""
        if self._thread.is_alive():
            self._abandoned, self.stop = True, None
            self._go.release()
            self._thread.join()

    def take_back(self) -> None:
        """Have all that it holds on the device again, as `go_on` does anyway."""
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
        """Called from within: wait for the answer."""
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
        """Without stops."""
        stops, self.stops = self.stops, frozenset()
        try:
            yield
        finally:
            self.stops = stops

    @classmethod
    def current(cls) -> Pass | None:
        """The one whose thread this is."""
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
    """Gives torch's functions the weights that the model's parameters stand for."""

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
            found = self._pass.weights.stored(table)
            rest = _without(kwargs, "input", "weight")
            return self._made(func(args[0] if args else kwargs["input"], found, *args[2:], **rest).float())
        if func is Tensor.__getitem__ and (part := part_of(args[0])) is not None and _is_number(args[1]):
            return part.hole_of(int(args[1]))
        if func.__name__ == "__get__" and getattr(func.__self__, "__name__", "") in LABELS:
            return func(*args, **kwargs)
        if func in SUMS and len(args) == 2 and not kwargs and (found := self._sum(func, *args)) is not None:
            return self._made(found)
        lent = tree_map(self._lend, (tuple(args), kwargs))
        found = self._made(func(*lent[0], **lent[1]), lent)
        for stop in filter(None, map(product_of, tree_leaves((tuple(args), kwargs)))):
            if func in VIEWS:
                found.locstitch_product = stop
            elif product_of(found) is not stop:  # dropout gives back what it gets
                self._pass.used.add(stop.key)
        return found

    def _made(self, found: Any, given: Any = ()) -> Any:
        if self._pass.states is not None:
            self._pass.states.note(found, given)
        return found

    def _lend(self, value: Any) -> Any:
        part = part_of(value)
        return value if part is None else self._pass.weights.held(part)

    def _sum(self, func: Any, one: Any, other: Any) -> Tensor | None:
        """Of a linear's product, which is asked for now if it is awaited, and another tensor; None of anything else."""
        first, second = product_of(one), product_of(other)
        stop, product, residual = (first, one, other) if first else (second, other, one)
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
    """The linear that a tensor is the product of, if it was stopped at, or will be."""
    return value.__dict__.get("locstitch_product") if isinstance(value, Tensor) else None


def _as_linear(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> LinearStop | None:
    """What a call multiplies, if it is a product with a weight."""
    if func is F.linear:
        weight, bias = part_of(_argument(args, kwargs, 1, "weight")), _argument(args, kwargs, 2, "bias")
        x, transposed = _argument(args, kwargs, 0, "input"), False
    elif func is torch.addmm and len(args) == 3 and not kwargs:
        (bias, x), weight, transposed = args[:2], part_of(args[2]), True
    elif func in PRODUCTS and len(args) == 2 and not kwargs:
        x, weight, bias, transposed = args[0], part_of(args[1]), None, True
    else:
        return None
    if weight is None or weight.dim != 2 or part_of(x) is not None or (bias is not None and part_of(bias) is None):
        return None
    return LinearStop(weight, part_of(bias), transposed, x)


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if place < len(args) else kwargs.get(name)


def _without(kwargs: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in names}


def _is_number(index: Any) -> bool:
    return isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0 and index.dtype != torch.bool)


def watch(model: Any) -> frozenset[str]:
    """Let passes through a model know of its padding, and stop before stacked experts, whose parameters are named."""
    model.register_forward_pre_hook(_note_padding, with_kwargs=True)
    found: set[str] = set()
    for module in model.modules():
        if stacks := _stacked_experts(module):
            module.forward = _stopping(module.forward, stacks)
            found |= {stack.parameter for stack in stacks}
    return frozenset(found)


def _stacked_experts(module: Any) -> tuple[Part, ...]:
    """The parameters [experts, …, …] of a module that routes tokens to experts of its own, if it is one."""
    own = [part for parameter in module.parameters(recurse=False) if (part := part_of(parameter)) is not None]
    if not {"top_k_index", "top_k_weights"} <= set(inspect.signature(module.forward).parameters):
        return ()
    return tuple(part for part in own if part.dim == 3)


def _note_padding(_: Any, __: Any, kwargs: Mapping[str, Any]) -> None:
    here = Pass.current()
    masks = [kwargs.get("attention_mask"), kwargs.get("decoder_attention_mask")]
    if here is not None:
        here.inside = [mask.bool() for mask in masks if isinstance(mask, Tensor) and mask.dim() == 2]


def _stopping(forward: Callable[..., Tensor], stacks: tuple[Part, ...]) -> Callable[..., Tensor]:
    parameters = inspect.signature(forward)

    def stopping(*args: Any, **kwargs: Any) -> Tensor:
        here = Pass.current()
        if here is None or not all(stack.parameter in here.stops for stack in stacks):
            return forward(*args, **kwargs)
        given = dict(parameters.bind(*args, **kwargs).arguments)
        hidden, index = given.pop("hidden_states"), given.pop("top_k_index")
        shares = given.pop("top_k_weights")

        def alone(expert: int, tokens: Tensor) -> Tensor:
            routed = torch.full((len(tokens), 1), expert, dtype=index.dtype, device=index.device)
            return forward(tokens, routed, torch.ones(len(tokens), 1, dtype=shares.dtype, device=index.device), **given)

        here.ask(ExpertsStop(stacks, hidden.reshape(-1, hidden.shape[-1]), index, alone))
        with here.straight():
            return forward(hidden, index, shares, **given)

    return stopping


def linear_stop(one: Pass) -> LinearStop:
    assert isinstance(one.stop, LinearStop)
    return one.stop
