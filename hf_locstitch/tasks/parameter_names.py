"""From parameters in memory to tensors on disk: names, fused experts, prefixes, ties.

transformers converts some checkpoints while it loads them: experts are stacked, prefixes added, tensors renamed.
Scores have the parameters' layout and must be mapped back to the names on disk. transformers' own reverse conversion
does this for any tensor of a parameter's shape; `check` verifies it on the weights before it is used for scores.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_locstitch.errors import MismatchError, RequestError


@dataclass(frozen=True)
class Group:
    """Parameters that are converted together. state: (name in the state dict, name of the parameter) of each.

    disk: names of the tensors that they form. direct: one parameter is one tensor, under any name.
    """

    state: tuple[tuple[str, str], ...]
    disk: tuple[str, ...]
    direct: bool

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(parameter for _, parameter in self.state)


def group_names(model: Any, disk: Collection[str]) -> list[Group]:
    """How the tensors on disk that the model uses correspond to its parameters.

    model: a transformers model, loaded by from_pretrained or built of its config. A tensor that is not a parameter of
    it belongs to no group; tied parameters that are stored twice make two groups.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, apply_converters

    mapping = get_model_conversion_mapping(model)
    state = model.state_dict(keep_vars=True)
    canonical = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: list[Group] = []
    converted: dict[str, list[str]] = defaultdict(list)  # a name in the state dict -> on disk
    for name, key, pattern in _keys(model, state, disk):
        if key not in state or id(state[key]) not in canonical:
            continue
        if pattern is None:
            groups.append(Group(((key, canonical[id(state[key])]),), (name,), direct=True))
        else:
            converted[key].append(name)
    if not converted:
        return groups
    reverse = [entry.reverse_transform() for entry in (getattr(model, "_weight_conversions", None) or mapping)[::-1]]
    reverse = [entry for entry in reverse if isinstance(entry, WeightConverter)]
    together: dict[str, list[str]] = defaultdict(list)  # converted by one converter -> names in the state dict
    for key, parameter in state.items():
        target, pattern = apply_converters(key, reverse)
        if pattern is not None and id(parameter) in canonical:
            together[target].append(key)
    for keys in together.values():
        names = [name for key in keys for name in converted.get(key, ())]
        if names:
            pairs = tuple((key, canonical[id(state[key])]) for key in sorted(keys))
            groups.append(Group(pairs, tuple(names), direct=False))
    return groups


def group_buffers(model: Any, disk: Collection[str]) -> list[Group]:
    """Likewise of the floating-point buffers that the tensors on disk hold as they are, such as routers' biases."""
    state = model.state_dict(keep_vars=True)
    buffers = {name for name, buffer in model.named_buffers() if buffer.is_floating_point() and name in state}
    return [
        Group(((key, key),), (name,), direct=True)
        for name, key, pattern in _keys(model, state, disk)
        if key in buffers and pattern is None
    ]


def state_shapes(model: Any, disk: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Of the tensors on disk that are one entry of the model's state each, under any name: its shape there."""
    state = model.state_dict(keep_vars=True)
    return {
        name: tuple(state[key].shape)
        for name, key, pattern in _keys(model, state, disk)
        if key in state and pattern is None
    }


def _keys(model: Any, state: dict[str, Any], disk: Collection[str]) -> Iterator[tuple[str, str, str | None]]:
    """(name on disk, name in the state dict, the pattern by which it is converted, if it is), sorted."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    for name in sorted(disk):
        key, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if key not in state and name in state:
            key, pattern = name, None
        yield name, key, pattern


def to_disk(model: Any, group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the parameters' shapes, as the tensors on disk. tensors: parameter -> [*shape]. Keys as group.disk.

    Raises MismatchError if the reverse conversion gives other names.
    """
    if group.direct:
        return {group.disk[0]: tensors[group.parameters[0]]}
    from transformers.core_model_loading import revert_weight_conversion

    converted = revert_weight_conversion(model, {key: tensors[parameter] for key, parameter in group.state})
    prefix = model.base_model_prefix + "."
    by_stem = {name.removeprefix(prefix): tensor for name, tensor in converted.items()}
    missing = [name for name in group.disk if name.removeprefix(prefix) not in by_stem]
    if missing:
        raise MismatchError(
            [
                f"{missing[0]} on disk is not among the tensors that {', '.join(group.parameters[:3])} convert to "
                f"({', '.join(sorted(converted)[:3])}); use a localizer without data, or leave it out with --exclude"
            ]
        )
    return {name: by_stem[name.removeprefix(prefix)] for name in group.disk}


def from_disk(model: Any, group: Group, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of to_disk, from where each element of a parameter lands. Returns parameter -> float32, or
    float64 where that is read, zero where it is of no tensor of the group, such as an expert that was left out."""
    shapes = {name: model.get_parameter(name).shape for name in group.parameters}
    if group.direct:
        return {group.parameters[0]: _wide(read(group.disk[0]).reshape(shapes[group.parameters[0]]))}
    numels = [shapes[name].numel() for name in group.parameters]
    numbers = torch.arange(sum(numels)).split(numels)
    places = {name: own.view(shapes[name]) for name, own in zip(group.parameters, numbers, strict=True)}
    whole = torch.zeros(sum(numels))
    for name, where in to_disk(model, group, places).items():
        values = _wide(read(name).reshape(-1))
        whole = whole.to(torch.promote_types(whole.dtype, values.dtype))
        whole[where.reshape(-1)] = values
    parts = zip(group.parameters, whole.split(numels), strict=True)
    return {name: values.view(shapes[name]) for name, values in parts}


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def chosen_groups(groups: Sequence[Group], localized: Collection[str], where: str) -> list[Group]:
    """The groups that the localized tensors belong to.

    Raises MismatchError if one of those is in no group, or a group mixes localized and other tensors.
    """
    covered = {name for group in groups for name in group.disk}
    problems = []
    if absent := [name for name in localized if name not in covered]:
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        problems.append(
            f"{absent[0]}{more} is to be localized but is not a parameter of the model that transformers builds from "
            f"{where}; leave it out with --exclude, or use a localizer without data"
        )
    chosen = []
    for group in groups:
        inside = [name for name in group.disk if name in localized]
        if inside and len(inside) < len(group.disk):
            outside = next(name for name in group.disk if name not in localized)
            problems.append(
                f"{inside[0]} is to be localized and {outside} is not, but both are one parameter in memory "
                f"({group.parameters[0]}); include both or exclude both"
            )
        if inside:
            chosen.append(group)
    if problems:
        raise MismatchError(problems)
    return chosen


def check(
    model: Any, groups: Sequence[Group], weights: Mapping[str, torch.Tensor], on_disk: Callable[[str], torch.Tensor]
) -> None:
    """Check that the weights, mapped to disk, equal the weights on disk, bit for bit in the model's dtype.

    weights: parameter -> as loaded; on_disk: name -> [*shape]. Raises RequestError naming the first that differs.
    """
    for group in groups:
        for name, mapped in to_disk(model, group, weights).items():
            due = on_disk(name)
            if mapped.shape != due.shape or not _same_bits(mapped, due.to(mapped.dtype)):
                raise RequestError(
                    f"{group.parameters[0]}, mapped back to disk, differs from {name} as stored (shapes "
                    f"{list(mapped.shape)} "
                    f"and {list(due.shape)}): gradients could not be trusted to land in the right place. Use a "
                    "localizer without data, or leave the tensor out with --exclude."
                )


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Of tensors with one dtype and shape; NaN equals itself."""
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
