"""Both models of a finetune, without their weights, and its inputs: all that a refit needs for one task."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.errors import RequestError
from hf_locstitch.runtime.human import counted
from hf_locstitch.runtime.progress import hide_all_library_bars
from hf_locstitch.stitch.refit.passes import Pass
from hf_locstitch.stitch.refit.plain import PlainStitch
from hf_locstitch.stitch.refit.settings import JUDGED, InputSettings, RefitSettings
from hf_locstitch.stitch.refit.watching import watch
from hf_locstitch.stitch.refit.weights import Part, Weights, hollow
from hf_locstitch.tasks.choosing_objectives import of_inputs
from hf_locstitch.tasks.empty_model import attach_conversions, empty_model
from hf_locstitch.tasks.loading import link_files, load_config, load_processor
from hf_locstitch.tasks.objective import Objective
from hf_locstitch.tasks.parameter_names import group_names
from hf_locstitch.tasks.sets import OpenSet, read_rows
from hf_locstitch.tasks.task import Task, batched

NO_REFIT = "A refit needs a model that transformers supports without remote code. Use --stitch mean."


@dataclass(frozen=True)
class TaskModels:
    """model: its parameters are placeholders, which passes fill from `merged` or `finetuned`. parts: the placeholders
    by name. stacks: names of those with the stacked matrices of several experts. original: the base's weights.

    batches: of inputs; the first `fitted` are used for the fit, the others are held out.
    """

    name: str
    model: Any
    parts: Mapping[str, Part]
    stacks: frozenset[str]
    merged: Weights
    finetuned: Weights
    original: Weights
    task: Task
    batches: Sequence[Sequence[Any]]
    fitted: int

    @property
    def counts(self) -> dict[str, int]:
        """How many inputs are fitted, and held out."""
        sizes = [len(batch) for batch in self.batches]
        return {"fitted": sum(sizes[: self.fitted]), "held_out": sum(sizes[self.fitted :])}


@dataclass(frozen=True)
class OpenTask:
    """One finetuned model without weights, its weights, and its prepared inputs. shared: the base's tensors that fit
    it; original: its weights with those."""

    model: Any
    parts: Mapping[str, Part]
    stacks: frozenset[str]
    finetuned: Weights
    original: Weights
    shared: Sequence[str]
    task: Task

    @property
    def units(self) -> int:
        """How many answer tokens, or examples, have outputs of JUDGED numbers."""
        return JUDGED // getattr(self.model.get_output_embeddings(), "out_features", 1)


@hide_all_library_bars()
def open_task(
    config: InputSettings,
    name: str,
    base_reader: CheckpointReader,
    finetuned: CheckpointReader,
    data: OpenSet,
    folder: Path,
    device: torch.device,
) -> OpenTask:
    """Raises RequestError."""
    checkpoint, base = finetuned.checkpoint, base_reader.checkpoint
    objective = shortened(objective_for(data, checkpoint), config.tokens)
    folder_base = link_files(base, folder / f"{name}.base")
    folder_finetuned = link_files(checkpoint, folder / f"{name}.finetuned")
    model_config = load_config(folder_base if objective.base_config else folder_finetuned, cure=NO_REFIT)
    model = empty_model(objective.auto_class, model_config, NO_REFIT)
    attach_conversions(model, list(base.tensors), base.shapes)
    parts = hollow(model, list(base.tensors), device)
    stacks = watch(model)
    own = Weights(model, list(checkpoint.tensors), reading(finetuned), device, release=releasing(finetuned))
    shared = fitting(model, base)
    original = Weights(model, shared, reading(base_reader), device, own)
    rows = read_inputs(data, config.inputs, config.labelled)
    processor = load_processor(objective, folder_finetuned, folder_base)
    preparing = Pass(original, lambda: objective.prepare(rows, processor, model), frozenset())
    preparing.start()
    return OpenTask(model, parts, stacks, own, original, shared, preparing.result)


def open_task_models(
    config: RefitSettings,
    name: str,
    plain: PlainStitch,
    finetuned: CheckpointReader,
    data: OpenSet,
    folder: Path,
    device: torch.device,
) -> TaskModels:
    """Raises RequestError."""
    opened = open_task(config, name, plain.base, finetuned, data, folder, device)
    model, task = opened.model, opened.task
    merged = merged_weights(opened, plain, device)
    fitted, held_out = config.counts(len(task.examples))
    if fitted == 0 or (held_out == 0 and len(config.lambdas) > 1):
        raise RequestError(
            f"{data.label} has {counted(len(task.examples), 'input')} for {name}: {fitted} to fit and {held_out} held "
            "out, but at least one of each is needed. Use more data, or change held_out."
        )
    # Tracing also reaches the outputs: with a held-out batch, or else with a fitted one.
    batches = batched(task, 0, fitted, config.batch, opened.units if held_out == 0 else math.inf)
    count = len(batches)
    batches += batched(task, fitted, len(task.examples), config.batch, opened.units)
    return TaskModels(
        name, model, opened.parts, opened.stacks, merged, opened.finetuned, opened.original, task, batches, count
    )


def merged_weights(opened: OpenTask, plain: PlainStitch, device: torch.device) -> Weights:
    """Those of the merge without fitted values, in the model of a finetune."""
    return Weights(
        opened.model, opened.shared, plain.values, device, opened.finetuned,
        lambda tensor: not plain.is_localized(tensor), plain.release,
    )  # fmt: skip


def fitting(model: Any, base: Checkpoint) -> list[str]:
    """Names of the base's tensors, without those of another size than the model's, such as a finetune's own head."""
    numels = {name: parameter.numel() for name, parameter in model.named_parameters()}
    direct = [group for group in group_names(model, list(base.tensors)) if group.direct]
    others = {one.disk[0] for one in direct if base.info(one.disk[0]).numel != numels[one.parameters[0]]}
    return [name for name in base.tensors if name not in others]


def objective_for(data: OpenSet, checkpoint: Checkpoint) -> Objective:
    """Raises RecipeError."""
    return of_inputs(data.asked.objective, checkpoint.config, checkpoint.label)


def shortened(objective: Any, tokens: int) -> Any:
    """The same objective on texts of at most so many tokens."""
    length = getattr(objective, "max_length", tokens)
    return objective if length <= tokens else objective.model_copy(update={"max_length": tokens})


def read_inputs(data: OpenSet, count: int, labels: bool = False) -> list[dict[str, Any]]:
    """Rows with their labels, or with all labels set to the first class."""
    asked = replace(data, asked=data.asked.model_copy(update={"number": count}))
    rows = read_rows(asked, labels=False)[:count]
    return rows if labels else [{**row, "label": 0} for row in rows]


def check_labels(
    asked: str, instead: str, count: int, finetuned: Mapping[str, Checkpoint], data: Mapping[str, OpenSet]
) -> None:
    """Raises RequestError unless the first `count` inputs of every finetune have labels.

    asked: the setting that needs them ("judge: loss"). instead: one that does not.
    """
    for name, inputs in data.items():
        objective = objective_for(inputs, finetuned[name])
        if objective.labels == "none":
            raise RequestError(
                f"{asked} needs labels, but for {name} only hidden states are compared. Give its data an "
                f"objective with classes, or use {instead}."
            )
        if objective.labels == "text":  # whose texts are the answers
            continue
        labels = [row.get("label") for row in read_inputs(inputs, count, labels=True)]
        # −1 is how data sets hide those of a test split.
        if bare := sum(label is None or label == -1 for label in labels):
            raise RequestError(
                f"{asked} needs labels, but {bare} of the {len(labels)} inputs of {name} in "
                f"{inputs.label} have none. Use data with labels, map them with `columns`, or use {instead}."
            )


def reading(reader: CheckpointReader) -> Callable[[str], torch.Tensor]:
    """A function that reads a checkpoint's tensor by name, [*shape], without a copy."""

    def read(name: str) -> torch.Tensor:
        info = reader.checkpoint.info(name)
        return reader.flat(name, 0, info.numel).view(info.shape)

    return read


def releasing(reader: CheckpointReader) -> Callable[[str], None]:
    return lambda name: reader.release(name, 0, reader.checkpoint.info(name).numel)
