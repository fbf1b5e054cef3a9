"""The layers that a refit without data solves for, from names and the config alone: before the work starts, too."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.config import architecture
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.runtime.human import some
from hf_locstitch.runtime.progress import hide_all_library_bars
from hf_locstitch.stitch.dataless.shared_inputs import SharedInput, shared_inputs
from hf_locstitch.stitch.refit.models import NO_REFIT
from hf_locstitch.stitch.refit.stops import Linear
from hf_locstitch.stitch.refit.weights import Part, hollow
from hf_locstitch.tasks.empty_model import attach_conversions, empty_model
from hf_locstitch.tasks.fused_tensors import experts_on_disk
from hf_locstitch.tasks.loading import config_of
from hf_locstitch.tasks.parameter_names import Group, group_buffers, group_names

NOT_LINEAR = "not called as a linear layer"


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
class Piece:
    """Elements first … first + count of a tensor on disk."""

    name: str
    first: int
    count: int


@dataclass(frozen=True)
class Layers:
    """model: without weights; parts: its parameters by name; disk: names of the base's tensors. units: of the localized
    linear layers. others: localized tensors on disk that are in none. pieces: of stacks of experts, by parameter, what
    each expert consists of; stacks that are put together otherwise are not among them.

    not_run: localized tensors of a part of the model that could not be run, and why. Those in a unit are there by
    themselves, as what shares their input is not known.
    """

    model: object
    parts: Mapping[str, Part]
    disk: Sequence[str]
    units: Sequence[Unit]
    others: Sequence[str]
    not_run: Mapping[str, str] = field(default_factory=dict)
    pieces: Mapping[str, Sequence[Sequence[Piece]]] = field(default_factory=dict)

    def pieces_of(self, part: Part) -> Sequence[Piece] | None:
        """What one of the stacked experts consists of, its elements in order. None for what is a whole parameter, or
        a part of a stack that cannot be cut."""
        if part.index is None or part.parameter not in self.pieces:
            return None
        return self.pieces[part.parameter][part.index]

    def why_plain(self, name: str) -> str:
        """Why a tensor of the others that is no vector keeps the mean of the finetuned values."""
        why = self.not_run.get(name)
        return NOT_LINEAR if why is None else f"the model could not be run: {why}"


def layer_warnings(base: Checkpoint, localized: Collection[str]) -> Iterator[str]:
    """A sentence on what of the model could not be run. Raises RequestError as layers_of."""
    layers = layers_of(base, localized)
    if not layers.not_run:
        return
    plain = sum(name in layers.not_run for name in layers.others)
    kept = f", and {plain} of them keep the mean of the finetuned values" if plain else ""
    yield (
        f"a part of {base.label} could not be run on a made-up input ({next(iter(layers.not_run.values()))}): which of "
        f"its linear layers share an input is not known, so each is solved for by itself{kept} "
        f"({some(list(layers.not_run))})."
    )


def is_vector(info: TensorInfo) -> bool:
    """Whether it is solved for element by element; the biases of experts lie in a stack."""
    return len(info.shape) <= 1 or info.name.endswith("bias")


def layers_of(base: Checkpoint, localized: Collection[str]) -> Layers:
    """localized: names on disk. Raises RequestError where transformers cannot build the model."""
    named = json.dumps(base.config, sort_keys=True)
    return _layers(named, base.label, tuple(base.shapes.items()), tuple(localized))


@lru_cache(maxsize=1)  # for a plan and its description
@hide_all_library_bars()
def _layers(
    config: str, label: str, shapes: tuple[tuple[str, tuple[int, ...]], ...], localized: tuple[str, ...]
) -> Layers:
    fields, disk = json.loads(config), tuple(name for name, _ in shapes)
    model = empty_model(_class_name(fields), config_of(fields, label, NO_REFIT), NO_REFIT)
    attach_conversions(model, disk, dict(shapes))
    parts = hollow(model, disk, torch.device("cpu"))
    inside = frozenset(localized)
    groups: dict[str, Group] = {}  # of the parameters that are completely localized
    for group in [*group_names(model, disk), *group_buffers(model, disk)]:
        if inside.issuperset(group.disk):
            for parameter in group.parameters:
                groups.setdefault(parameter, group)
    seen = shared_inputs(model, lambda name: name in groups and parts[name].dim > 1)
    units = _units(seen.inputs, groups)
    within = {name for unit in units for name in unit.disk}
    not_run = {name: why for parameter, why in seen.not_run.items() for name in groups[parameter].disk}
    others = [name for name in localized if name not in within]
    return Layers(model, parts, disk, units, others, not_run, dict(_pieces(model, units, parts)))


def _class_name(config: Mapping[str, object]) -> str:
    import transformers

    named = architecture(config)
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


def _pieces(
    model: object, units: Sequence[Unit], parts: Mapping[str, Part]
) -> Iterator[tuple[str, Sequence[Sequence[Piece]]]]:
    """Of the stacks that are solved for expert by expert, in their order."""
    one_by_one = experts_on_disk(model, [group for unit in units for group in unit.groups])
    for unit in units:
        indices: dict[str, list[int | None]] = {}
        for part in (part for shared in unit.inputs for linear in shared.linears for part in parts_of(linear)):
            indices.setdefault(part.parameter, []).append(part.index)
        for group in unit.groups:
            parameter = group.parameters[0]
            experts, size = parts[parameter].shape[0], math.prod(parts[parameter].shape[1:])
            if len(group.parameters) > 1 or indices.get(parameter) != list(range(experts)):
                continue
            names = one_by_one.get(group, [])
            if group.direct:
                yield parameter, [[Piece(group.disk[0], size * expert, size)] for expert in range(experts)]
            elif len(names) == experts and size % len(names[0]) == 0:
                yield parameter, [[Piece(name, 0, size // len(own)) for name in own] for own in names]


def parts_of(linear: Linear) -> list[Part]:
    return [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
