"""RegMean: every linear gets the weights that come nearest, on each finetuned model's own activations, to what that
model's own linear gives, in closed form. Source: Jin et al., ICLR 2023, arXiv 2212.09849, section 3.

As in the authors' code, Gram matrices are means over tokens, so that tasks count alike, and biases, embeddings (tied
heads with them) and all else that no linear multiplies with keep the plain mean. Where a Gram matrix is singular, what
the inputs leave open is the plain mean, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.chunks import in_order
from hf_locstitch.errors import RequestError
from hf_locstitch.inputs import Inputs
from hf_locstitch.localize.names import to_disk
from hf_locstitch.localize.open_subject import find_device
from hf_locstitch.plan import MergePlan
from hf_locstitch.processes import Processes
from hf_locstitch.progress import Progress
from hf_locstitch.refit.config import RegMean
from hf_locstitch.refit.lead import lead
from hf_locstitch.refit.passes import Key, LinearStop, Pass, linear_stop
from hf_locstitch.refit.subject import OpenTask, open_task
from hf_locstitch.refit.values import Refitted, RefittedWriter, open_refitted
from hf_locstitch.refit.weights import part_of

RIDGE = 1e-6  # of the diagonal: above the rounding of float32 sums, far below what would change a sound solution
DEAD = 1e-12  # of the diagonal's mean, so that an input that is always 0 has an equation
HEADING = "regmean"


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def shrink(gram: Tensor, alpha: float) -> Tensor:
    """What lies off the diagonal, times alpha; float64 [inputs, inputs]."""
    wide = gram.double()
    return wide * alpha + torch.diag((1 - alpha) * wide.diagonal())


def regression_mean(grams: Sequence[Tensor], weights: Callable[[int], Tensor], alpha: float) -> Tensor:
    """(Σ G_i)⁻¹ Σ G_i W_i, as change of the plain mean. grams: [inputs, inputs] of each model; weights: of the model
    of that number, [outputs, inputs], asked for twice. Returns float64 [outputs, inputs].
    """
    mean = weights(0).double()
    for number in range(1, len(grams)):
        mean = mean + weights(number)
    mean = mean / len(grams)
    total = torch.zeros_like(grams[0], dtype=torch.float64)
    cross = torch.zeros_like(mean)
    for number, gram in enumerate(grams):
        own = shrink(gram, alpha)
        total += own
        cross += (weights(number).double() - mean) @ own
    if not total.any():
        return mean
    diagonal = total.diagonal()
    diagonal.copy_(diagonal * (1 + RIDGE) + DEAD * diagonal.mean())
    return mean + torch.linalg.solve(total, cross, left=False)


# ---- the work -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alone:
    """The finetuned model on one batch of inputs of a task (its number)."""

    task: int
    run: Pass

    @property
    def passes(self) -> tuple[Pass]:
        return (self.run,)

    @property
    def stops(self) -> tuple[Any]:
        return (self.run.stop,)

    @property
    def stop(self) -> LinearStop:
        return linear_stop(self.run)


def regmean(
    plan: MergePlan, inputs: Inputs, folder: Path, own: Collection[str], processes: Processes, progress: Progress
) -> tuple[Refitted, dict[str, Any]]:
    """The fitted tensors, and what to record. Raises RequestError.

    folder: for temporary files; what an earlier process finished there is taken up. own, processes: all tensors, and
    this process alone.
    """
    how = plan.recipe.stitch
    assert isinstance(how, RegMean)
    folder.mkdir(exist_ok=True)
    readers = inputs.fetch().readers
    tasks = open_tasks(plan, how, readers, folder)
    values = open_refitted(folder / "values", HEADING, own, processes)
    if values is None:
        work = Work(plan, how, tasks, RefittedWriter(folder / "values", own, processes), processes)
        with progress.bar("following", 0, " linears") as advance:
            calls = work.follow(advance)
        with progress.bar("averaging", sum(calls.values()), " linears") as advance:
            work.run(calls, advance)
        work.writer.finish(HEADING)
        values = open_refitted(folder / "values", HEADING, own, processes)
        assert values is not None
    return values, record(plan, how, tasks, values)


def open_tasks(
    plan: MergePlan, how: RegMean, readers: Mapping[str, CheckpointReader], folder: Path
) -> dict[str, OpenTask]:
    """By name, in the order of adding."""
    device = find_device(how)
    return {
        name: open_task(how, name, readers["base"], readers[name], plan.refit_data[name], folder, device)
        for name in plan.order
    }


def stops_of(task: OpenTask, chosen: frozenset[str]) -> frozenset[str]:
    """Parameters at whose products a pass waits: matrices on disk that are merged, but for embeddings."""
    tables = [part_of(module.weight) for module in task.model.modules() if isinstance(module, nn.Embedding)]
    embeddings = {table.parameter for table in tables if table is not None}
    return frozenset(
        name
        for name, part in task.parts.items()
        if part.dim == 2
        and name not in embeddings
        and (group := task.finetuned.groups.get(name)) is not None
        and chosen.issuperset(group.disk)
    )


class Work:
    """All finetuned models side by side, each on its own inputs, from linear to linear."""

    def __init__(
        self,
        plan: MergePlan,
        how: RegMean,
        tasks: Mapping[str, OpenTask],
        writer: RefittedWriter,
        processes: Processes,
    ) -> None:
        self.writer, self._processes = writer, processes
        self._how, self._batch, self._workers = how, how.batch, plan.settings.workers
        self._names, self._tasks = list(tasks), list(tasks.values())
        chosen = frozenset(info.name for info in plan.localized)
        self._stops = [stops_of(task, chosen) for task in self._tasks]
        self._calls: Counter[Key] = Counter()
        self._due: Counter[Key] = Counter()
        self._sums: dict[Key, list[tuple[Tensor | None, int]]] = {}
        self._pending: dict[tuple[str, ...], dict[str, Tensor]] = {}
        self._advance: Callable[[int], object] = lambda _: None

    def follow(self, advance: Callable[[int], object]) -> Counter[Key]:
        """How often each linear is called in a pass: one batch of each task tells. Raises RequestError."""
        self._advance = advance
        firsts = [self._alone(number, 0) for number in range(len(self._tasks))]
        lead(firsts, lambda alones, _: partial(self._pass_by, alones), 1, self._processes)
        if not self._calls:
            raise RequestError(
                "no merged tensor of this model is called as a linear by its inputs: there is nothing for RegMean to "
                "fit. Use --method average, or check --include and the data's objective."
            )
        return self._calls

    def run(self, calls: Counter[Key], advance: Callable[[int], object]) -> None:
        """Write every linear's values. calls: what following told."""
        self._due, self._calls, self._advance = calls, Counter(), advance
        batches = [
            self._alone(number, first)
            for number, task in enumerate(self._tasks)
            for first in range(0, len(task.task.examples), self._batch)
        ]
        lead(batches, lambda alones, _: partial(self._visit, alones), self._workers, self._processes)

    def _alone(self, number: int, first: int) -> Alone:
        task = self._tasks[number]
        batch = task.task.examples[first : first + self._batch]
        return Alone(number, Pass(task.finetuned, lambda: task.task.outputs(task.model, batch), self._stops[number]))

    def _pass_by(self, alones: Sequence[Alone]) -> None:
        self._calls[alones[0].stop.key] += 1
        self._advance(1)
        for one in alones:
            weight, bias = self._values(one.task, one.stop)
            one.run.go_on(F.linear(one.stop.x, weight, bias))

    def _visit(self, alones: Sequence[Alone]) -> None:
        """Take all passes over one call of a linear; after its last one, fit it."""
        stop = alones[0].stop
        self._calls[stop.key] += 1
        self._advance(1)
        sums = self._sums.setdefault(stop.key, [(None, 0)] * len(self._tasks))
        stops = {one.task: one.stop for one in alones}
        last = self._calls == self._due
        for number in stops:
            weight, bias = self._values(number, stops[number])

            def work(one: Alone, weight: Tensor = weight, bias: Tensor | None = bias) -> tuple[Tensor, int]:
                x = one.stop.x
                rows = one.run.rows(x)
                own = x.reshape(-1, x.shape[-1])[rows]
                if last:
                    one.run.end()
                else:
                    one.run.go_on(F.linear(x, weight, bias))
                return own.T @ own, len(rows)

            for gram, tokens in in_order(work, [one for one in alones if one.task == number], self._workers):
                before, count = sums[number]
                sums[number] = gram if before is None else before.add_(gram), count + tokens
        if self._calls[stop.key] == self._due[stop.key]:
            self._fit(stops, self._sums.pop(stop.key))

    def _values(self, number: int, stop: LinearStop) -> tuple[Tensor, Tensor | None]:
        weights = self._tasks[number].finetuned
        weight = weights.load(stop.weight)
        bias = None if stop.bias is None else weights.held(stop.bias)
        return weight.T if stop.transposed else weight, bias

    def _fit(self, stops: Mapping[int, LinearStop], sums: Sequence[tuple[Tensor | None, int]]) -> None:
        grams = []
        for number, (gram, tokens) in enumerate(sums):
            assert gram is not None
            group = self._tasks[number].finetuned.groups[stops[number].weight.parameter]
            if not torch.isfinite(gram).all():
                raise RequestError(
                    f"on the inputs of {self._names[number]}, its activations at {group.disk[0]} hold NaN or infinity, "
                    "so nothing can be fitted to them. Check that checkpoint and those inputs, or use --method average."
                )
            grams.append(gram / max(1, tokens))
        found = regression_mean(grams, lambda number: self._values(number, stops[number])[0], self._how.alpha)
        self._note(stops[0], (found.T if stops[0].transposed else found).float())

    def _note(self, stop: LinearStop, values: Tensor) -> None:
        """Write a group of parameters once it is whole."""
        first = self._tasks[0]
        group = first.finetuned.groups[stop.weight.parameter]
        pending = self._pending.setdefault(group.disk, {})
        pending[stop.weight.parameter] = values.cpu()
        if len(pending) == len(group.parameters):
            for name, whole in to_disk(first.model, group, self._pending.pop(group.disk)).items():
                self.writer.write(name, "F32", [whole.reshape(-1)])


def record(plan: MergePlan, how: RegMean, tasks: Mapping[str, OpenTask], values: Refitted) -> dict[str, Any]:
    """What the manifest says."""
    return {
        **how.dump(),
        "counts": {name: {"fitted": len(tasks[name].task.examples), "held_out": 0} for name in plan.refit_data},
        "data": {name: found.pinned.dump() for name, found in plan.refit_data.items()},
        "refitted": sorted(values.names),
        "kept_plain": {
            info.name: "an embedding, or not called as a linear by these inputs"
            for info in plan.localized
            if info.name not in values and len(info.shape) > 1
        },
        "notes": [],
    }
