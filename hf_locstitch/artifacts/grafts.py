"""Localized checkpoints put into a loaded model and taken out again, in place.

Any number of them: at every moment the model's weights are those of the merge of what is in it, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from hf_locstitch.errors import MismatchError, RequestError
from hf_locstitch.tasks.parameter_names import Group, chosen_groups, from_disk, group_names

if TYPE_CHECKING:
    from hf_locstitch.artifacts.mask_file import Positions
    from hf_locstitch.checkpoints.source import Source

ATTRIBUTE = "_locstitch_grafts"


class Localized(Protocol):
    """A LocalizedCheckpoint."""

    @property
    def source(self) -> Source: ...

    @property
    def label(self) -> str: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def positions(self, tensor: str) -> Positions: ...

    def values(self, tensor: str) -> Tensor: ...

    def mask(self, tensor: str) -> Tensor: ...


@dataclass(frozen=True)
class Place:
    """Of one graft in one parameter. at: flat positions, int64 [m], ascending; values: [m]."""

    at: Tensor
    values: Tensor


@dataclass
class Grafted:
    """What is in a model. originals: of each parameter, every position that was ever changed, and the value there.

    grafts: by the pinned ref of the localized checkpoint, places by parameter.
    """

    originals: dict[str, Place] = field(default_factory=dict)
    grafts: dict[str, dict[str, Place]] = field(default_factory=dict)


@torch.no_grad()
def apply_graft(localized: Localized, model: Any) -> None:
    """Put its values under its mask into the model. Raises MismatchError where the model is not of its kind, and
    RequestError if it is in the model already; the model is then as before."""
    grafted = _state(model)
    if localized.source.pinned in grafted.grafts:
        raise RequestError(f"{localized.label} is in this model already. Remove it before you apply it again.")
    places = dict(_places(localized, model))
    for name, place in places.items():
        _remember(grafted, name, model.get_parameter(name), place)
    grafted.grafts[localized.source.pinned] = places
    _write(grafted, model, places)


@torch.no_grad()
def remove_graft(localized: Localized, model: Any) -> None:
    """Take it out of the model. Raises RequestError if it is not in it."""
    grafted = _state(model)
    if localized.source.pinned not in grafted.grafts:
        inside = ", ".join(grafted.grafts) or "none"
        raise RequestError(f"{localized.label} is not in this model ({inside} is). Apply it first.")
    places = grafted.grafts.pop(localized.source.pinned)
    _write(grafted, model, places)


def _state(model: Any) -> Grafted:
    if not hasattr(model, ATTRIBUTE):
        object.__setattr__(model, ATTRIBUTE, Grafted())  # no module, no buffer: it is not saved with the model
    return getattr(model, ATTRIBUTE)


def _places(localized: Localized, model: Any) -> Iterator[tuple[str, Place]]:
    """Its values by the model's parameters. Raises MismatchError."""
    groups = chosen_groups(group_names(model, list(localized.shapes)), localized.shapes, "this model")
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for group in groups:
        if group.direct:
            (name,), parameter = group.disk, group.parameters[0]
            _check_shape(localized, name, sizes[parameter])
            yield parameter, Place(torch.from_numpy(localized.positions(name)), localized.values(name))
        else:
            yield from _converted(localized, model, group)


def _check_shape(localized: Localized, name: str, shape: Iterable[int]) -> None:
    if tuple(shape) != tuple(localized.shapes[name]):
        raise MismatchError(
            [f"{name} is {list(localized.shapes[name])} in {localized.label} but {list(shape)} in this model"]
        )


def _converted(localized: Localized, model: Any, group: Group) -> Iterator[tuple[str, Place]]:
    """Of parameters that transformers makes of several tensors, such as stacked experts. float32 holds all values."""

    def dense(name: str) -> Tensor:
        whole = torch.zeros(localized.shapes[name])
        whole.view(-1)[torch.from_numpy(localized.positions(name))] = localized.values(name).float()
        return whole

    masks = from_disk(model, group, localized.mask)
    for parameter, values in from_disk(model, group, dense).items():
        at = masks[parameter].reshape(-1).nonzero().flatten()
        yield parameter, Place(at, values.reshape(-1)[at])


def _remember(grafted: Grafted, name: str, parameter: Tensor, place: Place) -> None:
    """The values of positions that are changed for the first time."""
    known = grafted.originals.get(name)
    flat = parameter.data.reshape(-1)
    if known is None:
        grafted.originals[name] = Place(place.at, flat[place.at.to(flat.device)].cpu())
        return
    new = place.at[~torch.isin(place.at, known.at)]
    at, order = torch.cat([known.at, new]).sort()
    values = torch.cat([known.values, flat[new.to(flat.device)].cpu()])[order]
    grafted.originals[name] = Place(at, values)


def _write(grafted: Grafted, model: Any, places: Iterable[str]) -> None:
    """The parameters' values at every position that was ever changed: the original, one graft's, or the mean."""
    for name in places:
        parameter, original = model.get_parameter(name), grafted.originals[name]
        values = _stitched(original, [one[name] for one in grafted.grafts.values() if name in one])
        flat = parameter.data.view(-1)
        flat[original.at.to(flat.device)] = values.to(flat.device, flat.dtype)


def _stitched(original: Place, grafts: list[Place]) -> Tensor:
    """As stitch/mean.py has it: the mean in float64, rounded once."""
    total = torch.zeros(len(original.at), dtype=torch.float64)
    times = torch.zeros(len(original.at), dtype=torch.int64)
    for graft in grafts:
        here = torch.searchsorted(original.at, graft.at)
        total[here] += graft.values.double()
        times[here] += 1
    mean = (total / times.clamp(min=1)).to(original.values.dtype)
    return torch.where(times > 0, mean, original.values)
