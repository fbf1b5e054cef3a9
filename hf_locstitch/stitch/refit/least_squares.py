"""The least-squares problem of one linear layer, assembled from all passes of all processes."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_locstitch.errors import RequestError
from hf_locstitch.runtime.chunks import in_order
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.stitch.refit.lockstep import Pair
from hf_locstitch.stitch.refit.models import TaskModels
from hf_locstitch.stitch.refit.passes import linear_stop
from hf_locstitch.stitch.refit.settings import RefitSettings
from hf_locstitch.stitch.refit.solve import Moments, solve_masked, system, with_ones

Target = Callable[[int], Tensor]


@dataclass(frozen=True)
class Problem:
    """One process's part of the problem for a linear layer.

    name: on disk. weight [outputs, inputs], bias [outputs]: the merged model's. mask: where they may change, bool
    [outputs, inputs], the bias in a last column; None: nowhere. rows: of each fitted pair's input, without padding,
    by the pair's index. tokens: of each task. known: whether the inputs are the same as for the layer before.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    mask: Tensor | None
    rows: Mapping[int, Tensor]
    tokens: Mapping[int, int]
    known: bool

    def tell(self) -> tuple[bool, Mapping[int, int]]:
        """What the other processes need to know."""
        return self.known, self.tokens


class Targets:
    """The outputs of a linear layer in the finetuned models, on their own activations.

    Targets of fitted pairs are kept until the finetuned model continues with them; where hidden states are offloaded,
    they are recomputed instead.
    """

    def __init__(self, models: Sequence[TaskModels], pairs: Sequence[Pair]) -> None:
        self._models, self._pairs = models, pairs
        self._kept: dict[int, Tensor] = {}

    def to_fit(self) -> Iterator[tuple[list[int], Target]]:
        """For each task, the indices of its fitted pairs, and a function that gives the target of each, [...,
        outputs]."""
        for numbers, target in self._by_task([number for number, pair in enumerate(self._pairs) if pair.fitted]):

            def keep(number: int, target: Target = target) -> Tensor:
                found = target(number)
                if self._pairs[number].finetuned.states is None:
                    self._kept[number] = found
                return found

            yield numbers, keep

    def to_go_on(self) -> Iterator[tuple[list[int], Target]]:
        """Indices of pairs, all of them in total, and a function that gives the target of each, [..., outputs],
        once."""
        kept = list(self._kept)
        if kept:
            yield kept, self._kept.pop
        yield from self._by_task([number for number in range(len(self._pairs)) if number not in kept])

    def _by_task(self, among: Sequence[int]) -> Iterator[tuple[list[int], Target]]:
        for task, task_models in enumerate(self._models):
            if numbers := [number for number in among if self._pairs[number].task == task]:
                stop = linear_stop(self._pairs[numbers[0]].finetuned)
                yield numbers, self._product(*stop.load(task_models.finetuned))

    def _product(self, weight: Tensor, bias: Tensor | None) -> Target:
        return lambda number: F.linear(linear_stop(self._pairs[number].finetuned).x, weight, bias)


class LeastSquares:
    """lambda_: λ. tokens: for each tensor, those of the task with the fewest, and its input width."""

    def __init__(
        self, config: RefitSettings, lambda_: float, models: Sequence[TaskModels], workers: int, processes: Processes
    ) -> None:
        self.tokens: dict[str, tuple[int, int]] = {}
        self._config, self._lambda, self._models = config, lambda_, models
        self._workers, self._processes = workers, processes
        self._inputs: list[weakref.ref[Tensor]] = []
        self._gram: Tensor | None = None  # of these inputs, over all processes

    def begin(
        self, pairs: Sequence[Pair], name: str, weight: Tensor, bias: Tensor | None, mask: Tensor | None
    ) -> Problem:
        """Set up the problem. Arguments as in Problem."""
        if mask is None:
            return Problem(name, weight, bias, None, {}, {}, False)
        inputs = [linear_stop(pair.merged).x for pair in pairs]
        known = self._gram is not None and self._gram.shape[0] == mask.shape[1]
        known = known and len(self._inputs) == len(inputs) and all(
            ref() is x for ref, x in zip(self._inputs, inputs, strict=True)
        )  # fmt: skip
        self._inputs = [weakref.ref(x) for x in inputs]
        rows: dict[int, Tensor] = {}
        tokens: Counter[int] = Counter()
        for number, pair in enumerate(pairs):
            if pair.fitted:
                with pair.merged.at_hand():
                    rows[number] = pair.merged.rows(inputs[number])
                tokens[pair.task] += len(rows[number])
        return Problem(name, weight, bias, mask, rows, tokens, known)

    def solve(
        self,
        pairs: Sequence[Pair],
        problem: Problem,
        told: Sequence[tuple[bool, Mapping[int, int]]],
        targets: Targets,
    ) -> Tensor | None:
        """The change of weight and bias, [outputs, inputs (+ 1)], the same in all processes; None if there is none.

        told: by each process, whether it already knows the Gram matrix, and its tokens by task.
        """
        tokens: Counter[int] = Counter()
        for _, found in told:
            tokens.update(found)
        if not any(tokens.values()):
            return None
        known = all(known for known, _ in told)
        gram, cross = self._processes.together(lambda: self._moments(pairs, problem, tokens, known, targets))
        if gram is not None:
            self._processes.add_up(gram)
            self._gram = gram
        self._processes.add_up(cross)
        self._processes.together(lambda: self._solve_own_rows(cross, problem.mask))
        self._processes.add_up(cross)
        found = (min(tokens.values()), problem.weight.shape[1])
        self.tokens[problem.name] = min(self.tokens.get(problem.name, found), found)
        return cross

    def _moments(
        self, pairs: Sequence[Pair], problem: Problem, tokens: Mapping[int, int], known: bool, targets: Targets
    ) -> tuple[Tensor | None, Tensor]:
        """This process's part of Σ XᵀX / N, unless that is known, and of Σ RᵀX / N, over tasks with N tokens each."""
        weight, bias = problem.weight, problem.bias
        width = weight.shape[1] + (bias is not None)
        total_gram = None if known else weight.new_zeros(width, width)
        total_cross = weight.new_zeros(len(weight), width)
        for numbers, target in targets.to_fit():
            task = Moments(weight.new_zeros(()) if total_gram is None else torch.zeros_like(total_gram),
                           torch.zeros_like(total_cross))  # fmt: skip

            def moments(number: int, target: Target = target) -> tuple[Tensor, Tensor, int]:
                pair = pairs[number]
                with pair.finetuned.at_hand(), pair.merged.at_hand():
                    expected = target(number)
                    x, rows = linear_stop(pair.merged).x, problem.rows[number]
                    own = x.reshape(-1, x.shape[-1])[rows]
                    residual = expected.reshape(-1, len(weight))[rows] - F.linear(own, weight, bias)
                    residual += _behind(pair, rows)
                own = own if bias is None else with_ones(own)
                return own.new_zeros(()) if known else own.T @ own, residual.T @ own, len(rows)

            for found in in_order(moments, numbers, self._workers):
                task.add(*found)
            pair = pairs[numbers[0]]
            self._check(pair, problem.name, task)
            if tokens[pair.task]:
                total_cross += task.cross / tokens[pair.task]
                if total_gram is not None:
                    total_gram += task.gram / tokens[pair.task]
        return total_gram, total_cross

    def _solve_own_rows(self, cross: Tensor, mask: Tensor | None) -> None:
        """Replace this process's rows of the right-hand sides by their solutions, and all other rows by 0."""
        assert mask is not None and self._gram is not None
        own = self._processes.own(len(cross))
        matrix = system(self._gram, self._lambda, self._config.ridge)
        change = solve_masked(matrix, cross[own], mask[own], self._config.steps)
        cross.zero_()
        cross[own] = change

    def _check(self, pair: Pair, name: str, task: Moments) -> None:
        for values, model in ((task.gram, "the merged model"), (task.cross, "the finetuned model")):
            if not torch.isfinite(values).all():
                raise RequestError(
                    f"on the inputs of {self._models[pair.task].name}, the activations of {model} at {name} contain "
                    "NaN or infinity, so nothing can be fitted to them. Check the checkpoint and the inputs, or use "
                    "--stitch mean."
                )


def _behind(pair: Pair, rows: Tensor) -> Tensor | float:
    """The merged model's deficit in the tensor that the output is added to, [rows, outputs]: the layer compensates
    it."""
    merged, finetuned = (linear_stop(one).residual for one in pair.passes)
    return 0.0 if merged is None or finetuned is None else (finetuned - merged).reshape(-1, merged.shape[-1])[rows]
