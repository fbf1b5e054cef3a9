"""lm-eval itself: a folder and tasks in, results out."""

from __future__ import annotations

import math
import os
import random
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_locstitch.errors import CheckpointError
from hf_locstitch.evaluation.lm_eval_tasks import explaining_data
from hf_locstitch.evaluation.running import explaining_memory
from hf_locstitch.evaluation.scores import Score, TaskResult, common
from hf_locstitch.runtime.devices import AUTO
from hf_locstitch.tasks.benchmarks import EvaluateOptions, TaskSpec
from hf_locstitch.tasks.custom_code import load_failure
from hf_locstitch.tasks.leaks import texts_of
from hf_locstitch.tasks.lm_eval_options import LmEvalOptions

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task

CPU_BATCH = 8  # without a GPU, where "auto" cannot probe the memory
# lm-eval lists metrics in the order of its task files; these are the ones that leaderboards show.
MAIN_METRIC = {"arc_challenge": "acc_norm"}


def load_model(folder: Path, label: str, options: EvaluateOptions) -> LM:
    """The model for lm-eval; several GPUs share the examples under `accelerate launch`. Raises RequestError, WorkError.

    Without a batch size it is the largest that fits the GPU, or CPU_BATCH.
    """
    from hf_locstitch.tasks.loading import find_device  # imports torch

    device = find_device(AUTO).type
    own = options.lm_eval
    size = options.batch_size or ("auto" if device == "cuda" or own.backend == "vllm" else CPU_BATCH)
    settings = {
        "pretrained": str(folder), "batch_size": size, "dtype": options.dtype, "max_length": own.max_length,
        "trust_remote_code": False, **own.model_args,
    }  # fmt: skip
    try:
        with explaining_memory(label, options.batch_size):
            if own.backend == "vllm":
                from lm_eval.models.vllm_causallms import VLLM

                return VLLM(**{"seed": own.seed[2], **settings})  # type: ignore[arg-type]
            from lm_eval.models import huggingface

            build: Any = huggingface.HFLM
            return build(**settings, device=device, use_safetensors=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise CheckpointError(
            f"transformers cannot load {label}: {load_failure(error).rstrip('.')}. "
            "Check that AutoModelForCausalLM and AutoTokenizer load it, and model_args if any are given."
        ) from error


def measure(
    lm: LM, label: str, spec: TaskSpec, tasks: Sequence[Task | Group], limit: int | None, options: EvaluateOptions
) -> list[TaskResult] | None:
    """Run one task or group. Returns its result (for a tag, those of its members); None in all processes but the first.

    limit: of examples, which a suite may have of its own. Raises TaskError, DownloadError or WorkError.
    """
    import lm_eval

    run: Any = lm_eval.evaluate
    own = options.lm_eval
    prepare(tasks, spec.shots, own)
    groups = [group for task in tasks for group in groups_of(task)]
    loaded = {
        "tasks": {leaf.task_name: leaf for task in tasks for leaf in leaves_of(task)},
        "groups": {group.name: group for group in groups},
        "group_map": {group.name: group.child_names for group in groups},
    }
    turns = options.chat_template if own.fewshot_as_multiturn is None else own.fewshot_as_multiturn
    with explaining_memory(label, options.batch_size, lm):
        results = explaining_data(
            spec.name,
            lambda: run(
                lm,
                task_dict=loaded,
                limit=limit,
                log_samples=own.log_samples is not None,
                system_instruction=own.system_instruction,
                apply_chat_template=options.chat_template,
                fewshot_as_multiturn=turns,
            ),
        )
    if results is None:
        return None
    if own.log_samples is not None:
        write_samples(own.log_samples, label, results["samples"])
    leaves = {leaf.task_name: leaf for task in tasks for leaf in leaves_of(task)}
    scored = [named for task in tasks for named in _scored(task, results)]
    return [read_result(name, results, limit, revision_of(leaves, members)) for name, members in scored]


def write_samples(folder: Path, label: str, samples: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """What lm-eval logs of every example, one file a task, in a folder of the model's, as lm-eval itself does."""
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker(output_path=str(folder))
    tracker.general_config_tracker.model_name_sanitized = re.sub(r"[^\w.-]+", "__", label.lstrip("./"))
    tracker.date_id = datetime.now(timezone.utc).isoformat(timespec="seconds").replace(":", "-")
    for task, of_task in samples.items():
        tracker.save_results_samples(task, of_task)  # type: ignore[arg-type]


def prepare(tasks: Sequence[Task | Group], shots: int | None, options: LmEvalOptions) -> None:
    """Set seeds, shots and generation as lm_eval.simple_evaluate does (which also runs `pip list` each time).

    A task that fixes its shots to 0 keeps them.
    """
    import numpy as np
    import torch

    of_python, of_numpy, of_torch, of_shots = options.seed
    random.seed(of_python)
    np.random.seed(of_numpy)
    torch.manual_seed(of_torch)
    for leaf in (leaf for task in tasks for leaf in leaves_of(task)):
        own = leaf.get_config("num_fewshot")
        leaf.set_config(key="num_fewshot", value=own or 0 if shots is None or own == 0 else shots)
        leaf.set_fewshot_seed(seed=of_shots)
        if options.gen_kwargs and leaf.get_config("output_type") == "generate_until":
            leaf.set_config(key="generation_kwargs", value=dict(options.gen_kwargs), update=True)


def groups_of(task: Task | Group) -> list[Group]:
    """The group itself and those in it."""
    return [task, *task.get_all_groups()] if hasattr(task, "get_all_groups") else []  # type: ignore[union-attr,list-item]


def leaves_of(task: Task | Group) -> list[Task]:
    """The task itself, or a group's tasks at any depth."""
    return list(task.get_all_tasks()) if hasattr(task, "get_all_tasks") else [task]  # type: ignore[union-attr,list-item]


def texts_by_task(tasks: Sequence[Task | Group]) -> dict[str, frozenset[str]]:
    """Every text in the examples of each task and group that has a score, for the leak rule."""
    texts = {leaf.task_name: frozenset(texts_of(list(leaf.eval_docs))) for task in tasks for leaf in leaves_of(task)}
    for group in (group for task in tasks for group in groups_of(task)):
        texts[group.name] = frozenset().union(*(texts[leaf.task_name] for leaf in leaves_of(group)))
    return texts


def _scored(task: Task | Group, results: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Names that have scores, each with its tasks: the group itself, or its tasks if it has no aggregate score."""
    members = [leaf.task_name for leaf in leaves_of(task)]
    name = getattr(task, "name", None) or members[0]
    if read_scores(name, results):
        return [(name, members)]
    return [(member, [member]) for member in members]


def revision_of(leaves: Mapping[str, Task], members: Sequence[str]) -> str | None:
    """Commit of the data set on the Hub that all tasks were read from, taken from the name of its cache folder."""
    files = [
        file["filename"].replace(os.sep, "/")
        for name in members
        for split in (getattr(leaves[name], "dataset", None) or {}).values()
        for file in split.cache_files
    ]
    return common([commit for file in files for commit in re.findall(r"/([0-9a-f]{40})/[^/]+$", file)])


def read_result(name: str, results: Mapping[str, Any], limit: int | None, revision: str | None) -> TaskResult:
    """One task or group from what simple_evaluate returns."""
    leaves = _leaves(name, results.get("group_subtasks", {}))
    configs = [results["configs"][leaf] for leaf in leaves]
    dataset = common([config.get("dataset_path") for config in configs])
    on_hub = isinstance(dataset, str) and dataset.count("/") == 1
    return TaskResult(
        task=name,
        shots=common([results["n-shot"][leaf] for leaf in leaves]),
        limit=limit,
        examples=sum(results["n-samples"][leaf]["effective"] for leaf in leaves),
        scores=tuple(read_scores(name, results)),
        dataset=dataset if on_hub else None,
        config=common([config.get("dataset_name") for config in configs]) if on_hub else None,
        split=common([config.get("test_split") or config.get("validation_split") for config in configs]),
        revision=revision if on_hub else None,
        version=None if (version := results["versions"].get(name)) is None else str(version),
        lm_eval=metadata.version("lm_eval"),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        subtasks={leaf: read_scores(leaf, results)[0].value for leaf in leaves} if leaves != [name] else {},
    )


def _leaves(name: str, members: Mapping[str, Sequence[str]]) -> list[str]:
    inside = members.get(name) or []
    return [leaf for member in inside for leaf in _leaves(member, members)] if inside else [name]


def read_scores(name: str, results: Mapping[str, Any]) -> list[Score]:
    """Every metric of a task or group, the main one first."""
    measured = results["results"].get(name, {})
    better = results["higher_is_better"].get(name, {})
    scores = []
    for key, value in measured.items():
        metric, comma, chain = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = measured.get(f"{metric}_stderr,{chain}")
        known = isinstance(stderr, (int, float)) and math.isfinite(stderr)
        title = metric if chain == "none" else key
        scores.append(Score(title, float(value), float(stderr) if known else None, better.get(metric) is not False))
    return sorted(scores, key=lambda score: score.metric != MAIN_METRIC.get(name, score.metric))
