"""A model as transformers loads it, with the head that judges it, and its answers to examples."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_locstitch.checkpoints.opening import open_checkpoint
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.errors import RequestError
from hf_locstitch.runtime.devices import AUTO, in_float64
from hf_locstitch.tasks.answers import Answers, joined
from hf_locstitch.tasks.loading import find_device, load_config, load_model, load_processor, main_dtype
from hf_locstitch.tasks.objective import Objective
from hf_locstitch.tasks.task import Task, batched

CURE = "Check that it is complete, and that the objective is meant for such models."
OUTPUTS = 1 << 26  # numbers of a batch's outputs at most, where an example alone has fewer
SLICE = 1 << 22  # of them in float64


@dataclass(frozen=True)
class JudgedModel:
    """model: in evaluation mode, on the device that judges. head: the model whose head it has; itself if its own.

    absent: parameters that neither has: not a number, so that outputs tell whether they are used.
    """

    model: Any
    head: Any
    processor: Any
    label: str
    absent: Collection[str] = ()


class Loading:
    """One model under one head after the other; the last stays in memory. folder: of the model, label: its name."""

    def __init__(self, folder: Path, dtype: str, label: str) -> None:
        self.label = label
        self._folder, self._dtype = folder, dtype
        self._kind: Any = None
        self._last: JudgedModel | None = None

    def model(self, head: Path | None, objective: Objective) -> JudgedModel:
        """As open_judged_model."""
        kind = (head, objective.auto_class, objective.processor, objective.base_config, objective.head_of)
        if self._last is None or kind != self._kind:
            self._last = None
            self._last, self._kind = open_judged_model(self._folder, head, objective, self._dtype, self.label), kind
        return self._last


def open_judged_model(folder: Path, head: Path | None, objective: Objective, dtype: str, label: str) -> JudgedModel:
    """folder: of the model. head: of that whose head judges it; None: its own. dtype: "auto" is that of most of it on
    disk.

    Given a head, the model has all of it that lies outside of the backbone, and what it lacks itself.
    Raises RequestError.
    """
    config = _config(folder, head, objective, label)
    model, absent = load_model(folder, objective, config, _dtype(dtype, folder), CURE)
    owner = model
    if head is not None:
        own = config if objective.base_config else load_config(head, label, CURE)
        owner, lacking = load_model(head, objective, own, _dtype(dtype, head), CURE)
        lent = lend(model, owner, absent, outside=objective.head_of != "base")
        absent = (absent - lent) | (lent & lacking)
    blank(model, absent)
    by_words = objective.processor == "AutoTokenizer"  # which fits the model's own embedding
    folders = [one for one in ((folder, head) if by_words else (head, folder)) if one is not None]
    processor = load_processor(objective, *folders)
    return JudgedModel(model.to(find_device(AUTO)), owner, processor, label, absent)


def _config(folder: Path, head: Path | None, objective: Objective, label: str) -> Any:
    """The head's where the head has classes of its own, but with as many tokens as the model has."""
    own = load_config(folder, label, CURE)
    if head is None or (objective.head_of == "base" and not objective.base_config):
        return own
    config = load_config(head, label, CURE)
    words = getattr(own.get_text_config(), "vocab_size", None)
    if words is not None and not objective.base_config:
        config.get_text_config().vocab_size = words
    return config


def _dtype(asked: str, folder: Path) -> torch.dtype:
    if asked != "auto":
        return getattr(torch, asked)
    return main_dtype(info for _, info in open_checkpoint(parse_ref(str(folder))).tensors.values())


def lend(model: Any, head: Any, absent: Collection[str], outside: bool) -> set[str]:
    """Set what the model lacks to the head's values; outside: and all that is not of the backbone. Returns their names.

    Raises RequestError if such a parameter has another shape.
    """
    lent = set()
    within = f"{model.base_model_prefix}." if model.base_model is not model else ""
    for of in ("named_parameters", "named_buffers"):
        theirs = dict(getattr(head, of)())
        for name, tensor in getattr(model, of)():
            if name in theirs and (name in absent or (outside and not name.startswith(within))):
                if theirs[name].shape != tensor.shape:
                    raise RequestError(
                        f"{name} of the head is {list(theirs[name].shape)}, but the model needs {list(tensor.shape)}. "
                        "Choose another `head`, or leave it out."
                    )
                tensor.data = theirs[name].data.to(tensor.dtype)
                lent.add(name)
    return lent


def blank(model: Any, absent: Collection[str]) -> None:
    """What nothing gives is not a number, in place of what transformers draws at random."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in absent and tensor.is_floating_point():
                tensor.fill_(float("nan"))


@torch.inference_mode()
def answers_to(judged: JudgedModel, task: Task, size: int) -> Answers:
    """What the model answers to the task's examples, `size` of them at once, fewer where outputs are many numbers.

    Raises RequestError if outputs are not finite.
    """
    if task.targets is None or not task.logits:
        return _losses_alone(judged, task)
    numbers = getattr(judged.model.get_output_embeddings(), "out_features", 1)
    parts, first = [], 0
    for batch in batched(task, 0, len(task.examples), size, max(1, OUTPUTS // numbers)):
        outputs = task.outputs(judged.model, batch)
        right = torch.tensor(task.targets(batch), device=outputs.device)
        weights = np.array(task.weights[first : first + len(batch)])
        parts.append(_answers(outputs, right, weights))
        _check(parts[-1].losses, judged)
        first += len(batch)
    return joined(parts)


def _answers(outputs: Tensor, right: Tensor, weights: np.ndarray[Any, np.dtype[np.int64]]) -> Answers:
    """outputs: logits [units, classes]; right: int64 [units]; weights: units of each example, in order."""
    rows = max(1, SLICE // outputs.shape[-1])
    slices = zip(outputs.split(rows), right.split(rows), strict=True)
    wide = ((in_float64(some), wanted) for some, wanted in slices)
    losses = torch.cat([F.cross_entropy(some, wanted.to(some.device), reduction="none") for some, wanted in wide])
    predicted = outputs.argmax(-1)
    starts = np.concatenate([[0], np.cumsum(weights)[:-1]])
    exact = np.logical_and.reduceat((predicted == right).cpu().numpy(), starts)
    sums = np.add.reduceat(losses.cpu().numpy(), starts)
    if (weights != 1).any():
        return Answers(sums, weights, exact)
    return Answers(sums, weights, exact, predicted.cpu().numpy(), right.cpu().numpy())


def _losses_alone(judged: JudgedModel, task: Task) -> Answers:
    """For outputs that are no logits: the loss of each example."""
    losses = np.array([float(task.loss(judged.model, [example])) for example in task.examples])
    _check(losses, judged)
    return Answers(losses, np.array(task.weights))


def _check(losses: np.ndarray[Any, np.dtype[np.float64]], judged: JudgedModel) -> None:
    if np.isfinite(losses).all():
        return
    if judged.absent:
        raise RequestError(
            f"{judged.label} has no {min(judged.absent)}, which the objective needs: it has no head for these labels. "
            "Name the set as one of its finetunes, say whose `head` judges, or choose another objective."
        )
    raise RequestError(
        f"the outputs of {judged.label} are not finite: it overflows in its dtype, or is damaged. Check the model; "
        "`inspect` and `verify` look at its values."
    )
