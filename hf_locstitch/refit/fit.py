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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_locstitch.chunks import for_each, keep_to_itself
from hf_locstitch.errors import RequestError
from hf_locstitch.localize.names import Group, to_disk
from hf_locstitch.plan import DTYPE_ON_DISK
from hf_locstitch.refit.agreement import disagreement
from hf_locstitch.refit.config import Refit
from hf_locstitch.refit.passes import ExpertsStop, LinearStop, Pair, Pass, lead
from hf_locstitch.refit.plain import PlainStitch
from hf_locstitch.refit.solve import Moments, solve_masked, system, with_ones
from hf_locstitch.refit.subject import RefitSubject
from hf_locstitch.refit.values import RefittedWriter
from hf_locstitch.refit.weights import Part, from_disk

NAME_ON_DISK = {getattr(torch, name): short for name, short in DTYPE_ON_DISK.items()} | {torch.float64: "F64"}
Advance = Callable[[int], object]
Key = tuple[Any, ...]


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


def make_pairs(
    subjects: Sequence[RefitSubject], stops: Sequence[frozenset[str]], fitted: bool, sums: frozenset[Key] = frozenset()
) -> list[Pair]:
    """Both models on every batch of inputs, held-out ones and, if asked for, fitted ones."""
    pairs = []
    for task, subject in enumerate(subjects):
        for number, batch in enumerate(subject.batches):
            if number >= subject.fitted or fitted:
                merged, finetuned = (
                    Pass(weights, _work(subject, batch), stops[task], sums)
                    for weights in (subject.merged, subject.finetuned)
                )
                pairs.append(Pair(task, number < subject.fitted, merged, finetuned))
    return pairs


def _work(subject: RefitSubject, batch: Sequence[Any]) -> Callable[[], Tensor]:
    return lambda: subject.task.outputs(subject.model, batch)


class Fit:
    """stiffness: λ; infinite leaves every value as it is. seen: of an earlier Fit, None in the first.

    writer: of the values; None where nothing changes.
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
        advance: Advance = lambda _: None,
    ) -> None:
        self.how, self.stiffness, self.subjects, self.plain = how, stiffness, subjects, plain
        self.seen, self.calls = seen, Seen()
        self.tokens: dict[str, tuple[int, int]] = {}  # tensor -> tokens of the task with fewest, input width
        self._writer, self._device, self._workers, self._advance = writer, device, workers, advance
        self._stops = [stops_of(subject, plain) for subject in subjects]
        self._pending: dict[tuple[str, ...], dict[str, Tensor]] = {}
        self._inputs: list[weakref.ref[Tensor]] = []
        self._grams: list[Tensor] = []
        self._stacked_masks: dict[str, Tensor] = {}

    def run(self) -> float | None:
        """Returns the disagreement with the finetuned models on held-out inputs, the mean over tasks, if there are
        any. Raises RequestError.
        """
        held_out = all(subject.fitted < len(subject.batches) for subject in self.subjects)
        fitted, sums = self._writer is not None or not held_out, self.seen.sums if self.seen else frozenset()
        pairs = make_pairs(self.subjects, self._stops, fitted, sums)
        if self._writer is None and not held_out:
            pairs = [next(pair for pair in pairs if pair.task == task) for task in range(len(self.subjects))]
        lead(pairs, self._visit, self._workers)
        for one in (one for pair in pairs for one in pair.passes):
            self.calls.added |= one.added
            self.calls.used |= one.used
        for pending in list(self._pending):
            self._write(pending)
        return _mean_over_tasks(pairs) if held_out else None

    def refittable(self, key: Key) -> bool:
        """Whether a linear, or a module of experts, of the first task's model is called once a pass."""
        return self.calls.calls[key] == 1

    def is_twice(self, name: str) -> bool:
        """Whether a tensor on disk is part of a linear that is called more than once a pass."""
        return any(name in disk for key in (self.seen or self.calls).twice for disk in _names_in(key))

    def _visit(self, pairs: Sequence[Pair]) -> None:
        stop = pairs[0].merged.stop
        assert stop is not None
        self.calls.calls[stop.key] += 1
        self._advance(1)
        if isinstance(stop, ExpertsStop):
            self._at_experts(pairs, stop)
        else:
            self._at_linear(pairs)

    # ---- one linear --------------------------------------------------------------------------------------------

    def _at_linear(self, pairs: Sequence[Pair]) -> None:
        first = _linear_stop(pairs[0].merged)
        subject = self.subjects[pairs[0].task]
        weight, bias = self._values(subject, first)
        targets: dict[int, Tensor] = {}
        if (mask := self._mask(subject, first)) is None:
            self._compute_targets(pairs, targets)
        else:
            change = self._solve(pairs, weight, bias, mask, targets)
            weight = self._take(pairs, first, weight, bias, change)
            bias = weight[:, -1] if bias is not None else None
            weight = weight[:, :-1] if bias is not None else weight
        last = self.seen is not None and first.key == self.seen.last

        def go_on(numbered: tuple[int, Pair]) -> None:
            number, pair = numbered
            stop = _linear_stop(pair.merged)
            if last and pair.fitted:
                for one in pair.passes:
                    one.end()
                return
            pair.finetuned.go_on(targets[number])
            pair.merged.go_on(F.linear(stop.x, weight, bias))
            self._score(pair)

        for_each(go_on, enumerate(pairs), self._workers)

    def _values(self, subject: RefitSubject, stop: LinearStop) -> tuple[Tensor, Tensor | None]:
        """Of the merged model as it is: weight [outputs, inputs] and bias [outputs]."""
        weight = subject.merged.load(stop.weight)
        bias = None if stop.bias is None else subject.merged.load(stop.bias)
        return weight.T if stop.transposed else weight, bias

    def _mask(self, subject: RefitSubject, stop: LinearStop) -> Tensor | None:
        """Where a linear's values may change, bool [outputs, inputs], its bias in a last column; None: nowhere."""
        if self._writer is None or math.isinf(self.stiffness) or (self.seen and stop.key in self.seen.twice):
            return None
        mask = self._covered(subject, stop.weight)
        mask = mask.T if stop.transposed else mask
        if stop.bias is not None:
            own = self._covered(subject, stop.bias)
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
                targets[one[0]] = F.linear(_linear_stop(one[1].finetuned).x, weight, bias)

            for_each(work, numbered, self._workers)

    def _by_task(self, pairs: Sequence[Pair]) -> Iterator[tuple[Tensor, Tensor | None, list[tuple[int, Pair]]]]:
        """The finetuned model's weight and bias, and the numbered pairs, of one task after another."""
        for task, subject in enumerate(self.subjects):
            if numbered := [(number, pair) for number, pair in enumerate(pairs) if pair.task == task]:
                stop = _linear_stop(numbered[0][1].finetuned)
                weight = subject.finetuned.load(stop.weight)
                bias = None if stop.bias is None else subject.finetuned.load(stop.bias)
                yield weight.T if stop.transposed else weight, bias, numbered

    def _solve(
        self, pairs: Sequence[Pair], weight: Tensor, bias: Tensor | None, mask: Tensor, targets: dict[int, Tensor]
    ) -> Tensor:
        """The change of weight and bias, [outputs, inputs (+ 1)]. Also fills in the targets."""
        inputs = [_linear_stop(pair.merged).x for pair in pairs]
        known = len(self._inputs) == len(inputs) and all(
            ref() is x for ref, x in zip(self._inputs, inputs, strict=True)
        )
        known = known and bool(self._grams) and self._grams[0].shape[0] == mask.shape[1]
        grams, self._inputs = self._grams if known else [], [weakref.ref(x) for x in inputs]
        total_gram = weight.new_zeros(mask.shape[1], mask.shape[1])
        total_cross = weight.new_zeros(mask.shape)
        moments: list[Moments] = []
        for theirs, their_bias, numbered in self._by_task(pairs):
            known_gram = grams[len(moments)] if known else None
            task = Moments(torch.zeros_like(total_gram), torch.zeros_like(total_cross))

            def work(
                one: tuple[int, Pair], theirs: Tensor = theirs, their_bias: Tensor | None = their_bias,
                gram: Tensor | None = known_gram,
            ) -> tuple[Tensor, Tensor, int] | None:  # fmt: skip
                number, pair = one
                targets[number] = F.linear(_linear_stop(pair.finetuned).x, theirs, their_bias)
                if not pair.fitted:
                    return None
                x = _linear_stop(pair.merged).x
                rows = pair.merged.rows(x)
                own = x.reshape(-1, x.shape[-1])[rows]
                rest = targets[number].reshape(-1, len(weight))[rows] - F.linear(own, weight, bias)
                rest += _behind(pair, rows)
                own = own if bias is None else with_ones(own)
                return torch.zeros(()) if gram is not None else own.T @ own, rest.T @ own, len(rows)

            for found in in_order(work, numbered, self._workers):
                if found is not None:
                    task.add(*found)
            if known_gram is not None:
                task.gram = known_gram
            moments.append(task)
            self._check(numbered[0][1], task)
            if task.tokens:
                total_gram += task.gram / task.tokens
                total_cross += task.cross / task.tokens
        self._grams = [task.gram for task in moments]
        self._note_tokens(pairs, moments, weight.shape[1])
        if not any(task.tokens for task in moments):
            return torch.zeros_like(total_cross)
        matrix = system(total_gram, self.stiffness, self.how.ridge)
        del total_gram  # as large as the system
        return solve_masked(matrix, total_cross, mask, self.how.steps)

    def _note_tokens(self, pairs: Sequence[Pair], moments: Sequence[Moments], width: int) -> None:
        subject, stop = self.subjects[pairs[0].task], _linear_stop(pairs[0].merged)
        name = subject.merged.groups[stop.weight.parameter].disk[0]
        fewest = min(task.tokens for task in moments)
        self.tokens[name] = min(self.tokens.get(name, (fewest, width)), (fewest, width))

    def _check(self, pair: Pair, task: Moments) -> None:
        for values, model in ((task.gram, "the merged model"), (task.cross, "the finetuned model")):
            if not torch.isfinite(values).all():
                subject, stop = self.subjects[pair.task], _linear_stop(pair.merged)
                name = subject.merged.groups[stop.weight.parameter].disk[0]
                raise RequestError(
                    f"on the inputs of {subject.name}, the activations of {model} at {name} hold NaN or infinity, so "
                    "nothing can be fitted to them. Check that checkpoint and those inputs, or use --stitch mean."
                )

    def _take(
        self, pairs: Sequence[Pair], stop: LinearStop, weight: Tensor, bias: Tensor | None, change: Tensor
    ) -> Tensor:
        """Add the change, round as the output will be, and note what is new. Returns [outputs, inputs (+ 1)]."""
        subject = self.subjects[pairs[0].task]
        whole = weight if bias is None else torch.cat([weight, bias.unsqueeze(1)], dim=1)
        whole = whole + change
        width = weight.shape[1]
        new = self._rounded(subject, stop.weight, whole[:, :width])
        self._note(subject, stop.weight, new.T if stop.transposed else new)
        if bias is None or stop.bias is None:
            return new
        new_bias = self._rounded(subject, stop.bias, whole[:, width])
        if self._covered(subject, stop.bias).any():
            self._note(subject, stop.bias, new_bias)
        return torch.cat([new, new_bias.unsqueeze(1)], dim=1)

    def _rounded(self, subject: RefitSubject, part: Part, values: Tensor) -> Tensor:
        group = subject.merged.groups.get(part.parameter)
        return values if group is None else values.to(self.plain.dtype(group.disk[0])).float()

    def _note(self, subject: RefitSubject, part: Part, values: Tensor) -> None:
        """Keep what is to be written, and write a group of parameters once it is whole."""
        if part.index is not None:
            subject.merged.changed[part.parameter][part.index] = values
            return
        group = subject.merged.groups[part.parameter]
        pending = self._pending.setdefault(group.disk, {})
        pending[part.parameter] = values
        if len(pending) == len(group.parameters):
            self._write(group.disk)

    # ---- stacked experts ---------------------------------------------------------------------------------------

    def _at_experts(self, pairs: Sequence[Pair], stop: ExpertsStop) -> None:
        """Each expert is fitted to the tokens that the merged model sends it, then all go on together."""
        fitting = self._writer is not None and not math.isinf(self.stiffness)
        if fitting and not (self.seen and stop.key in self.seen.twice):
            fitted = [pair for pair in pairs if pair.fitted]
            self._hold_stacks(pairs, stop)
            for expert in range(stop.stacks[0].shape[0]):
                if nested := [one for pair in fitted if (one := self._on_expert(pair, expert)) is not None]:
                    lead(nested, self._at_linear, self._workers)
        for_each(lambda pair: [one.go_on() for one in pair.passes], pairs, self._workers)
        for pair in pairs:
            self._score(pair)
        self._release_stacks(pairs)

    def _hold_stacks(self, pairs: Sequence[Pair], stop: ExpertsStop) -> None:
        """One copy of the merged experts, which all tasks' models see."""
        stops = {pair.task: pair.merged.stop for pair in pairs}
        for number, stack in enumerate(stop.stacks):
            values = self.subjects[pairs[0].task].merged.load(stack).clone()
            for task, own in stops.items():
                assert isinstance(own, ExpertsStop)
                self.subjects[task].merged.changed[own.stacks[number].parameter] = values

    def _release_stacks(self, pairs: Sequence[Pair]) -> None:
        for task in sorted({pair.task for pair in pairs}):
            merged = self.subjects[task].merged
            if task == pairs[0].task:
                for parameter, values in merged.changed.items():
                    pending = self._pending.setdefault(merged.groups[parameter].disk, {})
                    pending[parameter] = values
                for disk in {merged.groups[parameter].disk for parameter in merged.changed}:
                    self._write(disk)
            merged.changed.clear()
        self._stacked_masks.clear()

    def _on_expert(self, pair: Pair, expert: int) -> Pair | None:
        """Passes of both models through one expert, on the tokens that the merged model sends there."""
        merged, finetuned = pair.stops
        assert isinstance(merged, ExpertsStop) and isinstance(finetuned, ExpertsStop)
        rows = pair.merged.rows(merged.hidden)
        rows = rows[(merged.index.reshape(len(merged.hidden), -1)[rows] == expert).any(1)]
        if len(rows) == 0:
            return None
        passes = [
            Pass(one.weights, lambda stop=stop: stop.alone(expert, stop.hidden[rows]), one.stops)
            for one, stop in zip(pair.passes, (merged, finetuned), strict=True)
        ]
        return Pair(pair.task, True, passes[0], passes[1])

    # ---- what comes of it --------------------------------------------------------------------------------------

    def _score(self, pair: Pair) -> None:
        """Compare the outputs of a held-out pair that has ended, and forget them."""
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
        pair.score = disagreement(merged, finetuned, subject.task.logits)

    def _write(self, disk: tuple[str, ...]) -> None:
        """The values under the masks of the tensors that some parameters make up, with those that did not change."""
        assert self._writer is not None
        changed = self._pending.pop(disk)
        subject = self.subjects[0]
        group = _group_of(subject.merged.groups, disk)
        tensors = {
            name: changed[name] if name in changed else subject.merged.load(subject.parts[name])
            for name in group.parameters
        }
        for name, values in to_disk(subject.model, group, tensors).items():
            self._writer.write(name, NAME_ON_DISK[self.plain.dtype(name)], self.plain.cut(name, values.cpu()))


def _mean_over_tasks(pairs: Sequence[Pair]) -> float:
    means = []
    for task in sorted({pair.task for pair in pairs}):
        scores = [pair.score for pair in pairs if pair.task == task and pair.score is not None]
        means.append(sum(found for found, _ in scores) / max(1, sum(rows for _, rows in scores)))
    return sum(means) / len(means)


def _names_in(key: Key) -> Iterator[Key]:
    """The tuples in a key, however deep."""
    yield key
    for part in key:
        if isinstance(part, tuple):
            yield from _names_in(part)


def _group_of(groups: Mapping[str, Group], disk: tuple[str, ...]) -> Group:
    return next(group for group in groups.values() if group.disk == disk)


def _linear_stop(one: Pass) -> LinearStop:
    assert isinstance(one.stop, LinearStop)
    return one.stop


def _behind(pair: Pair, rows: Tensor) -> Tensor | float:
    """What the merged model lacks where a linear's product is added, [rows, outputs]: the linear makes up for it."""
    merged, finetuned = (_linear_stop(one).residual for one in pair.passes)
    return 0.0 if merged is None or finetuned is None else (finetuned - merged).reshape(-1, merged.shape[-1])[rows]


def in_order(work: Callable[[Any], Any], items: Sequence[Any], workers: int) -> Iterator[Any]:
    """Results in the order of the items, a few of which are worked on at once."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(workers, initializer=keep_to_itself) as pool:
        for first in range(0, len(items), workers):
            yield from pool.map(work, items[first : first + workers])
