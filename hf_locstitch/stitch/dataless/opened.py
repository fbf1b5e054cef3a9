"""The inputs of a refit without data, opened: task vectors of parameters in memory, layer by layer, and what they form
on disk."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import torch
from torch import Tensor

from hf_locstitch.checkpoints.finite import check_part
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.stitch.dataless.layers import Layers, Unit, layers_of, parts_of
from hf_locstitch.stitch.dataless.shared_inputs import SharedInput
from hf_locstitch.stitch.dataless.solution import LOW_RANK, Threads, energy, input_gram
from hf_locstitch.stitch.refit.stops import Linear
from hf_locstitch.stitch.refit.weights import Part, Weights
from hf_locstitch.tasks.parameter_names import to_disk

LOOKED_AT = 8  # linear layers of a finetune that tell whether its update is of low rank


@dataclass(frozen=True)
class Stored:
    """Tensors on disk. names: of all. shape: of one, by its name. read: its elements first … first + count, in any
    dtype. release: is told of those that were read and copied."""

    names: Collection[str]
    shape: Callable[[str], Sequence[int]]
    read: Callable[[str, int, int], Tensor]
    release: Callable[[str, int, int], object] = lambda *_: None

    def whole(self, name: str) -> Tensor:
        """[*shape]."""
        return self.read(name, 0, math.prod(self.shape(name))).view(tuple(self.shape(name)))

    def release_whole(self, name: str) -> None:
        self.release(name, 0, math.prod(self.shape(name)))


class OpenedWeights:
    """float32 values of a model's parameters; of stacked experts only the one that is asked for is read, where that can
    be done."""

    def __init__(self, layers: Layers, stored: Stored, device: torch.device) -> None:
        self._layers, self._stored, self._device = layers, stored, device
        self._whole = Weights(layers.model, stored.names, stored.whole, device, release=stored.release_whole)

    def load(self, part: Part) -> Tensor:
        """[*shape]."""
        pieces = self._layers.pieces_of(part)
        if pieces is None:
            return self._whole.load(part)
        read = [self._stored.read(piece.name, piece.first, piece.count).to(self._device).float() for piece in pieces]
        for piece in pieces:
            self._stored.release(piece.name, piece.first, piece.count)
        return (read[0] if len(read) == 1 else torch.cat(read)).view(part.shape)


@dataclass(frozen=True)
class OpenedModels:
    """base, finetuned: their weights, float32, the latter in the order of summation."""

    layers: Layers
    base: OpenedWeights
    finetuned: Sequence[OpenedWeights]

    def task_vectors(self, linears: Sequence[Linear], biased: bool) -> Iterator[list[Tensor]]:
        """Of each finetune, one after another: those of these layers, as `matrices` has them."""
        for weights in self.finetuned:
            yield [self._task_vector(weights, linear, biased) for linear in linears]

    def input_grams(self, shared: SharedInput, threads: Threads) -> list[Tensor]:
        """Of each finetune, the Gram matrix that its vectors of these layers stand for; read layer by layer."""
        return [
            input_gram((self._task_vector(weights, linear, shared.biased) for linear in shared.linears), threads)
            for weights in self.finetuned
        ]

    def _task_vector(self, weights: OpenedWeights, linear: Linear, biased: bool) -> Tensor:
        return _matrix(weights, linear, biased).sub_(_matrix(self.base, linear, biased))

    def is_low_rank(self) -> bool:
        """Whether a finetune's update is of low rank, as of an adapter merged into its base."""
        linears = [linear for unit in self.layers.units for shared in unit.inputs for linear in shared.linears]
        chosen = [linears[number * len(linears) // LOOKED_AT] for number in range(min(LOOKED_AT, len(linears)))]
        energies: list[list[float]] = [[] for _ in self.finetuned]
        for linear in dict.fromkeys(chosen):
            for found, (vector,) in zip(energies, self.task_vectors([linear], linear.bias is not None), strict=True):
                if (share := energy(vector)) is not None:
                    found.append(share)
        return any(found and median(found) > LOW_RANK for found in energies)


class Assembled:
    """The parameters of a unit, passed on under their names on disk as soon as all that form a tensor are there; of
    stacked experts one by one, where that can be done. fill: values of a parameter that is in no linear layer."""

    def __init__(self, layers: Layers, unit: Unit, fill: Callable[[str], Tensor]) -> None:
        self._layers, self._fill = layers, fill
        self._groups = {parameter: group for group in unit.groups for parameter in group.parameters}
        parts = [part for shared in unit.inputs for linear in shared.linears for part in parts_of(linear)]
        self._due = Counter(self._groups[part.parameter] for part in parts)
        self._parameters: dict[str, Tensor] = {}

    def add(self, linear: Linear, solved: Tensor) -> Iterator[tuple[str, Tensor]]:
        """solved: the change of a layer, as `matrices` has it. Returns what it makes complete: tensors
        [*shape], or the next elements of some."""
        for part, values in take_apart(solved, linear):
            pieces = self._layers.pieces_of(part)
            if pieces is not None:
                cut = values.reshape(-1).split([piece.count for piece in pieces])
                yield from ((piece.name, own) for piece, own in zip(pieces, cut, strict=True))
                continue
            put_part(self._parameters, part, values)
            group = self._groups[part.parameter]
            self._due[group] -= 1
            if self._due[group] == 0:
                whole = {name: self._take(name) for name in group.parameters}
                yield from to_disk(self._layers.model, group, whole).items()

    def _take(self, parameter: str) -> Tensor:
        return self._parameters.pop(parameter) if parameter in self._parameters else self._fill(parameter)


def open_models(
    base: CheckpointReader, finetuned: Sequence[CheckpointReader], localized: Collection[str], device: torch.device
) -> OpenedModels:
    """localized: names on disk. Raises RequestError where transformers cannot build the model."""
    layers = layers_of(base.checkpoint, localized)
    weights = [OpenedWeights(layers, finite(one), device) for one in (base, *finetuned)]
    return OpenedModels(layers, weights[0], weights[1:])


def finite(reader: CheckpointReader) -> Stored:
    """A checkpoint's tensors. Reading raises NonFiniteError where they hold NaN or infinity: the solution would spread
    it, or hide it."""

    def read(name: str, first: int, count: int) -> Tensor:
        check_part(reader, name, first, count)
        return reader.flat(name, first, count)

    shapes = reader.checkpoint.shapes
    return Stored(list(shapes), shapes.__getitem__, read, reader.release)


class Loads(Protocol):
    """Weights that can be read."""

    def load(self, part: Part) -> Tensor: ...


def matrices(weights: Loads, linears: Sequence[Linear], biased: bool) -> list[Tensor]:
    """The layers' weights [outputs, inputs], in memory of their own; if `biased`, with a last column for biases: 0 for
    those without."""
    return [_matrix(weights, linear, biased) for linear in linears]


def _matrix(weights: Loads, linear: Linear, biased: bool) -> Tensor:
    weight = flattened(weights.load(linear.weight), linear)
    if not biased:
        return weight.clone(memory_format=torch.contiguous_format)
    bias = weight.new_zeros(len(weight)) if linear.bias is None else weights.load(linear.bias)
    return torch.cat([weight, bias.reshape(-1, 1)], dim=1)


def flattened(weight: Tensor, linear: Linear) -> Tensor:
    return weight.T if linear.transposed else weight.reshape(len(weight), -1)


def take_apart(solved: Tensor, linear: Linear) -> Iterator[tuple[Part, Tensor]]:
    """The inverse of `matrices`, for one layer: the values of its parts, each in its own shape."""
    part = linear.weight
    weight = solved[:, : part.shape[0] if linear.transposed else math.prod(part.shape[1:])]
    yield part, weight.T if linear.transposed else weight.reshape(part.shape)
    if linear.bias is not None:
        yield linear.bias, solved[:, -1].reshape(linear.bias.shape)


def put_part(parameters: dict[str, Tensor], part: Part, values: Tensor) -> None:
    """Keep the values of a parameter, or of one of its stacked tensors."""
    if part.index is None:
        parameters[part.parameter] = values
        return
    if part.parameter not in parameters:
        parameters[part.parameter] = values.new_zeros(part.stacked, *part.shape)
    parameters[part.parameter][part.index] = values
