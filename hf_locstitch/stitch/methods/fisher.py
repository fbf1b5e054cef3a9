"""Fisher merging: of each element the mean of the finetuned values, weighted by how much each model's answers depend on
its own. Source: Matena and Raffel, Merging Models with Fisher-Weighted Averaging, NeurIPS 2022, arXiv 2111.09832.

A weight is the diagonal of a model's Fisher information, the mean over examples x of E[(∂ log p(y|x) / ∂θ)²] over the
answers y that the model itself gives. Gradients are squared example by example: the square of a batch's sum is
another number, which cancels. No floor is added: where all information is 0, but for rounding, the plain mean is taken.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from hf_locstitch.runtime.chunks import for_each
from hf_locstitch.runtime.devices import AUTO, DeviceName
from hf_locstitch.runtime.human import counted, human, in_each
from hf_locstitch.stitch.fitting import FitJob, Fittable, OnInputs
from hf_locstitch.stitch.method import Context, DenseMethod
from hf_locstitch.stitch.methods.average import mean_of
from hf_locstitch.stitch.per_tensor import SMALLEST_SUM

if TYPE_CHECKING:
    from torch import Tensor

    from hf_locstitch.checkpoints.checkpoint import Checkpoint
    from hf_locstitch.runtime.chunks import Chunk
    from hf_locstitch.runtime.dtypes import Values
    from hf_locstitch.stitch.fitted_values import FittedValues
    from hf_locstitch.stitch.refit.models import OpenTask
    from hf_locstitch.stitch.task_vectors import Vector
    from hf_locstitch.tasks.loaded_model import LoadedModel, LoadedParameter
    from hf_locstitch.tasks.sets import OpenSet
    from hf_locstitch.tasks.task import Task

HEADING = "fisher"
FLOAT = 4  # bytes: models and their information are float32
ROUNDING = 1e-12  # of the root mean square: what float32 leaves of gradients that are 0, as of attention's key biases
FEW = 16  # classes of which the expectation is exact, a pass for each


class Fisher(OnInputs, DenseMethod):
    """labels: whose answers gradients are of. "model": those of the finetuned model itself, as the Fisher information
    is defined: all classes by their probabilities where an example has one of at most 16, else one drawn for each
    token or image. "data": the labels of the data. unit_norm: whether each model's information is divided by its norm,
    so that no model counts for more because it is less sure. state_on: where the information of the model at hand
    is kept: "cpu" is main memory, "disk" is mapped files. device: "auto" (the accelerator, if there is one) or as torch
    names it. seed: of the draws.
    """

    name: Literal["fisher"] = "fisher"
    title: ClassVar[str] = "Fisher merging"
    paper: ClassVar[str] = "https://arxiv.org/abs/2111.09832"
    needs_data: ClassVar[bool] = True
    weighted: ClassVar[bool] = True
    called: ClassVar[str] = "Fisher merging"
    labels: Literal["model", "data"] = "model"
    unit_norm: bool = True
    device: DeviceName = AUTO
    state_on: Literal["device", "cpu", "disk"] = "device"
    seed: int = Field(default=0, ge=0)

    def combine(self, base: Values, finetuned: Sequence[Values], context: Context) -> Values:
        """The mean, for tensors without information."""
        return mean_of(base, finetuned, context)

    @property
    def normalized(self) -> bool:
        return True

    @property
    def labelled(self) -> bool:
        return self.labels == "data"

    def describe(self) -> str:
        answers = "the data's labels" if self.labelled else "the models' own answers"
        return (
            f"{self.title} on up to {counted(self.inputs, 'input')} per finetune of at most "
            f"{counted(self.tokens, 'token')}, gradients of {answers}{', of unit norm' if self.unit_norm else ''}"
        )

    def check(self, finetuned: Mapping[str, Checkpoint], data: Mapping[str, OpenSet]) -> None:
        from hf_locstitch.errors import RequestError
        from hf_locstitch.stitch.refit.models import check_labels, objective_for  # slow to import

        for name, inputs in data.items():
            if objective_for(inputs, finetuned[name]).labels == "none":
                raise RequestError(
                    f"Fisher merging needs the probabilities of answers, but for {name} only hidden states are known. "
                    "Give its data an objective with classes or answers, or use --method regmean."
                )
        if self.labelled:
            check_labels("labels: data", "labels: model", self.inputs, finetuned, data)

    def cost(self, fittable: Fittable) -> FisherCost:
        from hf_locstitch.runtime.processes import launched
        from hf_locstitch.stitch.fit_cost import LIBRARIES
        from hf_locstitch.stitch.refit.cost import input_counts, input_length  # imports torch
        from hf_locstitch.stitch.refit.models import objective_for
        from hf_locstitch.tasks.activations import token_activations

        counts, passes, activations, flops = input_counts(fittable, self), 0, 0, 0.0
        elements = sum(info.numel for _, info in fittable.base.tensors.values())
        for name, checkpoint in fittable.finetuned.items():
            objective = objective_for(fittable.fit_data[name], checkpoint)
            own, tokens = counts[name] * self._passes(objective, checkpoint), input_length(fittable, self, name)
            passes += own
            flops += 6.0 * elements * tokens * own
            token = token_activations(objective, fittable.base.config, checkpointing=False, item=FLOAT)
            activations = max(activations, tokens * token)
        merged = FLOAT * sum(info.numel for info in fittable.mask_tensors)
        return FisherCost(
            libraries=LIBRARIES,
            weights=FLOAT * elements,
            information=0 if self.state_on == "disk" else merged,
            gradients=2 * FLOAT * max((info.numel for info in fittable.mask_tensors), default=0),
            activations=activations,
            disk=merged * (len(fittable.finetuned) + 1) + (launched() * merged if self.state_on == "disk" else 0),
            passes=passes,
            flops=flops,
            processes=launched(),
        )

    def _passes(self, objective: Any, checkpoint: Checkpoint) -> int:
        """Over each example of a finetune: one for each class that the expectation is taken over, else one."""
        classes = objective.class_count(checkpoint.config)
        return classes if not self.labelled and classes <= FEW else 1

    def fit(self, job: FitJob) -> tuple[FittedValues, dict[str, Any]]:
        """Find the information of one model after another, and the weighted means."""
        from hf_locstitch.stitch.fitted_values import open_fitted  # slow to import

        values = open_fitted(job.folder / "values", HEADING, job.own, job.processes)
        if values is None:
            information = []
            for number in range(len(job.order)):
                information.append(self._information(job, number))
                gc.collect()  # modules and their hooks hold each other, and the next model needs the room
            values = self._merge(job, information)
            folders = [self._folder(job, number) for number in range(len(job.order))]
            job.processes.on_first(lambda: for_each(shutil.rmtree, folders, 1))
        return values, {
            **self.as_record(),
            "counts": {name: {"fitted": values.notes["counts"][name], "held_out": 0} for name in job.data},
            "data": {name: found.pinned.dump() for name, found in job.data.items()},
            "refitted": sorted(values.names),
            "uninformed": values.notes["uninformed"],
            "kept_plain": {
                info.name: "not a parameter that gradients are taken of"
                for info in job.tensors
                if info.name not in values and info.floating
            },
            "notes": [],
        }

    def how_found(self, record: Mapping[str, Any]) -> str | None:
        return "weighted by the Fisher information of each finetuned model" if record.get("refitted") else None

    def card(self, record: Mapping[str, Any], inputs: str) -> str:
        tensors, zeros = counted(len(record["refitted"]), "tensor"), record["uninformed"]
        answers = "the labels of these inputs" if record["labels"] == "data" else "its own answers to these inputs"
        norm = ", divided by its norm over all of them" if record["unit_norm"] else ""
        plain = f"{zeros:,} of these elements, of which no model has any, are the plain mean. " if zeros else ""
        return f"""## Fisher information

In {tensors} each element is the mean of the finetuned values, weighted by the Fisher information of each finetuned
model: the mean square of the gradient of the log-probability of {answers}, example by example{norm}.
{plain}All other tensors are the plain mean of the finetuned tensors.

{inputs}"""

    def _folder(self, job: FitJob, number: int) -> Path:
        return job.folder / f"information.{number}"

    def _information(self, job: FitJob, number: int) -> FittedValues:
        """The mean squared gradients of a finetune, by its number in the order; from an earlier process if it left
        them. Every process calls this."""
        from hf_locstitch.stitch.fitted_values import FittedWriter, open_fitted
        from hf_locstitch.stitch.refit.models import objective_for, open_task
        from hf_locstitch.tasks.loading import find_device
        from hf_locstitch.tasks.passes import State, Words, pass_over
        from hf_locstitch.tasks.task import MicroBatch

        name, folder, processes = job.order[number], self._folder(job, number), job.processes
        if (found := open_fitted(folder, HEADING, job.own, processes)) is not None:
            return found
        writer = FittedWriter(folder, job.own, processes)  # makes the folder
        readers, data = job.readers, job.data[name]

        def open_all() -> tuple[OpenTask, LoadedModel[LoadedParameter]]:
            device, links = find_device(self.device), folder / f"models.{processes.rank}"
            opened = open_task(self, name, readers["base"], readers[name], data, links, device)
            return opened, loaded_model(opened, list(readers[name].checkpoint.tensors), {t.name for t in job.tensors})

        opened, loaded = processes.together(open_all)
        checkpoint, examples = readers[name].checkpoint, len(opened.task.examples)
        classes = 0 if self.labelled else self._passes(objective_for(data, checkpoint), checkpoint)
        task = opened.task if self.labelled else own_answers(opened.task, classes, self.seed, name)
        total = State(loaded.parameters, "float32", self.state_on, folder, f"state.{processes.rank}")

        def add(one: LoadedParameter, gradient: Tensor) -> None:
            total[one].add_(gradient.to(total[one].device, total[one].dtype).square() / examples)

        words = Words(
            f"the inputs of {name}",
            "In the recipe's method set state_on: cpu or disk, or fewer tokens; or use another device.",
        )
        batches = [MicroBatch([example], 1.0) for example in task.examples]
        with job.progress.bar(f"fisher {name}", len(batches), " passes") as advance:
            pass_over(loaded, task, batches, add, processes, words, advance)
        total.add_up(processes)
        square, elements = 0.0, 0
        for tensor, information in loaded.to_disk(total.__getitem__):
            square += information.double().square().sum().item()
            elements += information.numel()
            if writer.writes([tensor]):
                writer.write(tensor, "F32", [information.float().reshape(-1).cpu()])
        floor = ROUNDING * (square / max(1, elements)) ** 0.5
        writer.finish(HEADING, examples=examples, norm=square**0.5, floor=floor)
        found = open_fitted(folder, HEADING, job.own, processes)
        assert found is not None
        return found

    def _merge(self, job: FitJob, information: Sequence[FittedValues]) -> FittedValues:
        """The weighted means of the tensors that all models have information of, chunk by chunk."""
        from hf_locstitch.checkpoints.tensors import as_tensor
        from hf_locstitch.stitch.fitted_values import FittedWriter, open_fitted

        writer = FittedWriter(job.folder / "values", job.own, job.processes)
        uninformed = 0
        for info in job.tensors:
            if not writer.writes([info.name]) or not all(info.name in one for one in information):
                continue
            dtype = "F64" if job.view.dtypes[info.name] == "F64" else "F32"
            pieces = []
            for chunk in job.view.chunks[info.name]:
                merged, zeros = self._merge_chunk(job, information, info.name, chunk)
                uninformed += zeros
                pieces.append(as_tensor(merged.astype("f8" if dtype == "F64" else "f4")))
            writer.write(info.name, dtype, pieces)
        counts = {name: one.notes["examples"] for name, one in zip(job.order, information, strict=True)}
        writer.finish(HEADING, counts=counts, uninformed=sum(job.processes.gather(uninformed)))
        values = open_fitted(job.folder / "values", HEADING, job.own, job.processes)
        assert values is not None
        return values

    def _merge_chunk(
        self, job: FitJob, information: Sequence[FittedValues], tensor: str, chunk: Chunk
    ) -> tuple[Vector, int]:
        readers = [job.readers[name] for name in job.order]
        finetuned = [job.view.checked(reader, tensor, chunk).astype("f8") for reader in readers]
        weighted = []
        for one, weight in zip(information, job.view.weights.of(tensor), strict=True):
            values = one.values(tensor, chunk.first, chunk.count).astype("f8")
            norm = (one.notes["norm"] if self.unit_norm else 1.0) or 1.0
            weighted.append(weight / norm * values * (values > one.notes["floor"]))
        for reader in readers:
            reader.release(tensor, chunk.first, chunk.count)
        return weighted_mean(finetuned, weighted, job.view.weights.of(tensor))


@dataclass(frozen=True)
class FisherCost:
    """Bytes in each process, except `disk`, of all together. weights: of one model. information: of one model.
    gradients: of the largest tensor. passes, flops: forward and backward, of all examples, at most."""

    libraries: int
    weights: int
    information: int
    gradients: int
    activations: int
    disk: int
    passes: int
    flops: float
    processes: int

    @property
    def peak(self) -> int:
        return self.libraries + self.weights + self.information + self.gradients + self.activations

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.peak}

    def describe(self) -> str:
        """For people, one line."""
        each = in_each(self.processes)
        activations = f"up to {human(self.activations)}" if self.activations else "an unknown size"
        return (
            f"fisher     at most about {human(self.peak)} of memory{each} ({human(self.weights)} one model in float32, "
            f"{human(self.information)} its information, {human(self.gradients)} gradients, {activations} of "
            f"activations), {human(self.disk)} of disk; {self.passes:,} passes, {self.flops / 1e12:.3g} TFLOP"
        )


def weighted_mean(
    finetuned: Sequence[Vector], weighted: Sequence[Vector], weights: Sequence[float]
) -> tuple[Vector, int]:
    """Σ w F θ / Σ w F, and of how many elements that is not defined: these are Σ w θ / Σ w.

    finetuned: θ, float64 [n] of each model. weighted: w F. weights: w.
    """
    import numpy as np

    total = sum(weighted[1:], start=weighted[0])
    most = sum(abs(one) for one in weighted)
    open_ = abs(total) <= SMALLEST_SUM * most  # all are 0, or weights of both signs cancel
    merged = sum(one * values for one, values in zip(weighted, finetuned, strict=True)) / np.where(open_, 1.0, total)
    plain = sum(weight * values for weight, values in zip(weights, finetuned, strict=True)) / sum(weights)
    return np.where(open_, plain, merged), int(open_.sum())


def own_answers(task: Task, classes: int, seed: int, name: str) -> Task:
    """The task whose squared gradients, added up, are a model's Fisher information for each example.

    classes: that the expectation is taken over, one example of the new task for each; 1: an answer is drawn. Draws
    depend on the seed, the finetune and the example only.
    """
    from hf_locstitch.tasks.task import Task

    examples = [(number, one, k) for number, one in enumerate(task.examples) for k in range(classes)]

    def loss(model: Any, batch: Sequence[tuple[int, Any, int]]) -> Tensor:
        ((number, example, k),) = batch
        log_p = log_probabilities(task, model, example, name)
        if classes > 1:  # ∂(√p log p) with p fixed, squared, is p (∂ log p)²
            return -(log_p[0, k].detach() / 2).exp() * log_p[0, k]
        answers = drawn(log_p.detach(), seed, number)
        return -log_p.gather(1, answers[:, None]).sum()

    return Task(examples, [1] * len(examples), loss)


def log_probabilities(task: Task, model: Any, example: Any, name: str) -> Tensor:
    """float32 [answers, classes or tokens]. Raises RequestError."""
    import torch

    from hf_locstitch.errors import RequestError

    outputs = task.outputs(model, [example]) if task.logits else None
    if outputs is None or outputs.shape[-1] < 2:
        raise RequestError(
            f"the outputs of {name} are not scores of classes or tokens, so its answers have no probabilities. Use "
            "labels: data, which takes the gradients of the loss, or --method regmean."
        )
    return torch.log_softmax(outputs.to(torch.promote_types(outputs.dtype, torch.float32)), -1)


def drawn(log_p: Tensor, seed: int, number: int) -> Tensor:
    """An answer for each row of log-probabilities [answers, n]. Returns int64 [answers], on their device."""
    import numpy as np
    import torch

    draws = torch.from_numpy(np.random.default_rng([seed, number]).random(len(log_p)))
    below = log_p.double().exp().cpu().cumsum(-1)
    chosen = torch.searchsorted(below, (draws * below[:, -1])[:, None], right=True)[:, 0]
    return chosen.clamp_(max=log_p.shape[-1] - 1).to(log_p.device)


def loaded_model(opened: OpenTask, names: Sequence[str], merged: set[str]) -> LoadedModel[LoadedParameter]:
    """The finetuned model with its weights, float32, ready for passes. names: of its tensors on disk. merged: those
    that gradients are wanted of; left out where others form a parameter with them."""
    from hf_locstitch.stitch.refit.weights import fill
    from hf_locstitch.tasks.loaded_model import LoadedModel, LoadedParameter
    from hf_locstitch.tasks.parameter_names import group_names

    fill(opened.model, opened.finetuned)
    groups = tuple(group for group in group_names(opened.model, names) if merged.issuperset(group.disk))
    wanted = {name for group in groups for name in group.parameters}
    parameters = {}
    for name, parameter in opened.model.named_parameters():
        parameter.requires_grad_(name in wanted)
        if name in wanted:
            parameters[name] = LoadedParameter(name, parameter)
    return LoadedModel(opened.model, parameters, groups)


COMPONENT = Fisher
