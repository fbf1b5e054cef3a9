"""One refit at one lambda: all inputs go through all models side by side, and each linear layer is fitted when reached.

The inputs of a layer come from the merged model, in which all layers before it are already refitted; its target is the
output of the same layer in the finetuned model on its own activations. Where the model adds the output directly to
another tensor (the residual stream), the sums should agree: such a layer compensates errors of the layers before it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_locstitch.errors import RequestError
from hf_locstitch.runtime.chunks import for_each
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.stitch.fitted_values import FittedWriter
from hf_locstitch.stitch.refit.agreement import judge
from hf_locstitch.stitch.refit.experts import StackedExperts
from hf_locstitch.stitch.refit.jobs import make_pairs
from hf_locstitch.stitch.refit.least_squares import LeastSquares, Problem, Target, Targets
from hf_locstitch.stitch.refit.lockstep import LockstepStop, Pair, lockstep
from hf_locstitch.stitch.refit.models import TaskModels
from hf_locstitch.stitch.refit.param_groups import ParamGroups
from hf_locstitch.stitch.refit.passes import Pass
from hf_locstitch.stitch.refit.plain import PlainStitch
from hf_locstitch.stitch.refit.settings import RefitSettings
from hf_locstitch.stitch.refit.states import MakeStates
from hf_locstitch.stitch.refit.stops import Experts, Key, Linear
from hf_locstitch.stitch.refit.weights import Part
from hf_locstitch.tasks.parameter_names import Group, from_disk

Advance = Callable[[int], object]
Score = tuple[int, int, float, int]  # task, batch, score summed over rows, number of rows


@dataclass
class Seen:
    """What tracing the models once shows. calls: how often each linear layer is called in a pass, in order.

    added, used: layers whose output is added to another tensor, or used in any other way.
    """

    calls: Counter[Key] = field(default_factory=Counter)
    added: set[Key] = field(default_factory=set)
    used: set[Key] = field(default_factory=set)

    @property
    def last(self) -> Key | None:
        return next(reversed(self.calls), None)

    @property
    def sums(self) -> frozenset[Key]:
        """Layers that can be fitted when their output is added, so that they compensate for what it is added to."""
        return frozenset(self.added - self.used)

    @property
    def twice(self) -> set[Key]:
        """Layers called more than once: fitting them at the first call would spoil the second."""
        return {key for key, calls in self.calls.items() if calls > 1}


def stops_of(task_models: TaskModels, plain: PlainStitch) -> frozenset[str]:
    """Parameters at whose use a refit stops: matrices, and experts' stacks of them, that are completely localized."""
    return frozenset(
        name
        for name, part in task_models.parts.items()
        if (part.dim == 2 or name in task_models.stacks)
        and (group := task_models.merged.groups.get(name)) is not None
        and all(plain.is_localized(tensor) for tensor in group.disk)
    )


class Fit:
    """lambda_: λ; infinite leaves every value unchanged. seen: from an earlier Fit, None in the first.

    writer: of the values; None where nothing changes. Every process has its share of the inputs and of each layer's
    output rows, and all have the same values, bit for bit.
    """

    def __init__(
        self,
        config: RefitSettings,
        lambda_: float,
        models: Sequence[TaskModels],
        plain: PlainStitch,
        writer: FittedWriter | None,
        seen: Seen | None,
        device: torch.device,
        workers: int,
        processes: Processes,
        states: MakeStates,
        advance: Advance = lambda _: None,
    ) -> None:
        self.config, self.lambda_, self.models, self.plain = config, lambda_, models, plain
        self.seen, self.calls = seen, Seen()
        self._writer, self._device, self._workers, self._advance = writer, device, workers, advance
        self._processes, self._states = processes, states
        self._stops = [stops_of(task_models, plain) for task_models in models]
        self._pending = ParamGroups(models[0].model, writer.writes if writer else lambda _: False)
        self.least_squares = LeastSquares(config, lambda_, models, workers, processes)
        self._stacked_masks: dict[str, Tensor] = {}
        self._experts = StackedExperts(models, self._at_linear, workers, processes, states)

    def run(self) -> list[float] | None:
        """Returns the merged model's score on each task's held-out inputs (see `judge`; lower is better); None without
        held-out inputs. Raises RequestError.
        """
        held_out = all(task_models.fitted < len(task_models.batches) for task_models in self.models)
        sums = self.seen.sums if self.seen else frozenset()
        jobs = [
            (task, number) for task, task_models in enumerate(self.models) for number in range(len(task_models.batches))
        ]
        if self._writer is None and held_out:
            jobs = [(task, number) for task, number in jobs if number >= self.models[task].fitted]
        elif self._writer is None:
            jobs = [(task, number) for task, number in jobs if number == 0]
        pairs = make_pairs(jobs, self.models, self._stops, sums, self._processes, self._states)
        lockstep(pairs, self._visit, self._workers, self._processes)
        _, told = self._processes.share(self._write_rest, lambda _: (_scores(pairs), *_uses(pairs)))
        for _, added, used in told:
            self.calls.added |= added
            self.calls.used |= used
        return _means([scores for scores, _, _ in told], len(self.models)) if held_out else None

    def _write_rest(self) -> None:
        """Write the remaining tensors: those of which only some parts were fitted."""
        first = self.models[0]
        for name, values in self._pending.rest(lambda parameter: first.merged.load(first.parts[parameter])):
            self._write(name, values)

    def refittable(self, key: Key) -> bool:
        """Whether a linear layer, or a module of experts, of the first task's model is called exactly once per pass."""
        return self.calls.calls[key] == 1

    def is_twice(self, name: str) -> bool:
        """Whether a tensor on disk belongs to a linear layer that is called more than once per pass."""
        return any(name in disk for key in (self.seen or self.calls).twice for disk in _names_in(key))

    def _visit(self, pairs: Sequence[Pair], stop: LockstepStop) -> Callable[[], None]:
        self.calls.calls[stop.place.key] += 1
        self._advance(1)
        if isinstance(stop.place, Experts):
            return self._at_experts(pairs, stop, stop.place)
        return self._at_linear(pairs, stop)

    def _changes(self, key: Key) -> bool:
        """Whether values are fitted there; the same answer in all processes."""
        return self._writer is not None and not math.isinf(self.lambda_) and not (
            self.seen and key in self.seen.twice
        )  # fmt: skip

    # ---- one linear layer --------------------------------------------------------------------------------------

    def _at_linear(self, pairs: Sequence[Pair], stop: LockstepStop) -> Callable[[], None]:
        linear = stop.place
        assert isinstance(linear, Linear)
        task_models = self.models[stop.task]
        targets = Targets(self.models, pairs)
        problem = change = None
        if self._changes(linear.key):
            problem, told = self._processes.share(lambda: self._problem(pairs, task_models, linear), Problem.tell)
            change = self.least_squares.solve(pairs, problem, told, targets)
        last = self.seen is not None and linear.key == self.seen.last

        def go_on() -> None:
            if problem is None or change is None:
                weight, bias = linear.load(task_models.merged) if problem is None else (problem.weight, problem.bias)
            else:
                weight, bias = self._take(task_models, linear, problem, change)
            for numbered, target in targets.to_go_on():

                def one(number: int, target: Target = target) -> None:
                    pair = pairs[number]
                    if last and pair.fitted:
                        for passing in pair.passes:
                            passing.end()
                        return
                    pair.finetuned.take_back()
                    pair.finetuned.go_on(target(number))
                    pair.merged.multiply(weight, bias)
                    self._score(pair)

                for_each(one, numbered, self._workers)

        return go_on

    def _problem(self, pairs: Sequence[Pair], task_models: TaskModels, linear: Linear) -> Problem:
        name = task_models.merged.groups[linear.weight.parameter].disk[0]
        return self.least_squares.begin(pairs, name, *linear.load(task_models.merged), self._mask(task_models, linear))

    def _mask(self, task_models: TaskModels, linear: Linear) -> Tensor | None:
        """Where a layer's values may change, bool [outputs, inputs], the bias in a last column; None: nowhere."""
        mask = self._covered(task_models, linear.weight)
        mask = mask.T if linear.transposed else mask
        if linear.bias is not None:
            own = self._covered(task_models, linear.bias)
            mask = torch.cat([mask, own.unsqueeze(1)], dim=1)
        return mask if mask.any() else None

    def _covered(self, task_models: TaskModels, part: Part) -> Tensor:
        """bool [*shape]: where the masks cover a parameter."""
        group = task_models.merged.groups.get(part.parameter)
        if group is None or not all(self.plain.is_localized(name) for name in group.disk):
            return torch.zeros(part.shape, dtype=torch.bool, device=self._device)
        whole = self._stacked_masks.get(part.parameter)
        if whole is None:
            masks = from_disk(task_models.model, group, self.plain.covered)
            whole = masks[part.parameter].bool().to(self._device)
            if part.index is not None:
                self._stacked_masks[part.parameter] = whole
        return whole if part.index is None else whole[part.index]

    def _take(
        self, task_models: TaskModels, linear: Linear, problem: Problem, change: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Add the change, round to the output's dtype, and keep the new values. Returns weight and bias."""
        weight, bias = problem.weight, problem.bias
        whole = weight if bias is None else torch.cat([weight, bias.unsqueeze(1)], dim=1)
        whole = whole + change
        width = weight.shape[1]
        new = self._rounded(task_models, linear.weight, whole[:, :width])
        self._note(task_models, linear.weight, new.T if linear.transposed else new)
        if linear.bias is None:
            return new, None
        new_bias = self._rounded(task_models, linear.bias, whole[:, width])
        if self._covered(task_models, linear.bias).any():
            self._note(task_models, linear.bias, new_bias)
        return new, new_bias

    def _rounded(self, task_models: TaskModels, part: Part, values: Tensor) -> Tensor:
        group = task_models.merged.groups.get(part.parameter)
        return values if group is None else values.to(self.plain.dtype(group.disk[0])).float()

    def _note(self, task_models: TaskModels, part: Part, values: Tensor) -> None:
        """Keep the values to be written; for experts of a stack, in the shared copy."""
        if part.index is None:
            self._keep(task_models.merged.groups[part.parameter], part.parameter, values)
        else:
            task_models.merged.changed[part.parameter][part.index] = values

    def _keep(self, group: Group, parameter: str, values: Tensor) -> None:
        """Write this process's tensors of a group of parameters, once the group is complete."""
        for name, whole in self._pending.keep(group, parameter, values).items():
            self._write(name, whole)

    # ---- stacked experts ---------------------------------------------------------------------------------------

    def _at_experts(self, pairs: Sequence[Pair], stop: LockstepStop, experts: Experts) -> Callable[[], None]:
        """Fit each expert to the tokens that the merged model routes to it, then continue all passes together."""
        if self._changes(experts.key):
            self._experts.fit(pairs, stop.task, experts)

        def go_on() -> None:
            for_each(lambda pair: [one.go_on() for one in pair.passes], pairs, self._workers)
            for pair in pairs:
                self._score(pair)
            merged = self.models[stop.task].merged
            for parameter, values in self._experts.release(stop.task).items():
                self._keep(merged.groups[parameter], parameter, values)
            self._stacked_masks.clear()

        return go_on

    # ---- results ------------------------------------------------------------------------------------------------

    def _score(self, pair: Pair) -> None:
        """Judge the outputs of a finished held-out pair, and drop them."""
        if pair.fitted or any(pair.stops) or pair.merged.result is None:
            return
        merged, finetuned = map(self._judged, pair.passes)
        for one in pair.passes:
            one.result = one.hidden = None
        task_models = self.models[pair.task]
        for values, model in ((merged, "the merged model"), (finetuned, "the finetuned model")):
            if not torch.isfinite(values).all():
                raise RequestError(
                    f"on the inputs of {task_models.name}, the outputs of {model} contain NaN or infinity. Check the "
                    "checkpoint and the inputs, or use --stitch mean."
                )
        pair.score = judge(self.config.judge, merged, finetuned, task_models.task, pair.examples)

    def _judged(self, one: Pass) -> Tensor:
        """What a finished pass is judged by, [rows, numbers]: without labels its hidden states, where no padding is."""
        if self.config.judge != "agreement" or one.hidden is None:
            return one.result
        return one.hidden.reshape(-1, one.hidden.shape[-1])[one.rows(one.hidden)]

    def _write(self, name: str, values: Tensor) -> None:
        """Write the values of a tensor on disk under the masks."""
        assert self._writer is not None
        self._writer.write(name, self.plain.dtype_name(name), self.plain.cut(name, values.cpu()))


def _scores(pairs: Sequence[Pair]) -> list[Score]:
    return [(pair.task, pair.number, *pair.score) for pair in pairs if pair.score is not None]


def _means(told: Sequence[Sequence[Score]], tasks: int) -> list[float]:
    """Of each task, from the scores of all processes, summed in an order that does not depend on their number."""
    scores = sorted(score for found in told for score in found)
    means = []
    for task in range(tasks):
        own = [(found, rows) for of, _, found, rows in scores if of == task]
        means.append(sum(found for found, _ in own) / max(1, sum(rows for _, rows in own)))
    return means


def _names_in(key: Key) -> Iterator[Key]:
    """The tuples in a key, however deep."""
    yield key
    for part in key:
        if isinstance(part, tuple):
            yield from _names_in(part)


def _uses(pairs: Sequence[Pair]) -> tuple[set[Key], set[Key]]:
    """Linear layers whose output was added, and those whose output was used in other ways."""
    passes = [one for pair in pairs for one in pair.passes]
    return set[Key]().union(*(one.added for one in passes)), set[Key]().union(*(one.used for one in passes))
