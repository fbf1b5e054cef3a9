"""Given checkpoints on given labelled sets: scores as plain data, nothing printed or written but the cache."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.evaluation.labelled_suite import LabelledSuite
from hf_locstitch.evaluation.models import Inputs, Role, model_of
from hf_locstitch.evaluation.scores import TaskResult
from hf_locstitch.evaluation.session import Session
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.tasks.benchmarks import make_options

NONE: Mapping[str, Checkpoint] = MappingProxyType({})


def judge(
    models: Mapping[str, Checkpoint],
    sets: Mapping[str, Any],
    *,
    inputs: Mapping[str, Checkpoint] = NONE,
    limit: int | None = None,
    batch_size: int | None = None,
    cache: bool = True,
    processes: Processes | None = None,
) -> dict[str, dict[str, TaskResult]]:
    """Judge models on labelled sets.

    Args:
        models: Whole models, by name; the first suggests the objectives of sets that have none, and of no finetune's
            name.
        sets: By name: EvaluationSets, or what a recipe has in their place.
        inputs: What the models were made of, by name: the base as "base", and the finetunes, for their heads.
        limit: Rows of each set, drawn; all by default.
        batch_size: Examples at once.
        cache: Whether scores that are known are used.
        processes: Those that share the examples; this one alone by default.

    Returns:
        model -> set -> result, whose first score is the main one.

    Raises:
        RequestError: If a set or a model cannot be judged; what concerns configs and headers before any model is
            loaded.
        WorkError: If memory runs out.
    """
    options = make_options({"data": dict(sets), "limit": limit, "batch_size": batch_size})

    def opening(name: str) -> Any:
        role: Role = "base" if name == "base" else "finetuned"
        return partial(model_of, inputs[name], role, name)

    listed = [model_of(checkpoint, "model", name) for name, checkpoint in models.items()]
    suite = LabelledSuite(options, listed[0], Inputs({name: opening(name) for name in inputs}))
    session = Session([suite], cache=cache)
    session.check(listed)
    report = session.run(listed, processes or Processes())
    return {model.name: {result.task: result for result in model.results} for model in report.models}
