"""Localized checkpoints put into a loaded model and taken out again, in place.

Any number of them: at every moment the model's weights are those of the merge of what is in it, to the bit. Everything
is checked and computed before the first weight is written; what fails then leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from hf_locstitch.artifacts.graft_target import in_one_place, put, take, unwrapped, unwritable
from hf_locstitch.errors import IntegrityError, MismatchError, RequestError
from hf_locstitch.runtime.human import counted, more, some
from hf_locstitch.tasks.parameter_names import Group, from_disk, group_buffers, group_names, to_disk

if TYPE_CHECKING:
    from hf_locstitch.artifacts.mask_file import Positions

ATTRIBUTE = "_locstitch_grafts"
_CHANGED: WeakSet[Any] = WeakSet()  # models that have been given something, some of which share their weights

Identity = tuple[str, ...]


class Localized(Protocol):
    """A LocalizedCheckpoint."""

    @property
    def label(self) -> str: ...

    @property
    def identity(self) -> Identity: ...

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


@dataclass(frozen=True)
class Graft:
    """One localized checkpoint in a model. label: for people. places: by parameter, where it has any."""

    label: str
    places: Mapping[str, Place]


@dataclass(frozen=True)
class Layer:
    """One graft in one parameter. values: [m]. index: where its positions are among all that grafts cover."""

    values: Tensor
    index: Any


@dataclass(frozen=True)
class Grafted:
    """What is in a model. originals: of each parameter, every position that a graft covers, and the value without any.

    grafts: by what they are.
    """

    originals: Mapping[str, Place] = field(default_factory=dict)
    grafts: Mapping[Identity, Graft] = field(default_factory=dict)

    def layers(self, name: str) -> dict[Identity, Layer]:
        """The grafts in a parameter, in the order in which a stitch sums them."""
        places = {key: graft.places[name] for key, graft in sorted(self.grafts.items()) if name in graft.places}
        return {key: Layer(place.values, _among(self.originals[name].at, place.at)) for key, place in places.items()}


@dataclass(frozen=True)
class Change:
    """To be written into a parameter. before, after: values [m] at flat positions."""

    parameter: Tensor
    at: Tensor
    before: Tensor
    after: Tensor


@torch.no_grad()
def apply_graft(localized: Localized, model: Any) -> None:
    """Put its values under its mask into the model; what is raised leaves that as it was.

    Raises TypeError if it is no transformers model, MismatchError where that is not of its kind, and RequestError where
    values cannot be written into it, or it is in the model already.
    """
    model = unwrapped(model)
    now, identity = _inside(model), localized.identity
    if identity in now.grafts:
        raise RequestError(f"{localized.label} is in this model already. Remove it before you apply it again.")
    parameters = _weights(model)
    graft = Graft(localized.label, _places(localized, model, parameters))
    _check_alone(localized, model, {name: parameters[name] for name in graft.places})
    originals = dict(now.originals)
    for name, place in graft.places.items():
        known, parameter = now.originals.get(name), parameters[name]
        if known is not None:
            _check_as_left(now, name, parameter, now.layers(name))
        originals[name] = _remembered(known, parameter, place.at)
    after, changes = Grafted(originals, {**now.grafts, identity: graft}), []
    for name, place in graft.places.items():
        layers = after.layers(name)
        values = stitched(originals[name], layers.values())[layers[identity].index]
        changes.append(Change(parameters[name], place.at, take(parameters[name], place.at), values))
    _write(changes)
    _set_inside(model, after)


@torch.no_grad()
def remove_graft(localized: Localized, model: Any) -> None:
    """Take it out of the model; what is raised leaves that as it was.

    Raises TypeError as apply_graft, and RequestError if it is not in the model, or weights are not as they were left.
    """
    model = unwrapped(model)
    now, identity = _inside(model), localized.identity
    if identity not in now.grafts:
        inside = some([graft.label for graft in now.grafts.values()]) or "no localized checkpoint"
        others = [other for other, *_ in _sharing(model, _weights(model))]
        kind = next((type(other).__name__ for other in others if identity in _inside(other).grafts), None)
        way = f" It was applied to a {kind} that shares its weights: remove it there." if kind else ""
        raise RequestError(f"{localized.label} is not in this model, which has {inside} in it.{way}")
    parameters, originals, changes = _weights(model), dict(now.originals), []
    for name, place in now.grafts[identity].places.items():
        layers = now.layers(name)
        parameter = _check_as_left(now, name, parameters.get(name), layers)
        index, original = layers.pop(identity).index, originals.pop(name)
        values = stitched(original, layers.values())[index]
        changes.append(Change(parameter, place.at, take(parameter, place.at), values))
        if layers:
            originals[name] = _covered(original, layers.values())
    _write(changes)
    _set_inside(model, Grafted(originals, {key: other for key, other in now.grafts.items() if key != identity}))


def _inside(model: Any) -> Grafted:
    return getattr(model, ATTRIBUTE, Grafted())


def _set_inside(model: Any, grafted: Grafted) -> None:
    object.__setattr__(model, ATTRIBUTE, grafted)  # no module, no buffer: it is not saved with the model
    _CHANGED.add(model)


def _check_alone(localized: Localized, model: Any, parameters: Mapping[str, Tensor]) -> None:
    """Raises RequestError if weights that it would change were changed through another model that shares them, such as
    the one around it: what they are without is known there."""
    for other, own, theirs in _sharing(model, parameters):
        inside = [graft.label for graft in _inside(other).grafts.values() if theirs in graft.places]
        raise RequestError(
            f"{own} of this {type(model).__name__} is {theirs} of a {type(other).__name__} with {some(inside)} in it. "
            f"Apply {localized.label} to that model, or remove first what is in it."
        )


def _sharing(model: Any, parameters: Mapping[str, Tensor]) -> Iterator[tuple[Any, str, str]]:
    """Other models in which something is, and a parameter of each side that are in one place in memory."""
    for other in list(_CHANGED):
        weights = _weights(other) if other is not model and _inside(other).originals else {}
        changed = {name: weights[name] for name in _inside(other).originals if name in weights}
        if pair := in_one_place(parameters, changed):
            yield other, *pair


def _write(changes: Sequence[Change]) -> None:
    """All of them, or none."""
    for number, change in enumerate(changes):
        try:
            put(change.parameter, change.at, change.after)
        except BaseException:
            for done in changes[: number + 1]:
                put(done.parameter, done.at, done.before)
            raise


def _check_as_left(now: Grafted, name: str, parameter: Tensor | None, layers: Mapping[Identity, Layer]) -> Tensor:
    """The parameter. Raises RequestError if weights that grafts have changed are not what they were left as."""
    original, changed = now.originals[name], "is not the parameter that it was"
    if parameter is not None and not unwritable(parameter) and original.at[-1] < parameter.numel():
        due = stitched(original, layers.values()).to(parameter.dtype)
        if _same_bits(take(parameter, original.at), due):
            return parameter
        changed = "has other values than it had"
    inside = some([now.grafts[key].label for key in layers])
    raise RequestError(
        f"{name} {changed} once {inside} was in this model: it was trained, loaded or converted since, and what it "
        "would be without is not known. Load the model again."
    )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _weights(model: Any) -> dict[str, Tensor]:
    """Parameters, and the buffers that files hold, such as routers' biases."""
    return {**dict(model.named_buffers()), **dict(model.named_parameters())}


def _places(localized: Localized, model: Any, parameters: Mapping[str, Tensor]) -> dict[str, Place]:
    """Its values by the model's parameters, of those that it changes. Raises RequestError, IntegrityError."""
    disk = list(localized.shapes)
    groups = [*group_names(model, disk), *group_buffers(model, disk)]
    _check_fit(localized, model, parameters, groups)
    places: dict[str, Place] = {}
    for group in groups:
        for name, place in [_direct(localized, group)] if group.direct else _converted(localized, model, group):
            if name in places and not _same(places[name], place):
                raise MismatchError(
                    [
                        f"{group.disk[0]} and another tensor of {localized.label} are one parameter of this model, "
                        f"{name}, but differ; load the model with tie_word_embeddings=False"
                    ]
                )
            places[name] = place
    return {name: place for name, place in places.items() if len(place.at)}


def _check_fit(localized: Localized, model: Any, parameters: Mapping[str, Tensor], groups: Sequence[Group]) -> None:
    """Raises MismatchError if it does not fit the model, RequestError if the model cannot be written into."""
    kind, label = type(model).__name__, localized.label
    known = {name for group in groups for name in group.disk}
    if lacking := [name for name in localized.shapes if name not in known]:
        raise MismatchError(
            [
                f"{lacking[0]}{more(len(lacking))} of {label} is not a parameter of this {kind}; load the model that "
                "it was localized for, with the class that its config names"
            ]
        )
    used = [name for group in groups for name in group.parameters]
    if refused := [(name, reason) for name in used if (reason := unwritable(parameters[name]))]:
        name, reason = refused[0]
        raise RequestError(f"{label} cannot be put into this {kind}: {name}{more(len(refused))} {reason}.")
    if wrong := [found for group in groups for found in _unlike(localized, model, parameters, group)]:
        name, shape = wrong[0]
        raise MismatchError(
            [
                f"{name} is {list(localized.shapes[name])} in {label} but {shape} in this {kind}{more(len(wrong))}; "
                "load the model that it was localized for"
            ]
        )


def _unlike(
    localized: Localized, model: Any, parameters: Mapping[str, Tensor], group: Group
) -> Iterator[tuple[str, str]]:
    """Tensors that have another shape in the model, and that shape."""
    hollow = {name: torch.empty(parameters[name].shape, device="meta") for name in group.parameters}
    try:
        own = to_disk(model, group, hollow)
    except MismatchError:  # its parameters do not hold them all, such as fewer experts
        own = {}
    for name in group.disk:
        shape = list(own[name].shape) if name in own else None
        if shape != list(localized.shapes[name]):
            yield name, f"no such part of {group.parameters[0]}" if shape is None else str(shape)


def _direct(localized: Localized, group: Group) -> tuple[str, Place]:
    (name,), (parameter,) = group.disk, group.parameters
    return parameter, _stored(localized, name)


def _stored(localized: Localized, name: str) -> Place:
    place = Place(torch.from_numpy(localized.positions(name)), localized.values(name))
    if len(place.at) != len(place.values):
        raise IntegrityError(
            f"{localized.label} is damaged: {name} has {counted(len(place.values), 'value')} for the "
            f"{len(place.at)} ones of its mask. Fetch it again."
        )
    return place


def _converted(localized: Localized, model: Any, group: Group) -> Iterator[tuple[str, Place]]:
    """Of parameters that transformers makes of several tensors, such as stacked experts, in a dtype that holds all
    values."""

    def dense(name: str) -> Tensor:
        place = _stored(localized, name)
        whole = torch.zeros(localized.shapes[name], dtype=torch.promote_types(place.values.dtype, torch.float32))
        whole.view(-1)[place.at] = place.values.to(whole.dtype)
        return whole

    masks = from_disk(model, group, localized.mask)
    for parameter, values in from_disk(model, group, dense).items():
        at = masks[parameter].reshape(-1).nonzero().flatten()
        yield parameter, Place(at, values.reshape(-1)[at])


def _same(one: Place, other: Place) -> bool:
    return torch.equal(one.at, other.at) and torch.equal(one.values, other.values)


def _remembered(known: Place | None, parameter: Tensor, at: Tensor) -> Place:
    """The original values, with those of positions that no graft has covered before."""
    if known is None:
        return Place(at, take(parameter, at))
    follows = _search(known.at, at)
    new = known.at[follows.clamp(max=len(known.at) - 1)] != at
    at, follows = at[new], follows[new]
    ours = torch.arange(len(known.at)) + _search(at, known.at)
    theirs = torch.arange(len(at)) + follows
    wider = torch.promote_types(known.values.dtype, parameter.dtype)  # they differ where the model was converted since
    both = Place(known.at.new_empty(len(ours) + len(theirs)), torch.empty(len(ours) + len(theirs), dtype=wider))
    both.at[ours], both.at[theirs] = known.at, at
    both.values[ours], both.values[theirs] = known.values.to(wider), take(parameter, at).to(wider)
    return both


def _covered(original: Place, layers: Iterable[Layer]) -> Place:
    """The part that grafts cover: elsewhere the weights are the model's own again, and may change."""
    covered = torch.zeros(len(original.at), dtype=torch.bool)
    for layer in layers:
        covered[layer.index] = True
    return Place(original.at[covered], original.values[covered])


def _among(positions: Tensor, chosen: Tensor) -> Any:
    """Where some of ascending positions are among them all: an index."""
    return slice(None) if len(chosen) == len(positions) else _search(positions, chosen)


def _search(ascending: Tensor, others: Tensor) -> Tensor:
    """How many come before each of the others, ascending too, which numpy makes use of."""
    return torch.from_numpy(np.searchsorted(ascending.numpy(), others.numpy()))


def stitched(original: Place, layers: Collection[Layer]) -> Tensor:
    """As stitch/mean.py has it: the original, one graft's value, or the mean in float64, rounded once."""
    values = original.values.clone()
    for layer in layers:
        values[layer.index] = layer.values.to(values.dtype)
    if len(layers) < 2:
        return values
    times = torch.zeros(values.shape, dtype=torch.int32)
    total = torch.full(values.shape, -0.0, dtype=torch.float64)  # the neutral element of addition, which +0 is not
    for layer in layers:
        times[layer.index] += 1
        total[layer.index] += layer.values.double()
    shared = times > 1
    values[shared] = (total[shared] / times[shared]).to(values.dtype)
    return values
