"""The experts of a layer, stacked in one parameter: each is fitted by itself before any pass goes through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from hf_locstitch.processes import Processes
from hf_locstitch.refit.lead import Meeting, Pair, lead
from hf_locstitch.refit.passes import Experts, ExpertsStop, Linear, Pass
from hf_locstitch.refit.subject import RefitSubject


class StackedExperts:
    """at_linear: fits one linear and returns how to go on, as `lead` wants it."""

    def __init__(
        self,
        subjects: Sequence[RefitSubject],
        at_linear: Callable[[Sequence[Pair], Meeting], Callable[[], object]],
        workers: int,
        processes: Processes,
    ) -> None:
        self._subjects, self._at_linear, self._workers, self._processes = subjects, at_linear, workers, processes

    def fit(self, pairs: Sequence[Pair], task: int, experts: Experts) -> None:
        """pairs: of this process, which wait before the experts. experts: in the parts of the task's model.

        Every process goes through all experts, also through those that none of its tokens goes to.
        """

        def visit(passes: Sequence[Pair], meeting: Meeting) -> Callable[[], object]:
            assert isinstance(meeting.place, Linear)  # of any task: only this one's copies are in all processes
            return self._at_linear(passes, Meeting(task, _among(experts, meeting.place)))

        for passes in self._processes.together(lambda: self._begin(pairs, task, experts)):
            lead(passes, visit, self._workers, self._processes)

    def release(self, task: int) -> dict[str, Tensor]:
        """Let go of the copies. Returns the task's, which hold what was fitted, by parameter."""
        changed = dict(self._subjects[task].merged.changed)
        for subject in self._subjects:
            subject.merged.changed.clear()
        return changed

    def _begin(self, pairs: Sequence[Pair], task: int, experts: Experts) -> list[list[Pair]]:
        """Of each expert, passes through it alone, which have not started."""
        self._hold_stacks(pairs, task, experts)
        fitted = [pair for pair in pairs if pair.fitted]
        found = ([self._on_expert(pair, expert) for pair in fitted] for expert in range(experts.stacks[0].shape[0]))
        return [[one for one in of_expert if one is not None] for of_expert in found]

    def _hold_stacks(self, pairs: Sequence[Pair], task: int, experts: Experts) -> None:
        """One copy of the merged experts, which all tasks' models see."""
        stacks = {pair.task: _stop(pair.merged).stacks for pair in pairs} | {task: experts.stacks}
        for number, stack in enumerate(experts.stacks):
            values = self._subjects[task].merged.load(stack).clone()
            for other, own in stacks.items():
                self._subjects[other].merged.changed[own[number].parameter] = values

    def _on_expert(self, pair: Pair, expert: int) -> Pair | None:
        """Passes of both models through one expert, on the tokens that the merged model sends there."""
        merged = _stop(pair.merged)
        rows = pair.merged.rows(merged.hidden)
        rows = rows[(merged.index.reshape(len(merged.hidden), -1)[rows] == expert).any(1)]
        if len(rows) == 0:
            return None
        stops = (merged, _stop(pair.finetuned))
        passes = [
            Pass(one.weights, lambda stop=stop: stop.alone(expert, stop.hidden[rows]), one.stops)
            for one, stop in zip(pair.passes, stops, strict=True)
        ]
        return Pair(pair.task, True, passes[0], passes[1])


def _among(experts: Experts, linear: Linear) -> Linear:
    """The same matrix as a part of these stacks."""
    (stack,) = (stack for stack in experts.stacks if stack.key == linear.key[:-1])
    return replace(linear, weight=stack.at(linear.key[-1]))


def _stop(one: Pass) -> ExpertsStop:
    assert isinstance(one.stop, ExpertsStop)
    return one.stop
