"""lm-eval's tasks as a suite. Their data sets are loaded once for all models, and only if something is measured."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from hf_locstitch.checkpoints.ref import is_written_as_path
from hf_locstitch.errors import RecipeError
from hf_locstitch.evaluation.lm_eval_tasks import digest_of, load_task, open_manager
from hf_locstitch.evaluation.models import Model, check_language_model
from hf_locstitch.evaluation.scores import TaskResult
from hf_locstitch.evaluation.suite import Suite
from hf_locstitch.runtime.human import counted, some
from hf_locstitch.runtime.packages import MODELS, need
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.tasks.benchmarks import EvaluateOptions, TaskSpec, chosen_tasks
from hf_locstitch.tasks.leaks import JudgedTask
from hf_locstitch.tasks.positions import fewer_positions

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager


class LmEvalSuite(Suite):
    def __init__(self, options: EvaluateOptions) -> None:
        """Raises RecipeError, also where lm-eval is not installed."""
        self._options = options
        specs, self.limit = chosen_tasks(options.tasks, options.suite, options.limit)
        need(f"evaluating on {some([str(spec) for spec in specs])}", "lm_eval", *MODELS)
        self._specs = {str(spec): spec for spec in specs}
        self._digest = digest_of(options.include_path)
        self._tasks: dict[TaskSpec, list[Task | Group]] = {}
        self.names = list(self._specs)
        self.flags = self._flags()
        self.logs = options.lm_eval.log_samples is not None

    @cached_property
    def manager(self) -> TaskManager:
        """lm-eval's index of tasks. Raises TaskError for a name that is unknown."""
        return open_manager(list(self._specs.values()), self._options.include_path)

    def check(self, model: Model) -> None:
        if (checkpoint := model.checkpoint) is None:
            return
        check_language_model(checkpoint)
        if (length := self._options.lm_eval.max_length) is not None:
            kind = "AutoModelForSeq2SeqLM" if checkpoint.config.get("is_encoder_decoder") else "AutoModelForCausalLM"
            if (count := fewer_positions(kind, checkpoint.config, length)) is not None:
                raise RecipeError(
                    f"max_length: {length} tokens are asked for, but {checkpoint.label} has positions for {count} "
                    f"only. Set --max-length {count} or less, or leave it out."
                )

    def facts(self, model: Model, name: str) -> dict[str, Any]:
        spec = self._specs[name]
        facts = {"model": model.content, "task": spec.name, "shots": spec.shots, "limit": self.limit}
        facts |= {
            "chat_template": self._options.chat_template,
            "task_files": self._digest,
            "lm_eval": version("lm_eval"),
        }
        own = self._options.lm_eval
        backend = {"vllm": version("vllm")} if own.backend == "vllm" else {}
        return {**facts, "dtype": self._options.dtype, "options": own.facts(), **backend}

    def measure(
        self, model: Model, names: Sequence[str], processes: Processes
    ) -> Iterator[tuple[str, list[TaskResult]]]:
        from hf_locstitch.evaluation import harness

        for name in names:
            self._load(self._specs[name])
        with model.folder() as folder:
            lm = harness.load_model(folder, model.ref, self._options)
            for name in names:
                spec = self._specs[name]
                results = harness.measure(lm, model.ref, spec, self._tasks[spec], self.limit, self._options)
                yield name, results or []

    def judged(self, results: Sequence[TaskResult], texts: bool) -> list[JudgedTask]:
        """Those that were run, with their examples' texts if local data files may contain them."""
        found: Mapping[str, frozenset[str]] = {}
        if texts:
            from hf_locstitch.evaluation.harness import texts_by_task

            found = texts_by_task([task for spec in self._specs.values() for task in self._load(spec)])
        return [JudgedTask(one.task, one.dataset, one.config, found.get(one.task)) for one in results]

    def notes(self, results: Sequence[TaskResult]) -> list[str]:
        if self.limit is None:
            return []
        return [f"the scores are rough: of only the first {counted(self.limit, 'example')} of each task"]

    def _load(self, spec: TaskSpec) -> list[Task | Group]:
        if spec not in self._tasks:
            self._tasks[spec] = load_task(self.manager, spec)
        return self._tasks[spec]

    def _flags(self) -> tuple[str, ...]:
        """Without the paths of local folders, which stay private."""
        flags = ["--tasks", *self.names]
        flags += ["--include-path", "DIR"] if self._options.include_path is not None else []
        flags += ["--chat-template"] if self._options.chat_template else []
        for key, value in self._options.lm_eval.facts().items():
            flags += _flag(key, value)
        return tuple(flags)


def _flag(key: str, value: Any) -> list[str]:
    """As the command line has one of lm-eval's options. value: as JSON has it."""
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{name}"]
    if isinstance(value, dict):
        return [f"--{name}", *(shlex.quote(f"{part}={_private(one)}") for part, one in value.items())]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", shlex.quote(str(value))]


def _private(value: Any) -> str:
    """As YAML has it, but for the path of a local file."""
    is_path = isinstance(value, str) and is_written_as_path(value)
    return "PATH" if is_path else json.dumps(value)
