"""RegMean: the weights of every linear layer are those whose outputs are closest, on each finetuned model's own
activations, to the outputs of that model's layer, in closed form. Source: Jin et al., ICLR 2023, arXiv 2212.09849,
section 3.

As in the authors' code, Gram matrices are means over tokens, so that tasks have equal weight, and biases, embeddings
(with tied heads) and everything else that is not a linear layer's matrix keep the plain mean. Where a Gram matrix is
singular, the directions that the inputs leave open keep the plain mean, too.

RegMean++ (Nguyen et al., TMLR 2026, arXiv 2508.03121; FusionBench's regmean_plusplus, which is theirs) gives each
transformer block what the blocks before it give in the merged model, which are fitted already; in the block,
activations are the finetuned model's. What is outside of blocks runs with the merged weights, the mean until fitted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_locstitch.errors import RequestError
from hf_locstitch.runtime.chunks import for_each, in_order
from hf_locstitch.runtime.processes import divide
from hf_locstitch.stitch.fitted_values import FittedValues, FittedWriter, open_fitted
from hf_locstitch.stitch.fitting import FitJob
from hf_locstitch.stitch.refit.lockstep import LockstepStop, lockstep
from hf_locstitch.stitch.refit.models import OpenTask, batched, merged_weights, open_task
from hf_locstitch.stitch.refit.param_groups import ParamGroups
from hf_locstitch.stitch.refit.passes import Pass, linear_stop
from hf_locstitch.stitch.refit.plain import PlainStitch
from hf_locstitch.stitch.refit.settings import RegMeanSettings
from hf_locstitch.stitch.refit.states import MakeStates, making_states
from hf_locstitch.stitch.refit.stops import Key, Linear, LinearStop
from hf_locstitch.stitch.refit.weights import Weights, part_of
from hf_locstitch.tasks.loading import find_device

RIDGE = 1e-6  # of the diagonal: above the rounding of float32 sums, far below what would change a well-posed solution
DEAD = 1e-12  # of the diagonal's mean, so that an input that is always 0 does not make the system singular
HEADING = "regmean"


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def shrink(gram: Tensor, alpha: float) -> Tensor:
    """The Gram matrix with its off-diagonal elements times alpha; float64 [inputs, inputs]."""
    wide = gram.double()
    return wide * alpha + torch.diag((1 - alpha) * wide.diagonal())


def regression_mean(grams: Sequence[Tensor], weights: Callable[[int], Tensor], alpha: float) -> Tensor:
    """(Σ G_i)⁻¹ Σ G_i W_i, computed as a change of the plain mean. grams: [inputs, inputs] of each model; weights:
    gives those of a model by index, [outputs, inputs], called twice for each. Returns float64 [outputs, inputs].
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


@dataclass
class Sums:
    """Sums over tokens of one model: XᵀX [inputs, inputs] of a layer's inputs, and the number of tokens."""

    gram: Tensor
    tokens: int

    def add(self, other: Sums) -> None:
        self.gram += other.gram
        self.tokens += other.tokens


# ---- the work -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alone:
    """A pass of the finetuned model on one batch of inputs of a task (its index)."""

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


def regmean(config: RegMeanSettings, job: FitJob) -> tuple[FittedValues, dict[str, Any]]:
    """The fitted tensors, and what to record. Raises RequestError."""
    folder, processes = job.folder, job.processes
    processes.on_first(lambda: folder.mkdir(exist_ok=True))
    values = open_fitted(folder / "values", HEADING, job.own, processes)
    if values is None:
        fit(config, job)
        values = open_fitted(folder / "values", HEADING, job.own, processes)
        assert values is not None
    return values, record(job, config, values)


def fit(config: RegMeanSettings, job: FitJob) -> None:
    """Write the values of all linear layers into the folder."""
    processes, models = job.processes, job.folder / f"models.{job.processes.rank}"
    device = processes.together(lambda: find_device(config.device, float64=True))
    tasks = processes.together(
        lambda: {
            name: open_task(config, name, job.readers["base"], job.readers[name], job.data[name], models, device)
            for name in job.order
        }
    )
    plain = PlainStitch(replace(job.view, scale=1.0))
    running = [merged_weights(one, plain, device) if config.merged_inputs else one.finetuned for one in tasks.values()]
    writer = FittedWriter(job.folder / "values", job.own, processes)
    with making_states(config.states_on, device, job.folder / f"states.{processes.rank}") as states:
        work = Work(config, job, tasks, running, writer, states)
        with job.progress.bar("tracing", 0, " layers") as advance:
            calls = work.follow(advance)
        with job.progress.bar("averaging", sum(calls.values()), " layers") as advance:
            work.run(calls, advance)
    counts = {name: {"fitted": len(tasks[name].task.examples), "held_out": 0} for name in job.data}
    writer.finish(HEADING, counts=counts)


def stops_of(task: OpenTask, chosen: frozenset[str]) -> frozenset[str]:
    """Parameters at which a pass stops: merged matrices on disk, except embeddings."""
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
    """All finetuned models side by side, each on its own inputs, from layer to layer. running: the weights that inputs
    pass through, of each task; of RegMean++, from block to block.

    Every process has its share of the inputs and of each layer's output rows, and all have the same sums.
    """

    def __init__(
        self,
        config: RegMeanSettings,
        job: FitJob,
        tasks: Mapping[str, OpenTask],
        running: Sequence[Weights],
        writer: FittedWriter,
        states: MakeStates,
    ) -> None:
        self._writer, self._processes, self._states = writer, job.processes, states
        self._config, self._workers = config, job.settings.workers
        self._names, self._tasks, self._running = list(tasks), list(tasks.values()), running
        chosen = frozenset(info.name for info in job.tensors)
        self._stops = [stops_of(task, chosen) for task in self._tasks]
        self._parts = [{part.key: part for part in task.parts.values()} for task in self._tasks]
        self._calls: Counter[Key] = Counter()
        self._due: Counter[Key] = Counter()
        self._sums: dict[Key, dict[int, Sums]] = {}
        self._block: str | None = None
        self._pending = ParamGroups(self._tasks[0].model, writer.writes)
        self._advance: Callable[[int], object] = lambda _: None

    def follow(self, advance: Callable[[int], object]) -> Counter[Key]:
        """How often each linear layer is called in a pass, traced with one batch of each task. Raises RequestError."""
        self._advance = advance
        lockstep(
            self._share(lambda task: self._batches(task, task.units)[:1]), self._pass_by, self._workers, self._processes
        )
        if not self._calls:
            raise RequestError(
                "with these inputs, the model uses no merged tensor as a linear layer: there is nothing for RegMean to "
                "fit. Use --method average, or check --include and the data's objective."
            )
        return self._calls

    def run(self, calls: Counter[Key], advance: Callable[[int], object]) -> None:
        """Write every layer's values. calls: as traced."""
        self._due, self._calls, self._advance = calls, Counter(), advance
        lockstep(self._share(self._batches), self._visit, self._workers, self._processes)

    def _batches(self, task: OpenTask, most: float = math.inf) -> list[list[Any]]:
        """most: answer tokens, or examples, of a batch that may reach the outputs."""
        return batched(task.task, 0, len(task.task.examples), self._config.batch, most)

    def _share(self, choose: Callable[[OpenTask], Sequence[Sequence[Any]]]) -> list[Alone]:
        """This process's passes over the chosen batches of each task; may be empty."""
        jobs = [(number, batch) for number, task in enumerate(self._tasks) for batch in choose(task)]
        owners = divide([len(batch) for _, batch in jobs], self._processes.count)
        rank = self._processes.rank
        return [self._alone(*job) for job, owner in zip(jobs, owners, strict=True) if owner == rank]

    def _alone(self, number: int, batch: Sequence[Any]) -> Alone:
        task, stops = self._tasks[number], self._stops[number]
        work = partial(task.task.outputs, task.model, batch)
        blocks = task.finetuned if self._config.merged_inputs else None
        return Alone(number, Pass(self._running[number], work, stops, states=self._states(), in_blocks=blocks))

    def _pass_by(self, alones: Sequence[Alone], stop: LockstepStop) -> Callable[[], None]:
        self._count(stop)
        return partial(self._go_on, alones)

    def _count(self, stop: LockstepStop) -> None:
        self._calls[stop.place.key] += 1
        self._advance(1)

    def _visit(self, alones: Sequence[Alone], stop: LockstepStop) -> Callable[[], None]:
        """Add what all passes bring to one call of a linear layer; at its last call, fit it."""
        linear = stop.place
        assert isinstance(linear, Linear)
        self._count(stop)
        block = alones[0].run.block if alones else None
        if block != self._block:  # all passes have run through the one before
            self._block = block
            for running in self._running:
                running.changed.clear()
        sums = self._sums.setdefault(linear.key, {})
        self._processes.together(lambda: self._add(alones, sums))
        fitted = None
        if self._calls[linear.key] == self._due[linear.key]:
            fitted = self._fit(linear, self._sums.pop(linear.key))
        if fitted is not None and block is not None:
            self._change(linear, fitted)
        return partial(self._go_on, alones, fitted if self._config.merged_inputs and block is None else None)

    def _change(self, linear: Linear, values: Tensor) -> None:
        """Let the block that runs give what it gives with these values [outputs, inputs] of a layer in it."""
        for parts, running in zip(self._parts, self._running, strict=True):
            running.changed[parts[linear.key].parameter] = values.T if linear.transposed else values

    def _add(self, alones: Sequence[Alone], sums: dict[int, Sums]) -> None:
        def work(one: Alone) -> Sums:
            x = one.stop.x
            with one.run.at_hand():
                rows = one.run.rows(x)
                own = x.reshape(-1, x.shape[-1])[rows]
            return Sums(own.T @ own, len(rows))

        for one, found in zip(alones, in_order(work, alones, self._workers), strict=True):
            if one.task in sums:
                sums[one.task].add(found)
            else:
                sums[one.task] = found

    def _go_on(self, alones: Sequence[Alone], weight: Tensor | None = None) -> None:
        """weight: of the layer that they wait at, if not the one that they run with."""
        if self._calls == self._due:  # nothing is left to do
            for one in alones:
                one.run.end()
            return
        for number in range(len(self._tasks)):
            if own := [one for one in alones if one.task == number]:
                layer, weights = own[0].stop, own[0].run.weights
                used, bias = layer.load(weights) if weight is None else (weight, layer.load_bias(weights))
                for_each(lambda one, used=used, bias=bias: one.run.multiply(used, bias), own, self._workers)

    def _weight(self, number: int, linear: Linear) -> Tensor:
        """[outputs, inputs], of the model with that index."""
        weight = self._tasks[number].finetuned.load(self._parts[number][linear.key])
        return weight.T if linear.transposed else weight

    def _fit(self, linear: Linear, sums: Mapping[int, Sums]) -> Tensor:
        """Write the layer's values, and return them: float32 [outputs, inputs]."""
        tokens = self._processes.gather({number: found.tokens for number, found in sums.items()})
        inputs = linear.weight.shape[0 if linear.transposed else 1]
        grams = []
        for number in range(len(self._tasks)):
            gram = sums[number].gram if number in sums else torch.zeros(inputs, inputs, device=linear.weight.device)
            self._processes.add_up(gram)
            self._check(number, linear, gram)
            grams.append(gram / max(1, sum(told.get(number, 0) for told in tokens)))
        values = self._processes.together(lambda: self._own_rows(linear, grams))
        self._processes.add_up(values)
        self._processes.together(lambda: self._keep(linear, values.T if linear.transposed else values))
        return values

    def _check(self, number: int, linear: Linear, gram: Tensor) -> None:
        if not torch.isfinite(gram).all():
            group = self._tasks[number].finetuned.groups[self._parts[number][linear.key].parameter]
            raise RequestError(
                f"on the inputs of {self._names[number]}, the activations at {group.disk[0]} contain NaN or infinity, "
                "so nothing can be fitted to them. Check the checkpoint and the inputs, or use --method average."
            )

    def _own_rows(self, linear: Linear, grams: Sequence[Tensor]) -> Tensor:
        """This process's rows of the solution, float32 [outputs, inputs], 0 in the others."""
        values = torch.zeros_like(self._weight(0, linear))
        own = self._processes.own(len(values))
        values[own] = regression_mean(
            grams, lambda number: self._weight(number, linear)[own], self._config.alpha
        ).float()
        return values

    def _keep(self, linear: Linear, values: Tensor) -> None:
        """Write this process's tensors of a group of parameters, once the group is complete."""
        group = self._tasks[0].finetuned.groups[self._parts[0][linear.key].parameter]
        for name, whole in self._pending.keep(group, self._parts[0][linear.key].parameter, values.cpu()).items():
            self._writer.write(name, "F32", [whole.reshape(-1)])


def record(job: FitJob, config: RegMeanSettings, values: FittedValues) -> dict[str, Any]:
    """The manifest's record of a fit."""
    return {
        **config.as_record(),
        "counts": values.notes["counts"],
        "data": {name: found.pinned.dump() for name, found in job.data.items()},
        "refitted": sorted(values.names),
        "kept_plain": {
            info.name: "an embedding, or not called as a linear by these inputs"
            for info in job.tensors
            if info.name not in values and len(info.shape) > 1
        },
        "notes": [],
    }
