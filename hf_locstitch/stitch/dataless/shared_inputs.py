"""Which linear layers read the same input: seen by running the model once on a made-up input, without its weights.

Every weight is a constant and every product with one is zero, so that a run costs no more than the model's own code.
What the run shows is the calls, as transformers makes them: layers that are given the same tensor share an input. A
layer that no run reaches, but whose class is that of a linear layer, has an input of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_locstitch.stitch.dataless.made_up_inputs import made_up_inputs
from hf_locstitch.stitch.refit.lending import Lending
from hf_locstitch.stitch.refit.passes import Pass
from hf_locstitch.stitch.refit.stops import Linear, LinearStop
from hf_locstitch.stitch.refit.weights import SMALL as HELD_WHOLE
from hf_locstitch.stitch.refit.weights import Part, part_of

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")  # their arguments
WIDENING = (Tensor.float, Tensor.to, Tensor.type)  # of a weight to float32, which it is already
VALUE = 0.01  # of every weight
Input = tuple[Any, ...]


@dataclass(frozen=True)
class SharedInput:
    """Linear layers that read one input, in the order of their calls. The weight of a convolution counts as a matrix
    [outputs, inputs · kernel]."""

    linears: tuple[Linear, ...]

    @property
    def biased(self) -> bool:
        """Whether any has a bias: then all have a last column for it, which is 0 for those without."""
        return any(linear.bias for linear in self.linears)

    @property
    def width(self) -> int:
        """Columns of their matrices, with that of the biases."""
        return self.linears[0].matrix[1] + self.biased

    def strips(self, most: int) -> list[tuple[Linear, ...]]:
        """The layers, cut where a part would hold more than so many elements, but for single layers that do."""
        parts: list[list[Linear]] = []
        held = 0
        for linear in self.linears:
            held += linear.matrix[0] * self.width
            if not parts or held > most:
                parts.append([])
                held = linear.matrix[0] * self.width
            parts[-1].append(linear)
        return [tuple(part) for part in parts]


@dataclass
class Seen:
    """inputs: of the linear layers. not_run: the parameters asked for that no run reached because the part of the model
    that they belong to could not be run, and why; if such a one is among the inputs, then by itself."""

    inputs: list[SharedInput]
    not_run: dict[str, str] = field(default_factory=dict)


def shared_inputs(model: Any, wanted: Callable[[str], bool]) -> Seen:
    """model: as `weights.hollow` leaves it. wanted: whether a parameter is of interest; the model is run, and then its
    sub-models on inputs of their own, until all of those were seen or nothing is left to run.
    """
    from transformers import PreTrainedModel

    recorder = Recorder()
    asked = [name for name, _ in model.named_parameters() if wanted(name)]
    failures: dict[str, str | None] = {}  # of the innermost model that holds a parameter
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel):
            continue
        inside = [parameter for parameter in asked if parameter.startswith(f"{name}." if name else "")]
        if unseen := set(inside) - recorder.seen:
            failures |= dict.fromkeys(unseen, recorder.run(module))
    reached = recorder.seen | recorder.used
    not_run = {name: why for name, why in failures.items() if why is not None and name not in reached}
    found = dict(recorder.calls)
    found |= {linear: [("alone", linear.weight.parameter)] for linear in _by_class(model, set(asked) - recorder.seen)}
    return Seen(_grouped(_each_expert(found)), not_run)


def _by_class(model: Any, unseen: set[str]) -> Iterator[Linear]:
    """Linear layers and convolutions over all channels among parameters that no run reached."""
    from transformers.pytorch_utils import Conv1D

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | Conv1D):
            weight, bias = part_of(module._parameters.get("weight")), part_of(module._parameters.get("bias"))
            if weight is not None and weight.parameter in unseen and getattr(module, "groups", 1) == 1:
                yield Linear(weight, bias, transposed=isinstance(module, Conv1D))


class _Constants:
    """In place of a model's weights. used: the parameters that were asked for."""

    def __init__(self) -> None:
        self.used: set[str] = set()

    def held(self, part: Part) -> Tensor:
        self.used.add(part.parameter)
        if math.prod(part.shape) <= HELD_WHOLE:  # some models write to them
            return torch.full(part.shape, VALUE, device=part.device)
        return torch.full((), VALUE, device=part.device).expand(part.shape)

    stored = held


class Recorder(Lending):
    """calls: each linear layer's inputs, in the order of its calls. seen: the parameters that they are of. used: those
    that anything else was computed with."""

    def __init__(self) -> None:
        weights = _Constants()
        super().__init__(Pass(weights, lambda: None, frozenset()))  # type: ignore[arg-type]
        self.used = weights.used
        self.calls: dict[Linear, list[Input]] = {}
        self._running: dict[Linear, list[Input]] = {}
        self._numbers = count()

    @property
    def seen(self) -> set[str]:
        return {linear.weight.parameter for linear in self.calls}

    def run(self, module: Any) -> str | None:
        """Note what a run shows of parameters that earlier runs did not; of a model that does not run, what it called
        so far. Returns why it does not."""
        failure, partial = None, []
        for inputs in made_up_inputs(module):
            self._running = {}
            try:
                with torch.no_grad(), self:
                    module(**inputs)
            except Exception as error:  # whatever a model makes of inputs that mean nothing
                failure = failure or _in_short(error)
                partial.append(self._running)
            else:
                self._add(self._running, *partial)
                return None
        self._add(*partial)
        return failure

    def _add(self, *runs: Mapping[Linear, list[Input]]) -> None:
        """Of each, what those before it did not show."""
        for calls in runs:
            known = self.seen
            self.calls |= {linear: given for linear, given in calls.items() if linear.weight.parameter not in known}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        others = {*args[1:], *(kwargs or {}).values()} if func in WIDENING else set()
        if func in WIDENING and part_of(args[0]) is not None and others <= {torch.float32}:
            return args[0]
        if func in CONVOLUTIONS and (found := _as_convolution(func, args, dict(kwargs or {}))) is not None:
            self._note(*found)
        return super().__torch_function__(func, types, args, kwargs)

    def _linear(self, stop: LinearStop) -> Tensor:
        self._note(stop.place, stop.x)
        outputs = stop.weight.shape[1 if stop.transposed else 0]
        return stop.x.new_zeros(*stop.x.shape[:-1], outputs)

    def _note(self, linear: Linear, x: Tensor) -> None:
        storage: Any = x.untyped_storage()
        if not hasattr(storage, "locstitch_number"):  # it goes with the storage: an address is soon used again
            storage.locstitch_number = next(self._numbers)
        place = (storage.locstitch_number, x.storage_offset(), x.numel(), x._version)
        self._running.setdefault(linear, []).append(place)


def _in_short(error: Exception) -> str:
    """One line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:150]}" if text else type(error).__name__


def _as_convolution(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Linear, Tensor] | None:
    """A convolution over all channels: linear in the patches that it moves over."""
    bound: dict[str, Any] = {**dict(zip(CONVOLUTION, args, strict=False)), **kwargs}
    weight, bias = part_of(bound["weight"]), part_of(bound.get("bias"))
    if weight is None or bound.get("groups", 1) != 1 or (bound.get("bias") is not None and bias is None):
        return None
    return Linear(weight, bias, transposed=False), bound["input"]


def _each_expert(seen: Mapping[Linear, list[Input]]) -> dict[Linear, list[Input]]:
    """A run reaches a few of the experts that lie in a stack; the others are like them, with inputs of their own."""
    found: dict[Linear, list[Input]] = {}
    for linear, inputs in seen.items():
        stack = linear.weight
        if stack.index is None:
            found[linear] = inputs
            continue
        biases = [None] * stack.stacked if linear.bias is None else linear.bias.siblings
        for number, (weight, bias) in enumerate(zip(stack.siblings, biases, strict=True)):
            found.setdefault(Linear(weight, bias, linear.transposed), [("expert", stack.parameter, number)])
    return found


def _grouped(seen: Mapping[Linear, list[Input]]) -> list[SharedInput]:
    groups: dict[tuple[Input, ...], list[Linear]] = {}
    for linear, inputs in seen.items():
        groups.setdefault((*inputs, _width(linear)), []).append(linear)
    return [SharedInput(tuple(linears)) for linears in groups.values()]


def _width(linear: Linear) -> Input:
    """The kernel of a convolution belongs to its input."""
    return tuple(linear.weight.shape[1:]) if not linear.transposed else (linear.weight.shape[0],)
