"""The experts of a layer, stacked in one parameter: each is fitted by itself before any pass goes through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from hf_locstitch.runtime.processes import Processes
from hf_locstitch.stitch.refit.lockstep import LockstepStop, Pair, lockstep
from hf_locstitch.stitch.refit.models import TaskModels
from hf_locstitch.stitch.refit.passes import Experts, ExpertsStop, Linear, Pass
from hf_locstitch.stitch.refit.states import MakeStates


class StackedExperts:
    """at_linear: fits one linear and returns how to go on, as `lead` wants it."""

    def __init__(
        self,
        subjects: Sequence[TaskModels],
        at_linear: Callable[[Sequence[Pair], LockstepStop], Callable[[], object]],
        workers: int,
        processes: Processes,
        states: MakeStates,
    ) -> None:
        self._subjects, self._at_linear = subjects, at_linear
        self._workers, self._processes, self._states = workers, processes, states

    def fit(self, pairs: Sequence[Pair], task: int, experts: Experts) -> None:
        """pairs: of this process, which wait before the experts. experts: in the parts of the task's model.

        Every process goes through all experts, also through those that none of its tokens goes to.
        """

        def visit(passes: Sequence[Pair], meeting: LockstepStop) -> Callable[[], object]:
            assert isinstance(meeting.place, Linear)  # of any task: only this one's copies are in all processes
            return self._at_linear(passes, LockstepStop(task, _among(experts, meeting.place)))

        for passes in self._processes.together(lambda: self._begin(pairs, task, experts)):
            lockstep(passes, visit, self._workers, self._processes)

    def release(self, task: int) -> dict[str, Tensor]:
        """Let go of the copies. Returns the task's, which hold what was fitted, by parameter."""
        changed = dict(self._subjects[task].merged.changed)
        for subject in self._subjects:
            subject.merged.changed.clear()
        return changed

    def _begin(self, pairs: Sequence[Pair], task: int, experts: Experts) -> list[list[Pair]]:
        """Of each expert, passes through it alone, which have not started."""
        self._hold_stacks(pairs, task, experts)
        found: list[list[Pair]] = [[] for _ in range(experts.stacks[0].shape[0])]
        for pair in pairs:
            for expert, rows in enumerate(_routed(pair, len(found)) if pair.fitted else ()):
                if len(rows):
                    merged, finetuned = (self._alone(one, expert, rows) for one in pair.passes)
                    found[expert].append(Pair(pair.task, True, merged, finetuned))
        return found

    def _hold_stacks(self, pairs: Sequence[Pair], task: int, experts: Experts) -> None:
        """One copy of the merged experts, which all tasks' models see."""
        stacks = {pair.task: _stop(pair.merged).stacks for pair in pairs} | {task: experts.stacks}
        for number, stack in enumerate(experts.stacks):
            values = self._subjects[task].merged.load(stack).clone()
            for other, own in stacks.items():
                self._subjects[other].merged.changed[own[number].parameter] = values

    def _alone(self, one: Pass, expert: int, rows: Tensor) -> Pass:
        """From the tokens that a pass which waits before the experts has in these rows."""

        def work() -> Tensor:
            stop = _stop(one)
            with one.at_hand():
                tokens = stop.hidden[rows]
            return stop.alone(expert, tokens)

        return Pass(one.weights, work, one.stops, states=self._states())


def _routed(pair: Pair, experts: int) -> list[Tensor]:
    """The rows of a pair's tokens, but for padding, that the merged model sends to each of so many experts."""
    stop = _stop(pair.merged)
    with pair.merged.at_hand():
        rows = pair.merged.rows(stop.hidden)
        index = stop.index.reshape(len(stop.hidden), -1)[rows]
        return [rows[(index == expert).any(1)] for expert in range(experts)]


def _among(experts: Experts, linear: Linear) -> Linear:
    """The same matrix as a part of these stacks."""
    (stack,) = (stack for stack in experts.stacks if stack.key == linear.key[:-1])
    return replace(linear, weight=stack.at(linear.key[-1]))


def _stop(one: Pass) -> ExpertsStop:
    assert isinstance(one.stop, ExpertsStop)
    return one.stop
