"""What a finetune would do, from headers and configs: nothing is trained, no example is read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from hf_locstitch.checkpoints.checkpoint import Checkpoint, open_source
from hf_locstitch.checkpoints.opening import read_checkpoint
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.errors import CheckpointError, RecipeError
from hf_locstitch.runtime.escape import line
from hf_locstitch.runtime.human import counted
from hf_locstitch.runtime.processes import find_processes
from hf_locstitch.runtime.version import __version__
from hf_locstitch.tasks.choosing_objectives import suggest
from hf_locstitch.tasks.objective import Objective, Training
from hf_locstitch.tasks.objectives import OBJECTIVES
from hf_locstitch.tasks.positions import within_positions
from hf_locstitch.tasks.sets import OpenSet, open_set
from hf_locstitch.training.request import FinetuneRequest

LORA_LR = 2e-4  # a rank of few has to move further than the weights themselves


@dataclass(frozen=True)
class FinetunePlan:
    """training: as asked for, with the objective's defaults."""

    request: FinetuneRequest
    base: Checkpoint
    data: OpenSet
    objective: Objective
    training: Training

    @property
    def nbytes(self) -> int:
        """Of the result; an adapter is small beside the base."""
        return 0 if self.request.lora else sum(shard.size for shard in self.base.shards)

    @property
    def pinned(self) -> FinetuneRequest:
        """A request for exactly this finetune, without the path of a local folder."""
        training, data = self.training, self.data.pinned.model_copy(update={"objective": self.objective})
        return self.request.model_copy(
            update={
                "base": self.base.source.pinned,
                "data": data,
                "epochs": training.epochs,
                "lr": training.lr,
                "batch": training.batch,
                "optimizer": training.optimizer,
            }
        )

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what determines the output."""
        facts = __version__, self.base.source.identity, self.pinned.dump()
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def settings(self) -> dict[str, str]:
        """For people: all that determines the output but base and data."""
        training, request = self.training, self.request
        trained = training.what + (f" but {', '.join(request.freeze)}" if request.freeze else "")
        if request.lora:
            trained = f"a LoRA adapter of rank {request.lora} on the linear layers of {trained}"
        return {
            "objective": self.objective.kind,
            "trained": trained,
            "optimizer": f"{training.optimizer}, learning rate {training.lr:g}, falling to 0",
            "steps": f"{counted(training.epochs, 'epoch')} in batches of {training.batch}",
            "seed": str(request.seed),
        }

    def describe(self) -> str:
        """A summary to print."""
        rows = {"base": self.base.label, "data": self.data.describe(), **self.settings()}
        return "\n".join(line(f"{name:<9}  {value}") for name, value in rows.items())

    def as_json(self) -> dict[str, Any]:
        """Plain values, for `json.dumps`."""
        pinned = self.pinned.model_dump(mode="json", exclude={"out", "push_to", "private", "create_pr", "data"})
        return {**pinned, "data": self.data.pinned.dump(), "objective": self.objective.model_dump(mode="json")}


def plan_finetune(request: FinetuneRequest) -> FinetunePlan:
    """Pin base and data, and settle what is to be learned, and how. Raises RequestError."""
    if find_processes().count > 1:
        raise RecipeError("a finetune is made in one process. Run it without the launcher.")
    base = read_checkpoint(open_source(parse_ref(request.base)))
    if base.dequantized:
        raise CheckpointError(
            f"{base.label} is stored in {base.dequantized}, but transformers trains the weights as they are in files. "
            "Use a base in bfloat16."
        )
    data = open_set(request.data)
    objective = within_positions(request.data.objective or suggest(base.config, base.label), base.config, base.label)
    if objective.training is None:
        others = ", ".join(name for name in OBJECTIVES.names() if OBJECTIVES.find(name).training)
        raise RecipeError(f"the objective {objective.kind} has no loss to train with. Use one of {others}.")
    return FinetunePlan(request, base, data, objective, _settled(request, objective.training))


def _settled(request: FinetuneRequest, defaults: Training) -> Training:
    """The objective's training, with what the request says."""
    if request.lora:
        defaults = replace(defaults, optimizer="adamw_torch", lr=LORA_LR)
    given = {name: value for name in ("optimizer", "lr", "batch", "epochs") if (value := getattr(request, name))}
    if request.freeze is not None:
        given |= {"trained": "", "what": "all parameters"}
    return replace(defaults, **given)
