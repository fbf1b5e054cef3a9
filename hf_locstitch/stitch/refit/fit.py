"""One refit at one lambda: all inputs go through all models side by side, and each linear is fitted as it is met.

What enters a linear comes from the merged model, all that lies before it refitted already; what should leave it is
what leaves the same linear of the finetuned model on its own activations. Where the model adds that to something at
once (the residual stream), the sums are to agree: such a linear makes up for what those before it left undone.
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
from hf_locstitch.runtime.dtypes import ON_DISK
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.stitch.fitted_values import FittedWriter
from hf_locstitch.stitch.refit.agreement import judge
from hf_locstitch.stitch.refit.experts import StackedExperts
from hf_locstitch.stitch.refit.jobs import make_pairs
from hf_locstitch.stitch.refit.least_squares import LeastSquares, Problem, Target, Targets
from hf_locstitch.stitch.refit.lockstep import LockstepStop, Pair, lockstep
from hf_locstitch.stitch.refit.models import TaskModels
from hf_locstitch.stitch.refit.param_groups import ParamGroups
from hf_locstitch.stitch.refit.passes import Experts, Key, Linear
from hf_locstitch.stitch.refit.plain import PlainStitch
from hf_locstitch.stitch.refit.settings import RefitSettings
from hf_locstitch.stitch.refit.states import MakeStates
from hf_locstitch.stitch.refit.weights import Part, from_disk
from hf_locstitch.tasks.parameter_names import Group

NAME_ON_DISK = {getattr(torch, name): short for name, short in ON_DISK.items()} | {torch.float64: "F64"}
Advance = Callable[[int], object]
Score = tuple[int, int, float, int]  # a task, one of its batches, how far its outputs are apart, and its rows


@dataclass
class Seen:
    """What following the models once tells. calls: how often each linear is called in a pass, in order.

    added, used: those whose product is added to another tensor, or used in any other way.
    """

    calls: Counter[Key] = field(default_factory=Counter)
    added: set[Key] = field(default_factory=set)
    used: set[Key] = field(default_factory=set)

    @property
    def last(self) -> Key | None:
        return next(reversed(self.calls), None)

    @property
    def sums(self) -> frozenset[Key]:
        """Those that can be fitted when their product is added, so that they make up for what it is added to."""
        return frozenset(self.added - self.used)

    @property
    def twice(self) -> set[Key]:
        """Those that fitting at their first call would spoil at their second."""
        return {key for key, calls in self.calls.items() if calls > 1}


def stops_of(subject: TaskModels, plain: PlainStitch) -> frozenset[str]:
    """Parameters whose products a refit waits at: matrices, and experts' stacks of them, that are wholly localized."""
    return frozenset(
        name
        for name, part in subject.parts.items()
        if (part.dim == 2 or name in subject.stacks)
        and (group := subject.merged.groups.get(name)) is not None
        and all(plain.is_localized(tensor) for tensor in group.disk)
    )


class Fit:
    """lambda_: λ; infinite leaves every value as it is. seen: of an earlier Fit, None in the first.

    writer: of the values; None where nothing changes. Every process has its share of the inputs and of each linear's
    output rows, and all have the same values, bit for bit.
    """

    def __init__(
        self,
        how: RefitSettings,
        lambda_: float,
        subjects: Sequence[TaskModels],
        plain: PlainStitch,
        writer: FittedWriter | None,
        seen: Seen | None,
        device: torch.device,
        workers: int,
        processes: Processes,
        states: MakeStates,
        advance: Advance = lambda _: None,
    ) -> None:
        self.how, self.lambda_, self.subjects, self.plain = how, lambda_, subjects, plain
        self.seen, self.calls = seen, Seen()
        self._writer, self._device, self._workers, self._advance = writer, device, workers, advance
        self._processes, self._states = processes, states
        self._stops = [stops_of(subject, plain) for subject in subjects]
        self._pending = ParamGroups(subjects[0].model, writer.writes if writer else lambda _: False)
        self.least_squares = LeastSquares(how, lambda_, subjects, workers, processes)
        self._stacked_masks: dict[str, Tensor] = {}
        self._experts = StackedExperts(subjects, self._at_linear, workers, processes, states)

    def run(self) -> float | None:
        """Returns how far from good the merged model is on held-out inputs, as `judge` has it, the mean over tasks, if
        there are any. Raises RequestError.
        """
        held_out = all(subject.fitted < len(subject.batches) for subject in self.subjects)
        sums = self.seen.sums if self.seen else frozenset()
        jobs = [(task, number) for task, subject in enumerate(self.subjects) for number in range(len(subject.batches))]
        if self._writer is None and held_out:
            jobs = [(task, number) for task, number in jobs if number >= self.subjects[task].fitted]
        elif self._writer is None:
            jobs = [(task, number) for task, number in jobs if number == 0]
        pairs = make_pairs(jobs, self.subjects, self._stops, sums, self._processes, self._states)
        lockstep(pairs, self._visit, self._workers, self._processes)
        _, told = self._processes.share(self._write_rest, lambda _: (_scores(pairs), *_uses(pairs)))
        for _, added, used in told:
            self.calls.added |= added
            self.calls.used |= used
        return _mean_over_tasks([scores for scores, _, _ in told], len(self.subjects)) if held_out else None

    def _write_rest(self) -> None:
        """What is still to be written: parts of tensors whose other parts never change."""
        first = self.subjects[0]
        for name, values in self._pending.rest(lambda parameter: first.merged.load(first.parts[parameter])):
            self._write(name, values)

    def refittable(self, key: Key) -> bool:
        """Whether a linear, or a module of experts, of the first task's model is called once a pass."""
        return self.calls.calls[key] == 1

    def is_twice(self, name: str) -> bool:
        """Whether a tensor on disk is part of a linear that is called more than once a pass."""
        return any(name in disk for key in (self.seen or self.calls).twice for disk in _names_in(key))

    def _visit(self, pairs: Sequence[Pair], meeting: LockstepStop) -> Callable[[], None]:
        self.calls.calls[meeting.place.key] += 1
        self._advance(1)
        if isinstance(meeting.place, Experts):
            return self._at_experts(pairs, meeting, meeting.place)
        return self._at_linear(pairs, meeting)

    def _changes(self, key: Key) -> bool:
        """Whether values are fitted there, the same in all processes."""
        return self._writer is not None and not math.isinf(self.lambda_) and not (
            self.seen and key in self.seen.twice
        )  # fmt: skip

    # ---- one linear --------------------------------------------------------------------------------------------

    def _at_linear(self, pairs: Sequence[Pair], meeting: LockstepStop) -> Callable[[], None]:
        linear = meeting.place
        assert isinstance(linear, Linear)
        subject = self.subjects[meeting.task]
        targets = Targets(self.subjects, pairs)
        problem = change = None
        if self._changes(linear.key):
            problem, told = self._processes.share(lambda: self._problem(pairs, subject, linear), Problem.tell)
            change = self.least_squares.solve(pairs, problem, told, targets)
        last = self.seen is not None and linear.key == self.seen.last

        def go_on() -> None:
            if problem is None or change is None:
                weight, bias = linear.load(subject.merged) if problem is None else (problem.weight, problem.bias)
            else:
                weight, bias = self._take(subject, linear, problem, change)
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

    def _problem(self, pairs: Sequence[Pair], subject: TaskModels, linear: Linear) -> Problem:
        name = subject.merged.groups[linear.weight.parameter].disk[0]
        return self.least_squares.begin(pairs, name, *linear.load(subject.merged), self._mask(subject, linear))

    def _mask(self, subject: TaskModels, linear: Linear) -> Tensor | None:
        """Where a linear's values may change, bool [outputs, inputs], its bias in a last column; None: nowhere."""
        mask = self._covered(subject, linear.weight)
        mask = mask.T if linear.transposed else mask
        if linear.bias is not None:
            own = self._covered(subject, linear.bias)
            mask = torch.cat([mask, own.unsqueeze(1)], dim=1)
        return mask if mask.any() else None

    def _covered(self, subject: TaskModels, part: Part) -> Tensor:
        """bool [*shape]: what the masks cover of a parameter."""
        group = subject.merged.groups.get(part.parameter)
        if group is None or not all(self.plain.is_localized(name) for name in group.disk):
            return torch.zeros(part.shape, dtype=torch.bool, device=self._device)
        whole = self._stacked_masks.get(part.parameter)
        if whole is None:
            found = from_disk(subject.model, group, self.plain.covered)
            whole = found[part.parameter].bool().to(self._device)
            if part.index is not None:
                self._stacked_masks[part.parameter] = whole
        return whole if part.index is None else whole[part.index]

    def _take(
        self, subject: TaskModels, linear: Linear, problem: Problem, change: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Add the change, round as the output will be, and note what is new. Returns weight and bias."""
        weight, bias = problem.weight, problem.bias
        whole = weight if bias is None else torch.cat([weight, bias.unsqueeze(1)], dim=1)
        whole = whole + change
        width = weight.shape[1]
        new = self._rounded(subject, linear.weight, whole[:, :width])
        self._note(subject, linear.weight, new.T if linear.transposed else new)
        if linear.bias is None:
            return new, None
        new_bias = self._rounded(subject, linear.bias, whole[:, width])
        if self._covered(subject, linear.bias).any():
            self._note(subject, linear.bias, new_bias)
        return new, new_bias

    def _rounded(self, subject: TaskModels, part: Part, values: Tensor) -> Tensor:
        group = subject.merged.groups.get(part.parameter)
        return values if group is None else values.to(self.plain.dtype(group.disk[0])).float()

    def _note(self, subject: TaskModels, part: Part, values: Tensor) -> None:
        """Keep what is to be written; experts of a stack where all see them."""
        if part.index is None:
            self._keep(subject.merged.groups[part.parameter], part.parameter, values)
        else:
            subject.merged.changed[part.parameter][part.index] = values

    def _keep(self, group: Group, parameter: str, values: Tensor) -> None:
        """Write what this process is to write of a group of parameters, once it is whole."""
        for name, whole in self._pending.keep(group, parameter, values).items():
            self._write(name, whole)

    # ---- stacked experts ---------------------------------------------------------------------------------------

    def _at_experts(self, pairs: Sequence[Pair], meeting: LockstepStop, experts: Experts) -> Callable[[], None]:
        """Each expert is fitted to the tokens that the merged model sends it, then all go on together."""
        if self._changes(experts.key):
            self._experts.fit(pairs, meeting.task, experts)

        def go_on() -> None:
            for_each(lambda pair: [one.go_on() for one in pair.passes], pairs, self._workers)
            for pair in pairs:
                self._score(pair)
            merged = self.subjects[meeting.task].merged
            for parameter, values in self._experts.release(meeting.task).items():
                self._keep(merged.groups[parameter], parameter, values)
            self._stacked_masks.clear()

        return go_on

    # ---- what comes of it --------------------------------------------------------------------------------------

    def _score(self, pair: Pair) -> None:
        """Judge the outputs of a held-out pair that has ended, and forget them."""
        if pair.fitted or any(pair.stops) or pair.merged.result is None:
            return
        merged, finetuned = pair.merged.result, pair.finetuned.result
        pair.merged.result = pair.finetuned.result = None
        subject = self.subjects[pair.task]
        for values, model in ((merged, "the merged model"), (finetuned, "the finetuned model")):
            if not torch.isfinite(values).all():
                raise RequestError(
                    f"on the inputs of {subject.name}, the outputs of {model} hold NaN or infinity. Check that "
                    "checkpoint and those inputs, or use --stitch mean."
                )
        pair.score = judge(self.how.judge, merged, finetuned, subject.task, pair.examples)

    def _write(self, name: str, values: Tensor) -> None:
        """What the masks cover of a tensor on disk."""
        assert self._writer is not None
        self._writer.write(name, NAME_ON_DISK[self.plain.dtype(name)], self.plain.cut(name, values.cpu()))


def _scores(pairs: Sequence[Pair]) -> list[Score]:
    return [(pair.task, pair.number, *pair.score) for pair in pairs if pair.score is not None]


def _mean_over_tasks(told: Sequence[Sequence[Score]], tasks: int) -> float:
    """Of all processes' scores, added up in an order that does not depend on who has which."""
    scores = sorted(score for found in told for score in found)
    means = []
    for task in range(tasks):
        own = [(found, rows) for of, _, found, rows in scores if of == task]
        means.append(sum(found for found, _ in own) / max(1, sum(rows for _, rows in own)))
    return sum(means) / tasks


def _names_in(key: Key) -> Iterator[Key]:
    """The tuples in a key, however deep."""
    yield key
    for part in key:
        if isinstance(part, tuple):
            yield from _names_in(part)


def _uses(pairs: Sequence[Pair]) -> tuple[set[Key], set[Key]]:
    """Linears whose product was added, and that were used in other ways."""
    passes = [one for pair in pairs for one in pair.passes]
    return set[Key]().union(*(one.added for one in passes)), set[Key]().union(*(one.used for one in passes))
