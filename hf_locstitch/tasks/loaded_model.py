"""A model that transformers has loaded, ready for passes, and how its parameters lie on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from hf_locstitch.tasks.parameter_names import Group, to_disk


def is_shared_out(parameter: Any) -> bool:
    """Whether it is sharded by rows over processes (FSDP2)."""
    return hasattr(parameter, "device_mesh")


def own_rows(tensor: Any) -> Tensor:
    """This process's rows of a tensor that may be sharded."""
    return tensor.to_local() if is_shared_out(tensor) else tensor


@dataclass(frozen=True)
class LoadedParameter:
    """A parameter that gradients are wanted of.

    Where parameters are sharded over processes (FSDP2), each process holds some rows: its part.
    """

    name: str
    parameter: Any

    @property
    def shape(self) -> torch.Size:
        """The shape of this process's part."""
        return own_rows(self.parameter).shape

    @property
    def device(self) -> torch.device:
        return self.parameter.device

    def part(self, whole: Tensor) -> Tensor:
        """This process's rows of a tensor of the parameter's shape; all rows unless it is sharded."""
        if not is_shared_out(self.parameter):
            return whole
        rows = whole.chunk(self.parameter.device_mesh.size())
        rank = self.parameter.device_mesh.get_local_rank()
        return rows[rank] if rank < len(rows) else whole[:0]

    def whole(self, part: Tensor) -> Tensor:
        """The inverse of `part`; every process calls it."""
        if not is_shared_out(self.parameter):
            return part
        from torch.distributed.tensor import DTensor

        mesh, placements = self.parameter.device_mesh, self.parameter.placements
        shape, stride = self.parameter.shape, self.parameter.stride()
        local = part.to(self.device)
        return DTensor.from_local(local, mesh, placements, shape=shape, stride=stride).full_tensor()


P = TypeVar("P", bound=LoadedParameter)


@dataclass(frozen=True)
class LoadedModel(Generic[P]):
    """parameters: those that gradients are wanted of, by name. groups: these parameters, with their tensors on disk."""

    model: Any
    parameters: Mapping[str, P]
    groups: tuple[Group, ...]

    @property
    def sharded(self) -> bool:
        """Whether parameters are sharded over the processes (FSDP2)."""
        return any(is_shared_out(one.parameter) for one in self.parameters.values())

    def to_disk(self, of: Callable[[P], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Parts of each parameter, gathered, under the names on disk; one group of parameters in memory at a time."""
        for group in self.groups:
            tensors = {name: self.parameters[name].whole(of(self.parameters[name])) for name in group.parameters}
            yield from to_disk(self.model, group, tensors).items()
