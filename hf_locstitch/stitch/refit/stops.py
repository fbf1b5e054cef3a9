"""Where a pass may stop: at a linear layer, or before stacked experts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_locstitch.stitch.refit.weights import Part, Weights

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Linear:
    """weight: [outputs, inputs], or the transpose if `transposed`."""

    weight: Part
    bias: Part | None
    transposed: bool

    @property
    def key(self) -> Key:
        return self.weight.key

    @property
    def matrix(self) -> tuple[int, int]:
        """Outputs and inputs; those of a convolution are inputs · kernel."""
        first, *rest = self.weight.shape
        return (math.prod(rest), first) if self.transposed else (first, math.prod(rest))

    def load(self, weights: Weights) -> tuple[Tensor, Tensor | None]:
        """Weight [outputs, inputs] and bias [outputs], read from `weights`, those of a model with these parts."""
        weight = weights.load(self.weight)
        return weight.T if self.transposed else weight, self.load_bias(weights)

    def load_bias(self, weights: Weights) -> Tensor | None:
        """The bias alone."""
        return None if self.bias is None else weights.load(self.bias)


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
