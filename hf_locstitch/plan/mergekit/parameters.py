"""The parameters of a config of mergekit's, as settings of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from hf_locstitch.plan.mergekit.config import Branch, MergekitConfig, Parameters, Source
from hf_locstitch.plan.mergekit.inputs import Findings, Inputs
from hf_locstitch.plan.mergekit.layers import Layout, by_globs
from hf_locstitch.plan.mergekit.methods import KNOWN, MergekitMethod, Parameter, Takes
from hf_locstitch.stitch.per_tensor import PerTensor

BY_TENSOR = ("weights", "method.t", "method.density")  # fields that may differ between tensors


class Settings:
    """The parameters of a config."""

    def __init__(
        self,
        config: MergekitConfig,
        method: MergekitMethod,
        inputs: Inputs,
        layout: Callable[[], Layout],
        found: Findings,
    ) -> None:
        self._called, self._method, self._inputs = config.merge_method, method, inputs
        self._layout, self._found = layout, found
        self._common = _chain(config, inputs)
        self._own = [_chain(config, inputs, source) for source in inputs.sources]

    def check_layers(self) -> None:
        """Whether a slice is all of the model."""
        part = self._inputs.part
        if part is None:
            return
        stacks = self._layout().stacks
        counts = [max(layers) + 1 for layers in stacks.values()]
        if len(counts) != 1:
            self._found.problems.append(
                f"slices of a model with {len(counts)} stacks of layers are not known; use models"
            )
            return
        for source in part.sources:
            if source.layer_range != (0, counts[0]):
                self._found.problems.append(
                    f"the slice has the layers {list(source.layer_range)} of {source.model}, but the base has "
                    f"{counts[0]}, and here every layer keeps its place: use [0, {counts[0]}] or models"
                )

    def read(self) -> dict[str, Any]:
        """The fields of the recipe that parameters stand for, dotted."""
        self._check_names()
        fields: dict[str, Any] = {}
        for name, parameter in self._method.shared.items():
            if parameter.to is not None or parameter.only is not None:
                self._put(fields, name, parameter, [self._value(name, parameter, self._common)])
        for name, parameter in self._method.own.items():
            of_each = [
                self._value(name, parameter, chain, ref)
                for chain, ref in zip(self._own, self._inputs.refs, strict=True)
            ]
            if parameter.to == "weights":
                if any(weight != 1.0 for weight in of_each):
                    fields["weights"] = of_each
            elif self._method.takes is Takes.PAIR:
                fields[str(parameter.to)] = self._share(name, of_each)
            else:
                self._put(fields, name, parameter, of_each)
        return fields

    def _value(self, name: str, parameter: Parameter, chain: Sequence[Parameters], of: str = "") -> PerTensor:
        """A parameter's. chain: parameters in the order in which they count. of: the model, if it is a model's own."""
        branches = _branches(name, chain)
        if branches and branches[0].constant:
            return branches[0].values[0]
        called = f"{name} of {of}" if of else name
        if not branches:
            if parameter.default is None:
                self._found.problems.append(f"{called} is missing, and {self._called} needs it")
            return parameter.default if parameter.default is not None else 1.0
        return self._by_tensor(called, parameter, branches)

    def _by_tensor(self, called: str, parameter: Parameter, branches: Sequence[Branch]) -> PerTensor:
        if parameter.to not in BY_TENSOR:
            self._found.problems.append(f"{called} differs between layers or tensors; here it is one for all")
            return 1.0
        layout = self._layout()
        for part in dict.fromkeys(branch.filter for branch in branches if branch.filter is not None):
            if not any(part in name for name in layout.names):
                self._found.notes.append(f"{called}: the filter {part!r} is in no tensor's name")
        value, left = by_globs(branches, parameter.default, layout)
        if left:
            self._found.problems.append(f"{called} has no value for {left[0]}: add one without a filter")
        return value

    def _put(self, fields: dict[str, Any], name: str, parameter: Parameter, values: Sequence[PerTensor]) -> None:
        """A setting that is the same for all models, or one that has an entry for each."""
        first = values[0]
        if any(value != first or isinstance(value, Mapping) for value in values) and parameter.each is not None:
            fields[parameter.each] = list(values)
            return
        if any(value != first for value in values):
            listed = ", ".join(f"{value} of {ref}" for value, ref in zip(values, self._inputs.refs, strict=True))
            self._found.problems.append(f"{name} differs between models ({listed}); here it is one for all: use one")
            return
        if isinstance(parameter.default, bool | int) and not isinstance(first, Mapping):
            first = type(parameter.default)(first)
        if parameter.only is not None and first != parameter.only:
            self._found.problems.append(f"{name}: {str(first).lower()} has no counterpart: {parameter.why}")
        elif parameter.to is not None:
            fields[parameter.to] = first

    def _share(self, name: str, weights: Sequence[PerTensor]) -> float:
        """How far from the first of two models to the second their weights lead."""
        numbers = [weight for weight in weights if not isinstance(weight, Mapping)]
        if len(numbers) < len(weights):
            self._found.problems.append(f"{name} differs between layers or tensors; write it as the t of slerp instead")
            return 0.5
        return numbers[1] / sum(numbers) if sum(numbers) else 0.5

    def _check_names(self) -> None:
        """Parameters that mergekit does not read here, and those that nobody knows."""
        shared, own = self._method.shared, self._method.own
        for name in dict.fromkeys(name for given in self._common for name in given or {}):
            self._check_name(name, read=name in shared or name in own)
        for source in self._inputs.sources:
            for name in source.parameters or {}:
                if name in shared and name not in own:
                    self._found.notes.append(
                        f"{name} of {source.model} is left out, as in mergekit, which reads it for all models at once"
                    )
                else:
                    self._check_name(name, read=name in own)

    def _check_name(self, name: str, *, read: bool) -> None:
        if name not in KNOWN:
            near = get_close_matches(name, KNOWN, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"{self._called} has none of that name"
            self._found.problems.append(f"unknown parameter {name!r} ({hint})")
        elif not read:
            self._found.notes.append(
                f"{name} is left out: {self._called} has no such parameter, and mergekit ignores it"
            )


def _chain(config: MergekitConfig, inputs: Inputs, source: Source | None = None) -> list[Parameters]:
    """Where parameters of a model, or those of all, are looked for, in this order."""
    return [
        *([source.parameters] if source else []),
        inputs.part.parameters if inputs.part else None,
        config.parameters,
    ]


def _branches(name: str, chain: Sequence[Parameters]) -> list[Branch]:
    return [branch for given in chain if given for branch in given.get(name, ())]


def vary(config: MergekitConfig, inputs: Inputs, method: MergekitMethod) -> bool:
    """Whether a parameter of a model that is one for all differs between models or tensors."""
    single = [name for name, parameter in method.own.items() if parameter.to not in BY_TENSOR]
    values = {
        name: {tuple(_branches(name, _chain(config, inputs, source))[:1]) for source in inputs.sources}
        for name in single
    }
    return any(len(found) > 1 or any(one and not one[0].constant for one in found) for found in values.values())
