"""Both models of a finetune without their weights, and its inputs: all that a refit needs of one task."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.reader import CheckpointReader
from hf_locstitch.errors import RecipeError, RequestError
from hf_locstitch.runtime.progress import hide_all_library_bars
from hf_locstitch.stitch.refit.passes import Pass, watch
from hf_locstitch.stitch.refit.plain import PlainStitch
from hf_locstitch.stitch.refit.settings import JUDGED, InputSettings, RefitSettings
from hf_locstitch.stitch.refit.weights import Part, Weights, hollow
from hf_locstitch.tasks.custom_code import load_failure
from hf_locstitch.tasks.loading import link_files, load_config, load_processor
from hf_locstitch.tasks.objective import Objective
from hf_locstitch.tasks.objectives import suggest
from hf_locstitch.tasks.objectives.features import Features
from hf_locstitch.tasks.parameter_names import group_names
from hf_locstitch.tasks.sets import OpenSet, read_rows
from hf_locstitch.tasks.task import Task


@dataclass(frozen=True)
class TaskModels:
    """model: its parameters are holes, which passes fill from `merged` or `finetuned`. parts: those holes by name.
    stacks: names of those that hold the matrices of several experts.

    batches: of inputs; fitted: how many of them, the first ones, are fitted to; the others are held out.
    """

    name: str
    model: Any
    parts: Mapping[str, Part]
    stacks: frozenset[str]
    merged: Weights
    finetuned: Weights
    task: Task
    batches: Sequence[Sequence[Any]]
    fitted: int

    @property
    def counts(self) -> dict[str, int]:
        """Inputs that are fitted to, and held out."""
        sizes = [len(batch) for batch in self.batches]
        return {"fitted": sum(sizes[: self.fitted]), "held_out": sum(sizes[self.fitted :])}


@dataclass(frozen=True)
class OpenTask:
    """One finetuned model, hollow, its weights, and its inputs, prepared. shared: the base's tensors that fit it."""

    model: Any
    parts: Mapping[str, Part]
    stacks: frozenset[str]
    finetuned: Weights
    shared: Sequence[str]
    task: Task

    @property
    def units(self) -> int:
        """How many answers' tokens, or examples, have outputs of JUDGED numbers."""
        return JUDGED // getattr(self.model.get_output_embeddings(), "out_features", 1)


@hide_all_library_bars()
def open_task(
    how: InputSettings,
    name: str,
    base_reader: CheckpointReader,
    finetuned: CheckpointReader,
    data: OpenSet,
    folder: Path,
    device: torch.device,
) -> OpenTask:
    """Raises RequestError."""
    checkpoint, base = finetuned.checkpoint, base_reader.checkpoint
    objective = shortened(objective_for(data, checkpoint), how.tokens)
    folder_base = link_files(base, folder / f"{name}.base")
    folder_finetuned = link_files(checkpoint, folder / f"{name}.finetuned")
    model = empty_model(objective, load_config(folder_base if objective.base_config else folder_finetuned))
    attach_conversions(model, list(base.tensors))
    parts = hollow(model, list(base.tensors), device)
    stacks = watch(model)
    own = Weights(model, list(checkpoint.tensors), reading(finetuned), device, release=releasing(finetuned))
    shared = fitting(model, base)
    original = Weights(model, shared, reading(base_reader), device, own)
    rows = read_inputs(data, how.inputs, how.labelled)
    processor = load_processor(objective, folder_finetuned, folder_base)
    preparing = Pass(original, lambda: objective.prepare(rows, processor, model), frozenset())
    preparing.start()
    return OpenTask(model, parts, stacks, own, shared, preparing.result)


def open_task_models(
    how: RefitSettings,
    name: str,
    plain: PlainStitch,
    finetuned: CheckpointReader,
    data: OpenSet,
    folder: Path,
    device: torch.device,
) -> TaskModels:
    """Raises RequestError."""
    opened = open_task(how, name, plain.base, finetuned, data, folder, device)
    model, task = opened.model, opened.task
    merged = Weights(
        model, opened.shared, plain.values, device, opened.finetuned,
        lambda tensor: not plain.is_localized(tensor), plain.release,
    )  # fmt: skip
    fitted, held_out = how.counts(len(task.examples))
    if fitted == 0 or (held_out == 0 and len(how.lambdas) > 1):
        raise RequestError(
            f"{data.label} gives {len(task.examples)} inputs for {name}, of which {held_out} would be held out and "
            f"{fitted} fitted to; at least one of each is needed. Name data with more, or set held_out."
        )
    # A pass that follows the model comes to its outputs, too: a held-out one, or else a fitted one.
    batches = batched(task, 0, fitted, how.batch, opened.units if held_out == 0 else math.inf)
    count = len(batches)
    batches += batched(task, fitted, len(task.examples), how.batch, opened.units)
    return TaskModels(name, model, opened.parts, opened.stacks, merged, opened.finetuned, task, batches, count)


def batched(task: Task, first: int, last: int, size: int, most: float = math.inf) -> list[list[Any]]:
    """Examples first … last − 1, neighbours together: up to `size`, and of a weight of `most` in all unless one alone
    has more."""
    found: list[list[Any]] = []
    total = 0
    for example, weight in zip(task.examples[first:last], task.weights[first:last], strict=True):
        if not found or len(found[-1]) == size or total + weight > most:
            found.append([])
            total = 0
        found[-1].append(example)
        total += weight
    return found


def fitting(model: Any, base: Checkpoint) -> list[str]:
    """Names of the base's tensors, but for those of another size than the model's: a finetune's own head."""
    numels = {name: parameter.numel() for name, parameter in model.named_parameters()}
    direct = [group for group in group_names(model, list(base.tensors)) if group.direct]
    others = {one.disk[0] for one in direct if base.info(one.disk[0]).numel != numels[one.parameters[0]]}
    return [name for name in base.tensors if name not in others]


def objective_for(data: OpenSet, checkpoint: Checkpoint) -> Objective:
    """As asked for, or as the architecture suggests; else last hidden states are compared."""
    if data.asked.objective is not None:
        return data.asked.objective
    try:
        return suggest(checkpoint.config, checkpoint.label)
    except RecipeError:
        if "vision_config" in checkpoint.config:
            raise
        return Features()


def shortened(objective: Any, tokens: int) -> Any:
    """The same objective on texts of at most so many tokens."""
    length = getattr(objective, "max_length", tokens)
    return objective if length <= tokens else objective.model_copy(update={"max_length": tokens})


def read_inputs(data: OpenSet, count: int, labels: bool = False) -> list[dict[str, Any]]:
    """Rows without their labels, unless these judge: every one gets the first class."""
    asked = replace(data, asked=data.asked.model_copy(update={"number": count}))
    rows = read_rows(asked, labels=False)[:count]
    return rows if labels else [{**row, "label": 0} for row in rows]


def check_labels(how: RefitSettings, finetuned: Mapping[str, Checkpoint], data: Mapping[str, OpenSet]) -> None:
    """Raises RequestError unless there is something to judge by."""
    for name, found in data.items():
        objective = objective_for(found, finetuned[name])
        if objective.labels == "none":
            raise RequestError(
                f"judge: {how.judge} asks what is right, but of {name} only hidden states are compared. Give its data "
                "an objective with classes, or use judge: agreement."
            )
        if objective.labels == "text":  # whose texts are the answers
            continue
        labels = [row.get("label") for row in read_inputs(found, how.inputs, labels=True)]
        # −1 is how data sets hide those of a test split.
        if bare := sum(label is None or label == -1 for label in labels):
            raise RequestError(
                f"judge: {how.judge} asks what is right, but {bare} of the {len(labels)} inputs that {found.label} "
                f"gives for {name} have no label. Name data with labels, map them with `columns`, or use "
                "judge: agreement."
            )


def empty_model(objective: Objective, config: Any) -> Any:
    """On the meta device but for its buffers, in evaluation mode."""
    import transformers
    from accelerate import init_empty_weights

    loader = getattr(transformers, objective.auto_class)
    automatic = hasattr(loader, "from_config")  # such as AutoModel; a class of one architecture runs its own code only
    make = partial(loader.from_config, trust_remote_code=False) if automatic else loader._from_config
    config.use_cache = False
    try:
        with init_empty_weights(include_buffers=False):
            model = make(config, dtype=torch.float32, experts_implementation="eager")
    except (ValueError, OSError, KeyError) as error:
        raise RequestError(
            f"{objective.auto_class} cannot make the model ({load_failure(error)}). A refit needs a "
            "model that transformers knows without code from the repo; use --stitch mean."
        ) from error
    model.tie_weights()
    return model.eval()


def attach_conversions(model: Any, disk: Collection[str]) -> None:
    """What transformers would have noted had it loaded these tensors: names.py reverses it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict(keep_vars=True)
    patterns = set()
    for name in disk:
        patterns.add(rename_source_key(name, renamings, converters, model.base_model_prefix, state)[1])
    used = [entry for entry in renamings if entry.was_used()]
    used += [entry for entry in converters if patterns & set(entry.source_patterns)]
    model._weight_conversions = [entry for entry in mapping if entry in used]


def reading(reader: CheckpointReader) -> Callable[[str], torch.Tensor]:
    """A checkpoint's tensors by their names, [*shape], uncopied."""

    def read(name: str) -> torch.Tensor:
        info = reader.checkpoint.info(name)
        return reader.flat(name, 0, info.numel).view(info.shape)

    return read


def releasing(reader: CheckpointReader) -> Callable[[str], None]:
    return lambda name: reader.release(name, 0, reader.checkpoint.info(name).numel)
