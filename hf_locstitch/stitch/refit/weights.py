"""A model without its weights, and the weights of one checkpoint, read when a pass needs them."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_locstitch.tasks.parameter_names import Group, from_disk, group_buffers, group_names

SMALL = 1 << 16  # elements: smaller tensors (norms, biases) stay in memory once read
HELD = 2  # how many larger tensors a model keeps in memory
PIECE = 1 << 24  # elements of a weight converted to float32 at once, where a pass does not stop


@dataclass(frozen=True)
class Part:
    """A parameter, or one of its `stacked` matrices (index). key: the same for the models of all tasks. default: of a
    buffer, its values where a checkpoint lacks it."""

    parameter: str
    index: int | None
    shape: tuple[int, ...]
    key: tuple[Any, ...]
    device: torch.device
    stacked: int = 0
    default: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def dim(self) -> int:
        return len(self.shape)

    def at(self, index: int) -> Part:
        """One of its stacked tensors."""
        if self.index is not None:
            raise ValueError(f"{self.parameter} is indexed twice")
        number = index % self.shape[0]
        return Part(self.parameter, number, self.shape[1:], (*self.key, number), self.device, self.shape[0])

    @property
    def siblings(self) -> list[Part]:
        """The tensors of the stack that it is one of."""
        return [replace(self, index=number, key=(*self.key[:-1], number)) for number in range(self.stacked)]

    def turned_hole(self) -> Tensor:
        """A placeholder of this matrix, transposed."""
        values = torch.full((), math.nan, device=self.device).expand(self.shape[::-1])
        values.locstitch_turned = self  # pyright: ignore[reportAttributeAccessIssue]
        return values

    def hole_of(self, index: int) -> Tensor:
        """The placeholder of one of its stacked tensors."""
        return _hole(self.at(index))


def part_of(value: Any) -> Part | None:
    """What a tensor stands for, if it is a placeholder."""
    return value.__dict__.get("locstitch_part") if isinstance(value, Tensor) else None


def turned_part_of(value: Any) -> Part | None:
    """The matrix whose transpose a tensor stands for, if it is such a placeholder."""
    return value.__dict__.get("locstitch_turned") if isinstance(value, Tensor) else None


def _hole(part: Part, parameter: bool = False) -> Tensor:
    """A placeholder of the right shape, dtype and device, with a single element: NaN, so that any use of it shows."""
    values = torch.full((), math.nan, device=part.device).expand(part.shape)
    hole = nn.Parameter(values, requires_grad=False) if parameter else values
    hole.locstitch_part = part  # pyright: ignore[reportAttributeAccessIssue]
    return hole


def hollow(model: Any, disk: Collection[str], device: torch.device) -> dict[str, Part]:
    """Replace all parameters of a model on the meta device, and the buffers that the base holds, by placeholders.
    disk: names of the base's tensors.

    Returns what the parameters stand for, by name.
    """
    keys = {
        parameter: (group.disk, number)
        for group in group_names(model, disk)
        for number, parameter in enumerate(group.parameters)
    }
    parts: dict[str, Part] = {}
    holes: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters():
        parts[name] = Part(name, None, tuple(parameter.shape), keys.get(name, (name,)), device)
        holes[id(parameter)] = _hole(parts[name], parameter=True)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = holes[id(parameter)]  # pyright: ignore[reportArgumentType]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    for group in group_buffers(model, disk):
        (name,) = group.parameters
        module, _, own = name.rpartition(".")
        buffer = model.get_buffer(name)
        part = Part(name, None, tuple(buffer.shape), (name,), device, default=buffer.float())
        model.get_submodule(module)._buffers[own] = _hole(part)
    return parts


class Weights:
    """float32 values of a model's parameters. read: a tensor on disk by its name, [*shape], in any dtype.

    spare: gives what this checkpoint lacks (a head that only the finetune has). mapped: whether reading a tensor
    copies nothing. release: is told of each tensor that was read and copied.
    """

    def __init__(
        self,
        model: Any,
        disk: Collection[str],
        read: Callable[[str], Tensor],
        device: torch.device,
        spare: Weights | None = None,
        mapped: Callable[[str], bool] = lambda _: True,
        release: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.groups: dict[str, Group] = {}
        for group in [*group_names(model, disk), *group_buffers(model, disk)]:
            for parameter in group.parameters:
                self.groups.setdefault(parameter, group)
        self._model, self._read, self._device, self._spare = model, read, device, spare
        self._mapped, self._release = mapped, release
        self._kept: dict[str, Tensor] = {}
        self._held: OrderedDict[str, Tensor] = OrderedDict()
        self.changed: dict[str, Tensor] = {}

    def load(self, part: Part) -> Tensor:
        """Read afresh, float32 [*shape]; what was `changed` instead of what was read."""
        if part.index is not None:
            return self.held(part)
        whole = self.changed.get(part.parameter)
        return self._load(part) if whole is None else whole

    def held(self, part: Part) -> Tensor:
        """The same, kept for a while."""
        values = self.changed.get(part.parameter)
        if values is not None:
            return values if part.index is None else values[part.index]
        values = self._kept.get(part.parameter, self._held.get(part.parameter))
        if values is None:
            values = self._load(part)
            if values.numel() <= SMALL:
                self._kept[part.parameter] = values
            else:
                self._held[part.parameter] = values
                while len(self._held) > HELD:
                    self._held.popitem(last=False)
        return values if part.index is None else values[part.index]

    def stored(self, part: Part) -> Tensor:
        """As it lies on the disk, uncopied where that is possible, for a few rows of it."""
        group = self.groups.get(part.parameter)
        if group is None or not group.direct or not self._mapped(group.disk[0]):
            return self.held(part)
        return self._read(group.disk[0]).to(self._device)

    def product(self, x: Tensor, part: Part, bias: Tensor | None, transposed: bool) -> Tensor:
        """x · weightᵀ + bias of a weight that is widened piece by piece."""
        group = self.groups.get(part.parameter)
        if transposed or part.index is not None or group is None or not group.direct or not self._mapped(group.disk[0]):
            return F.linear(x, self.held(part).T if transposed else self.held(part), bias)
        rows = max(1, PIECE // part.shape[1])
        weight = self._read(group.disk[0])
        pieces = [F.linear(x, piece.to(self._device).float()) for piece in weight.split(rows)]
        self._release(group.disk[0])
        output = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
        return output if bias is None else output + bias

    def _load(self, part: Part) -> Tensor:
        group = self.groups.get(part.parameter)
        if group is None and self._spare is not None:
            return self._spare._load(part)
        if group is None and part.default is not None:
            return part.default
        if group is None:  # in neither checkpoint: a pooler that nobody asks for, or it shows in the outputs
            return torch.full(part.shape, math.nan, device=self._device)
        if group.direct:
            values = self._read(group.disk[0]).to(self._device).float()
        else:
            values = from_disk(self._model, group, self._read)[part.parameter].to(self._device)
        for name in group.disk:
            self._release(name)
        return values


def fill(model: Any, weights: Weights) -> None:
    """Replace a model's placeholders by what they stand for: it then runs, and has gradients, as any other."""
    for parameter in model.parameters():
        if (part := part_of(parameter)) is not None:
            parameter.data = weights.load(part)
            del parameter.locstitch_part
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if (part := part_of(buffer)) is not None:
                module._buffers[name] = weights.load(part)
