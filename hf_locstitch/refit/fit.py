"""One refit at one stiffness: all inputs go through all models side by side, and each linear is fitted as it is met.

What enters a linear comes from the merged model, all that lies before it refitted already; what should leave it is
what leaves the same linear of the finetuned model on its own activations. Where the model adds that to something at
once (the residual stream), the sums are to agree: such a linear makes up for what those before it left undone.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_locstitch.chunks import for_each, in_order
from hf_locstitch.errors import RequestError
from hf_locstitch.localize.names import Group
from hf_locstitch.output import DTYPE_ON_DISK
from hf_locstitch.processes import Processes
from hf_locstitch.refit.agreement import judge
from hf_locstitch.refit.config import Refit
from hf_locstitch.refit.experts import StackedExperts
from hf_locstitch.refit.jobs import make_pairs
from hf_locstitch.refit.lead import Meeting, Pair, lead
from hf_locstitch.refit.passes import Experts, Key, Linear, linear_stop
from hf_locstitch.refit.pending import Pending
from hf_locstitch.refit.plain import PlainStitch
from hf_locstitch.refit.solve import Moments, solve_masked, system, with_ones
from hf_locstitch.refit.subject import RefitSubject
from hf_locstitch.refit.values import RefittedWriter
from hf_locstitch.refit.weights import Part, from_disk

NAME_ON_DISK = {getattr(torch, name): short for name, short in DTYPE_ON_DISK.items()} | {torch.float64: "F64"}
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


def stops_of(subject: RefitSubject, plain: PlainStitch) -> frozenset[str]:
    """Parameters whose products a refit waits at: matrices, and experts' stacks of them, that are wholly localized."""
    return frozenset(
        name
        for name, part in subject.parts.items()
        if (part.dim == 2 or name in subject.stacks)
        and (group := subject.merged.groups.get(name)) is not None
        and all(plain.is_localized(tensor) for tensor in group.disk)
    )


@dataclass(frozen=True)
class Work:
    """What one process has of a linear that is to be fitted.

    name: on disk. weight [outputs, inputs], bias [outputs]: the merged model's. mask: where they may change, the bias
    in a last column; None: nowhere. rows: of each fitted pair's input, those that are no padding, by the pair's
    number. tokens: of each task. known: whether the inputs are those of the linear before.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    mask: Tensor | None
    rows: Mapping[int, Tensor]
    tokens: Mapping[int, int]
    known: bool

    def tell(self) -> tuple[bool, Mapping[int, int]]:
        """What the other processes need of it."""
        return self.known, self.tokens


class Fit:
    """stiffness: λ; infinite leaves every value as it is. seen: of an earlier Fit, None in the first.

    writer: of the values; None where nothing changes. Every process has its share of the inputs and of each linear's
    output rows, and all have the same values, bit for bit.
    """

    def __init__(
        self,
        how: Refit,
        stiffness: float,
        subjects: Sequence[RefitSubject],
        plain: PlainStitch,
        writer: RefittedWriter | None,
        seen: Seen | None,
        device: torch.device,
        workers: int,
        processes: Processes,
        advance: Advance = lambda _: None,
    ) -> None:
        self.how, self.stiffness, self.subjects, self.plain = how, stiffness, subjects, plain
        self.seen, self.calls = seen, Seen()
        self.tokens: dict[str, tuple[int, int]] = {}  # tensor -> tokens of the task with fewest, input width
        self._writer, self._device, self._workers, self._advance = writer, device, workers, advance
        self._processes = processes
        self._stops = [stops_of(subject, plain) for subject in subjects]
        self._pending = Pending(subjects[0].model, writer.writes if writer else lambda _: False)
        self._inputs: list[weakref.ref[Tensor]] = []
        self._gram: Tensor | None = None  # of those inputs, over all processes
        self._stacked_masks: dict[str, Tensor] = {}
        self._experts = StackedExperts(subjects, self._at_linear, workers, processes)

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
        pairs = make_pairs(jobs, self.subjects, self._stops, sums, self._processes)
        lead(pairs, self._visit, self._workers, self._processes)
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

    def _visit(self, pairs: Sequence[Pair], meeting: Meeting) -> Callable[[], None]:
        self.calls.calls[meeting.place.key] += 1
        self._advance(1)
        if isinstance(meeting.place, Experts):
            return self._at_experts(pairs, meeting, meeting.place)
        return self._at_linear(pairs, meeting)

    def _changes(self, key: Key) -> bool:
        """Whether values are fitted there, the same in all processes."""
        return self._writer is not None and not math.isinf(self.stiffness) and not (
            self.seen and key in self.seen.twice
        )  # fmt: skip

    # ---- one linear --------------------------------------------------------------------------------------------

    def _at_linear(self, pairs: Sequence[Pair], meeting: Meeting) -> Callable[[], None]:
        linear = meeting.place
        assert isinstance(linear, Linear)
        subject = self.subjects[meeting.task]
        targets: dict[int, Tensor] = {}
        work = change = None
        if self._changes(linear.key):
            work, told = self._processes.share(lambda: self._begin(pairs, subject, linear), Work.tell)
            change = self._solve(pairs, work, told, targets)
        last = self.seen is not None and linear.key == self.seen.last

        def go_on() -> None:
            if work is None or change is None:
                weight, bias = self._values(subject, linear) if work is None else (work.weight, work.bias)
                self._compute_targets(pairs, targets)
            else:
                weight, bias = self._take(subject, linear, work, change)

            def one(numbered: tuple[int, Pair]) -> None:
                number, pair = numbered
                if last and pair.fitted:
                    for passing in pair.passes:
                        passing.end()
                    return
                pair.finetuned.go_on(targets[number])
                pair.merged.go_on(F.linear(linear_stop(pair.merged).x, weight, bias))
                self._score(pair)

            for_each(one, enumerate(pairs), self._workers)

        return go_on

    def _values(self, subject: RefitSubject, linear: Linear) -> tuple[Tensor, Tensor | None]:
        """Of the merged model as it is: weight [outputs, inputs] and bias [outputs]."""
        weight = subject.merged.load(linear.weight)
        bias = None if linear.bias is None else subject.merged.load(linear.bias)
        return weight.T if linear.transposed else weight, bias

    def _begin(self, pairs: Sequence[Pair], subject: RefitSubject, linear: Linear) -> Work:
        """What there is to fit, before any task is looked at."""
        name = subject.merged.groups[linear.weight.parameter].disk[0]
        weight, bias = self._values(subject, linear)
        mask = self._mask(subject, linear)
        if mask is None:
            return Work(name, weight, bias, None, {}, {}, False)
        inputs = [linear_stop(pair.merged).x for pair in pairs]
        known = self._gram is not None and self._gram.shape[0] == mask.shape[1]
        known = known and len(self._inputs) == len(inputs) and all(
            ref() is x for ref, x in zip(self._inputs, inputs, strict=True)
        )  # fmt: skip
        self._inputs = [weakref.ref(x) for x in inputs]
        rows = {number: pair.merged.rows(inputs[number]) for number, pair in enumerate(pairs) if pair.fitted}
        tokens: Counter[int] = Counter()
        for number, pair in enumerate(pairs):
            tokens[pair.task] += len(rows.get(number, ()))
        return Work(name, weight, bias, mask, rows, tokens, known)

    def _mask(self, subject: RefitSubject, linear: Linear) -> Tensor | None:
        """Where a linear's values may change, bool [outputs, inputs], its bias in a last column; None: nowhere."""
        mask = self._covered(subject, linear.weight)
        mask = mask.T if linear.transposed else mask
        if linear.bias is not None:
            own = self._covered(subject, linear.bias)
            mask = torch.cat([mask, own.unsqueeze(1)], dim=1)
        return mask if mask.any() else None

    def _covered(self, subject: RefitSubject, part: Part) -> Tensor:
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

    def _compute_targets(self, pairs: Sequence[Pair], targets: dict[int, Tensor]) -> None:
        """What leaves the linear in the finetuned models, by the number of the pair."""
        for weight, bias, numbered in self._by_task(pairs):

            def work(one: tuple[int, Pair], weight: Tensor = weight, bias: Tensor | None = bias) -> None:
                targets[one[0]] = F.linear(linear_stop(one[1].finetuned).x, weight, bias)

            for_each(work, numbered, self._workers)

    def _by_task(self, pairs: Sequence[Pair]) -> Iterator[tuple[Tensor, Tensor | None, list[tuple[int, Pair]]]]:
        """The finetuned model's weight and bias, and the numbered pairs, of one task after another."""
        for task, subject in enumerate(self.subjects):
            if numbered := [(number, pair) for number, pair in enumerate(pairs) if pair.task == task]:
                stop = linear_stop(numbered[0][1].finetuned)
                weight = subject.finetuned.load(stop.weight)
                bias = None if stop.bias is None else subject.finetuned.load(stop.bias)
                yield weight.T if stop.transposed else weight, bias, numbered

    def _solve(
        self,
        pairs: Sequence[Pair],
        work: Work,
        told: Sequence[tuple[bool, Mapping[int, int]]],
        targets: dict[int, Tensor],
    ) -> Tensor | None:
        """The change of weight and bias, [outputs, inputs (+ 1)], the same in all processes; None if there is none.

        told: of each process, whether it knows the Gram matrix already, and its tokens by task. Fills in the targets
        where there is a change.
        """
        tokens: Counter[int] = Counter()
        for _, found in told:
            tokens.update(found)
        if not any(tokens.values()):
            return None
        known = all(known for known, _ in told)
        gram, cross = self._processes.together(lambda: self._moments(pairs, work, tokens, known, targets))
        if gram is not None:
            self._processes.add_up(gram)
            self._gram = gram
        self._processes.add_up(cross)
        self._processes.together(lambda: self._solve_own_rows(cross, work.mask))
        self._processes.add_up(cross)
        self._note_tokens(work, tokens)
        return cross

    def _moments(
        self, pairs: Sequence[Pair], work: Work, tokens: Mapping[int, int], known: bool, targets: dict[int, Tensor]
    ) -> tuple[Tensor | None, Tensor]:
        """This process's part of Σ XᵀX / N, unless that is known, and of Σ RᵀX / N, over tasks with N tokens each."""
        weight, bias = work.weight, work.bias
        width = weight.shape[1] + (bias is not None)
        total_gram = None if known else weight.new_zeros(width, width)
        total_cross = weight.new_zeros(len(weight), width)
        for theirs, their_bias, numbered in self._by_task(pairs):
            task = Moments(weight.new_zeros(()) if total_gram is None else torch.zeros_like(total_gram),
                           torch.zeros_like(total_cross))  # fmt: skip

            def moments(
                one: tuple[int, Pair], theirs: Tensor = theirs, their_bias: Tensor | None = their_bias
            ) -> tuple[Tensor, Tensor, int] | None:
                number, pair = one
                targets[number] = F.linear(linear_stop(pair.finetuned).x, theirs, their_bias)
                if not pair.fitted:
                    return None
                x, rows = linear_stop(pair.merged).x, work.rows[number]
                own = x.reshape(-1, x.shape[-1])[rows]
                rest = targets[number].reshape(-1, len(weight))[rows] - F.linear(own, weight, bias)
                rest += _behind(pair, rows)
                own = own if bias is None else with_ones(own)
                return own.new_zeros(()) if known else own.T @ own, rest.T @ own, len(rows)

            for found in in_order(moments, numbered, self._workers):
                if found is not None:
                    task.add(*found)
            pair = numbered[0][1]
            self._check(pair, task)
            if tokens[pair.task]:
                total_cross += task.cross / tokens[pair.task]
                if total_gram is not None:
                    total_gram += task.gram / tokens[pair.task]
        return total_gram, total_cross

    def _solve_own_rows(self, cross: Tensor, mask: Tensor | None) -> None:
        """Put what this process's rows of the right-hand sides solve to in their place, and 0 in that of the others."""
        assert mask is not None and self._gram is not None
        rank, count = self._processes.rank, self._processes.count
        own = slice(len(cross) * rank // count, len(cross) * (rank + 1) // count)
        matrix = system(self._gram, self.stiffness, self.how.ridge)
        change = solve_masked(matrix, cross[own], mask[own], self.how.steps)
        cross.zero_()
        cross[own] = change

    def _note_tokens(self, work: Work, tokens: Mapping[int, int]) -> None:
        name, found = work.name, (min(tokens.values()), work.weight.shape[1])
        self.tokens[name] = min(self.tokens.get(name, found), found)

    def _check(self, pair: Pair, task: Moments) -> None:
        for values, model in ((task.gram, "the merged model"), (task.cross, "the finetuned model")):
            if not torch.isfinite(values).all():
                subject, stop = self.subjects[pair.task], linear_stop(pair.merged)
                name = subject.merged.groups[stop.weight.parameter].disk[0]
                raise RequestError(
                    f"on the inputs of {subject.name}, the activations of {model} at {name} hold NaN or infinity, so "
                    "nothing can be fitted to them. Check that checkpoint and those inputs, or use --stitch mean."
                )

    def _take(self, subject: RefitSubject, linear: Linear, work: Work, change: Tensor) -> tuple[Tensor, Tensor | None]:
        """Add the change, round as the output will be, and note what is new. Returns weight and bias."""
        weight, bias = work.weight, work.bias
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

    def _rounded(self, subject: RefitSubject, part: Part, values: Tensor) -> Tensor:
        group = subject.merged.groups.get(part.parameter)
        return values if group is None else values.to(self.plain.dtype(group.disk[0])).float()

    def _note(self, subject: RefitSubject, part: Part, values: Tensor) -> None:
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

    def _at_experts(self, pairs: Sequence[Pair], meeting: Meeting, experts: Experts) -> Callable[[], None]:
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


def _behind(pair: Pair, rows: Tensor) -> Tensor | float:
    """What the merged model lacks where a linear's product is added, [rows, outputs]: the linear makes up for it."""
    merged, finetuned = (linear_stop(one).residual for one in pair.passes)
    return 0.0 if merged is None or finetuned is None else (finetuned - merged).reshape(-1, merged.shape[-1])[rows]
