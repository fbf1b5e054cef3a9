"""Which linear layers read the same input: seen by running the model once on a made-up input, without its weights.

Every weight is a constant and every product with one is zero, so that a run costs no more than the model's own code.
What the run shows is the calls, as transformers makes them: layers that are given the same tensor share an input.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_locstitch.stitch.refit.lending import Lending
from hf_locstitch.stitch.refit.passes import Pass
from hf_locstitch.stitch.refit.stops import Linear, LinearStop
from hf_locstitch.stitch.refit.weights import Part, part_of

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")  # their arguments
TOKENS = 4
SAMPLES = 4000  # of a made-up sound
SMALL = 0.01  # every weight
Input = tuple[Any, ...]


@dataclass(frozen=True)
class SharedInput:
    """Linear layers that read one input, in the order of their calls. The weight of a convolution counts as a matrix
    [outputs, inputs · kernel]."""

    linears: tuple[Linear, ...]


def shared_inputs(model: Any, wanted: Callable[[str], bool]) -> list[SharedInput]:
    """model: as `weights.hollow` leaves it. wanted: whether a parameter is of interest; the model is run, and then its
    sub-models on inputs of their own, until all of those were seen or nothing is left to run.
    """
    from transformers import PreTrainedModel

    seen: dict[Linear, list[Input]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel):
            continue
        own = {f"{name}.{one}" if name else one for one, _ in module.named_parameters()}
        known = {linear.weight.parameter for linear in seen}
        if any(wanted(parameter) and parameter not in known for parameter in own):
            _run(module, seen, known)
    return _grouped(_each_expert(seen))


def _run(module: Any, seen: dict[Linear, list[Input]], known: Collection[str]) -> None:
    """Add what a run shows of parameters that are not known. A model that does not run shows what it called so far."""
    for inputs in made_up_inputs(module):
        recorder = Recorder()
        try:
            with torch.no_grad(), recorder:
                module(**inputs)
        except Exception:  # whatever a model makes of inputs that mean nothing
            failed = True
        else:
            failed = False
        for linear, given in recorder.calls.items():
            if linear.weight.parameter not in known:
                seen[linear] = given
        if not failed:
            return


class _Constants:
    """In place of a model's weights."""

    def held(self, part: Part) -> Tensor:
        return torch.full((), SMALL, device=part.device).expand(part.shape)

    stored = held


class Recorder(Lending):
    """calls: each linear layer's inputs, in the order of its calls."""

    def __init__(self) -> None:
        super().__init__(Pass(_Constants(), lambda: None, frozenset()))  # type: ignore[arg-type]
        self.calls: dict[Linear, list[Input]] = {}
        self._alive: list[Tensor] = []  # whose addresses tell inputs apart

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in CONVOLUTIONS and (found := _as_convolution(func, args, dict(kwargs or {}))) is not None:
            linear, x = found
            self._note(linear, x)
        return super().__torch_function__(func, types, args, kwargs)

    def _linear(self, stop: LinearStop) -> Tensor:
        self._note(stop.place, stop.x)
        outputs = stop.weight.shape[1 if stop.transposed else 0]
        return stop.x.new_zeros(*stop.x.shape[:-1], outputs)

    def _note(self, linear: Linear, x: Tensor) -> None:
        self._alive.append(x)
        place = (x.untyped_storage().data_ptr(), x.storage_offset(), x.numel(), x._version)
        self.calls.setdefault(linear, []).append(place)


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


def made_up_inputs(module: Any) -> Iterator[dict[str, Any]]:
    """Inputs of the shapes that a model asks for, by what its config says: all at once, then its main one alone."""
    accepted = inspect.signature(module.forward).parameters
    made = {name: value for name, value in _by_name(module.config) if name in accepted}
    yield made
    main = getattr(module, "main_input_name", "input_ids")
    if main in made and len(made) > 1:
        yield {main: made[main]}


def _by_name(config: Any) -> Iterator[tuple[str, Tensor]]:
    tokens = torch.arange(TOKENS).unsqueeze(0)
    if _size(config, "vocab_size"):
        yield "input_ids", tokens
        if getattr(config, "is_encoder_decoder", False):
            yield "decoder_input_ids", tokens
    if sides := _size(config, "image_size"):
        height, width = sides if isinstance(sides, list | tuple) else (sides, sides)
        yield "pixel_values", torch.zeros(1, _size(config, "num_channels") or 3, height, width)
    if bins := _size(config, "num_mel_bins"):
        yield "input_features", torch.zeros(1, bins, 2 * (_size(config, "max_source_positions") or SAMPLES))
    yield "input_values", torch.zeros(1, SAMPLES)


def _size(config: Any, name: str) -> Any:
    """Of the config or of the part of it that has it."""
    parts = [config, *(getattr(config, part, None) for part in ("text_config", "vision_config", "audio_config"))]
    return next((value for part in parts if (value := getattr(part, name, None)) is not None), None)
