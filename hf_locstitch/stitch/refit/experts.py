"""The experts of a layer, stacked in one parameter: each is fitted separately before any pass runs through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from hf_locstitch.runtime.processes import Processes
from hf_locstitch.stitch.refit.lockstep import LockstepStop, Pair, lockstep
from hf_locstitch.stitch.refit.models import TaskModels
from hf_locstitch.stitch.refit.passes import Pass
from hf_locstitch.stitch.refit.states import MakeStates
from hf_locstitch.stitch.refit.stops import Experts, ExpertsStop, Linear


class StackedExperts:
    """at_linear: fits one linear layer and returns how to continue, as `lockstep` expects."""

    def __init__(
        self,
        models: Sequence[TaskModels],
        at_linear: Callable[[Sequence[Pair], LockstepStop], Callable[[], object]],
        workers: int,
        processes: Processes,
        states: MakeStates,
    ) -> None:
        self._models, self._at_linear = models, at_linear
        self._workers, self._processes, self._states = workers, processes, states

    def fit(self, pairs: Sequence[Pair], task: int, experts: Experts) -> None:
        """pairs: of this process, waiting before the experts. experts: as parts of the task's model.

        Every process goes through all experts, including those that none of its tokens is routed to.
        """

        def visit(passes: Sequence[Pair], stop: LockstepStop) -> Callable[[], object]:
            assert isinstance(stop.place, Linear)  # of any task: only this task's copies are in all processes
            return self._at_linear(passes, LockstepStop(task, _among(experts, stop.place)))

        for passes in self._processes.together(lambda: self._begin(pairs, task, experts)):
            lockstep(passes, visit, self._workers, self._processes)

    def release(self, task: int) -> dict[str, Tensor]:
        """Drop the copies. Returns the task's, with the fitted values, by parameter."""
        changed = dict(self._models[task].merged.changed)
        for task_models in self._models:
            task_models.merged.changed.clear()
        return changed

    def _begin(self, pairs: Sequence[Pair], task: int, experts: Experts) -> list[list[Pair]]:
        """For each expert, passes through this expert only, not started."""
        self._hold_stacks(pairs, task, experts)
        by_expert: list[list[Pair]] = [[] for _ in range(experts.stacks[0].shape[0])]
        for pair in pairs:
            for expert, rows in enumerate(_routed(pair, len(by_expert)) if pair.fitted else ()):
                if len(rows):
                    merged, finetuned = (self._alone(one, expert, rows) for one in pair.passes)
                    by_expert[expert].append(Pair(pair.task, True, merged, finetuned))
        return by_expert

    def _hold_stacks(self, pairs: Sequence[Pair], task: int, experts: Experts) -> None:
        """Make one copy of the merged experts, shared by all tasks' models."""
        stacks = {pair.task: _stop(pair.merged).stacks for pair in pairs} | {task: experts.stacks}
        for number, stack in enumerate(experts.stacks):
            values = self._models[task].merged.load(stack).clone()
            for other, own in stacks.items():
                self._models[other].merged.changed[own[number].parameter] = values

    def _alone(self, one: Pass, expert: int, rows: Tensor) -> Pass:
        """A pass through one expert, of the tokens in these rows of a pass that waits before the experts."""

        def work() -> Tensor:
            stop = _stop(one)
            with one.at_hand():
                tokens = stop.hidden[rows]
            return stop.alone(expert, tokens)

        return Pass(one.weights, work, one.stops, states=self._states())


def _routed(pair: Pair, experts: int) -> list[Tensor]:
    """For each expert, the rows of a pair's tokens (without padding) that the merged model routes to it."""
    stop = _stop(pair.merged)
    with pair.merged.at_hand():
        rows = pair.merged.rows(stop.hidden)
        index = stop.index.reshape(len(stop.hidden), -1)[rows]
        return [rows[(index == expert).any(1)] for expert in range(experts)]


def _among(experts: Experts, linear: Linear) -> Linear:
    """The same matrix, as a part of these stacks."""
    (stack,) = (stack for stack in experts.stacks if stack.key == linear.key[:-1])
    return replace(linear, weight=stack.at(linear.key[-1]))


def _stop(one: Pass) -> ExpertsStop:
    assert isinstance(one.stop, ExpertsStop)
    return one.stop
