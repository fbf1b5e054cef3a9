"""The inputs of a refit without data, opened: task vectors of parameters in memory, layer by layer, and what they form
on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.config import architecture
from hf_locstitch.checkpoints.finite import check_whole
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.runtime.progress import hide_all_library_bars
from hf_locstitch.stitch.dataless.shared_inputs import SharedInput, shared_inputs
from hf_locstitch.stitch.dataless.solution import LOW_RANK, energy
from hf_locstitch.stitch.refit.models import NO_REFIT, reading, releasing
from hf_locstitch.stitch.refit.passes import Linear
from hf_locstitch.stitch.refit.weights import Part, Weights, hollow
from hf_locstitch.tasks.empty_model import attach_conversions, empty_model
from hf_locstitch.tasks.loading import link_files, load_config
from hf_locstitch.tasks.parameter_names import Group, to_disk

LOOKED_AT = 8  # linear layers of a finetune that tell whether its update is of low rank


@dataclass(frozen=True)
class Unit:
    """Linear layers that are solved together, because they share an input or form tensors on disk together.

    groups: the parameters that they are, all of which are localized.
    """

    inputs: tuple[SharedInput, ...]
    groups: tuple[Group, ...]

    @property
    def disk(self) -> list[str]:
        return [name for group in self.groups for name in group.disk]


@dataclass(frozen=True)
class OpenedModels:
    """model: without weights; parts: its parameters by name; disk: names of the base's tensors. base, finetuned: their
    weights, float32, the latter in the order of summation. units: of the localized linear layers. others: localized
    tensors on disk that are in none.
    """

    model: object
    parts: Mapping[str, Part]
    disk: Sequence[str]
    base: Weights
    finetuned: Sequence[Weights]
    units: Sequence[Unit]
    others: Sequence[str]

    def task_vectors(self, linears: Sequence[Linear]) -> Iterator[list[Tensor]]:
        """Of each finetune, one after another: those of these layers, as `matrices` has them."""
        for weights in self.finetuned:
            vectors = matrices(weights, linears)
            for vector, start in zip(vectors, matrices(self.base, linears), strict=True):
                vector -= start
            yield vectors

    def is_low_rank(self) -> bool:
        """Whether a finetune's update is of low rank, as of an adapter merged into its base."""
        linears = [linear for unit in self.units for shared in unit.inputs for linear in shared.linears]
        chosen = [linears[number * len(linears) // LOOKED_AT] for number in range(min(LOOKED_AT, len(linears)))]
        energies: list[list[float]] = [[] for _ in self.finetuned]
        for linear in dict.fromkeys(chosen):
            for found, (vector,) in zip(energies, self.task_vectors([linear]), strict=True):
                if (share := energy(vector)) is not None:
                    found.append(share)
        return any(found and median(found) > LOW_RANK for found in energies)

    def to_disk(
        self, unit: Unit, parameters: Mapping[str, Tensor], fill: Callable[[str], Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Values of a unit's parameters, under their names on disk. fill: those of a parameter that has none."""
        for group in unit.groups:
            whole = {name: parameters[name] if name in parameters else fill(name) for name in group.parameters}
            yield from to_disk(self.model, group, whole).items()


@hide_all_library_bars()
def open_models(
    base: CheckpointReader,
    finetuned: Sequence[CheckpointReader],
    localized: Collection[str],
    folder: Path,
    device: torch.device,
) -> OpenedModels:
    """Raises RequestError where transformers cannot build the model."""
    checkpoint = base.checkpoint
    linked = link_files(checkpoint, folder / "base", weights=False)
    model = empty_model(_class_name(checkpoint), load_config(linked), NO_REFIT)
    attach_conversions(model, list(checkpoint.tensors))
    disk = list(checkpoint.tensors)
    parts = hollow(model, disk, torch.device("cpu"))
    weights = [
        Weights(model, list(one.checkpoint.tensors), finite(one), device, release=releasing(one))
        for one in (base, *finetuned)
    ]
    inside = frozenset(localized)
    groups = {name: group for name, group in weights[0].groups.items() if inside.issuperset(group.disk)}
    units = _units(shared_inputs(model, groups.__contains__), groups)
    within = {name for unit in units for name in unit.disk}
    others = [name for name in localized if name not in within]
    return OpenedModels(model, parts, disk, weights[0], weights[1:], units, others)


def finite(reader: CheckpointReader) -> Callable[[str], Tensor]:
    """As `reading`, but the function raises NonFiniteError where a tensor holds NaN or infinity: the solution would
    spread it, or hide it."""
    read = reading(reader)

    def checked(name: str) -> Tensor:
        check_whole(reader, name)
        return read(name)

    return checked


def _class_name(checkpoint: Checkpoint) -> str:
    import transformers

    named = architecture(checkpoint.config)
    return named if hasattr(transformers, named) else "AutoModel"


def _units(shared: Sequence[SharedInput], groups: Mapping[str, Group]) -> list[Unit]:
    """groups: of the parameters that are completely localized."""
    found: list[tuple[list[SharedInput], dict[Group, None]]] = []
    of_group: dict[Group, int] = {}
    for one in shared:
        linears = tuple(_with_bias(linear, groups) for linear in one.linears if linear.weight.parameter in groups)
        if not linears:
            continue
        own = {groups[part.parameter]: None for linear in linears for part in parts_of(linear)}
        touched = sorted({of_group[group] for group in own if group in of_group})
        first = touched[0] if touched else len(found)
        if not touched:
            found.append(([], {}))
        for other in touched[1:]:
            found[first][0].extend(found[other][0])
            found[first][1].update(found[other][1])
            found[other] = ([], {})
        found[first][0].append(SharedInput(linears))
        found[first][1].update(own)
        of_group.update(dict.fromkeys(found[first][1], first))
    return [Unit(tuple(inputs), tuple(own)) for inputs, own in found if inputs]


def _with_bias(linear: Linear, groups: Mapping[str, Group]) -> Linear:
    """The layer without its bias where that is not localized."""
    keep = linear.bias is not None and linear.bias.parameter in groups
    return linear if keep or linear.bias is None else Linear(linear.weight, None, linear.transposed)


def parts_of(linear: Linear) -> list[Part]:
    return [linear.weight] if linear.bias is None else [linear.weight, linear.bias]


def matrices(weights: Weights, linears: Sequence[Linear]) -> list[Tensor]:
    """The layers' weights [outputs, inputs], in memory of their own; where one of them has a bias, all have a last
    column for it, which is 0 for those without."""
    biased = any(linear.bias for linear in linears)
    return [_matrix(weights, linear, biased) for linear in linears]


def _matrix(weights: Weights, linear: Linear, biased: bool) -> Tensor:
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


def is_vector(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor on disk that is in no linear layer is solved for element by element."""
    return len(shape) <= 1 or name.endswith("bias")  # those of experts lie in a stack
