"""One evaluation: tasks and settings, run on any number of models. Cached scores are not measured again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING

from hf_locstitch.evaluation.cache import cache_folder, cache_key, read_cached, write_cached
from hf_locstitch.evaluation.lm_eval_tasks import digest_of, load_task, open_manager
from hf_locstitch.evaluation.models import Model
from hf_locstitch.evaluation.report import EvaluationReport, ModelScores
from hf_locstitch.evaluation.scores import TaskResult
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.tasks.benchmarks import EvaluateOptions, TaskSpec, chosen_tasks
from hf_locstitch.tasks.leaks import JudgedTask, UsedData, leaks

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

Known = dict[str, list[TaskResult]]  # cache key -> results


@dataclass
class Session:
    """Data sets are loaded once for all models, and only if something must be measured. Raises RecipeError."""

    options: EvaluateOptions
    cache: bool = True
    """Whether cached scores are used."""
    show_progress: bool = False
    specs: list[TaskSpec] = field(init=False)
    limit: int | None = field(init=False)
    _digest: str | None = field(init=False)
    _manager: TaskManager | None = field(default=None, init=False)
    _tasks: dict[TaskSpec, list[Task | Group]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        chosen = self.options
        self.specs, self.limit = chosen_tasks(chosen.tasks, chosen.suite, chosen.limit)
        self._digest = digest_of(chosen.include_path)

    @property
    def manager(self) -> TaskManager:
        """lm-eval's tasks. Raises TaskError for a name that is unknown."""
        if self._manager is None:
            self._manager = open_manager(self.specs, self.options.include_path)
        return self._manager

    def key(self, model: Model, spec: TaskSpec) -> str:
        """The cache key: a hash of the model's content, the task, the settings and lm-eval's version."""
        facts = {"model": model.content, "task": spec.name, "shots": spec.shots, "limit": self.limit}
        facts |= {"chat_template": self.options.chat_template, "task_files": self._digest}
        return cache_key({**facts, "lm_eval": version("lm_eval")})

    def run(self, models: Sequence[Model], processes: Processes, used: Sequence[UsedData] = ()) -> EvaluationReport:
        """Every task on every model. used: data sets that the models were made with.

        Raises RequestError or WorkError; finished scores stay cached.
        """
        keys = {model.name: [self.key(model, spec) for spec in self.specs] for model in models}
        known = self._read([key for listed in keys.values() for key in listed], processes)
        before = frozenset(known)
        for model in models:
            self._measure(model, keys[model.name], known)
        scored = tuple(
            ModelScores(
                model.name,
                model.role,
                model.ref,
                model.content,
                tuple(result for key in keys[model.name] for result in known.get(key, [])),
                sum(key in before for key in keys[model.name]),
            )
            for model in models
        )
        warnings = leaks(self._judged(scored, used), used)
        if self.limit is not None:
            warnings.append(
                f"only the first {self.limit} examples of each task were evaluated, so the scores are rough"
            )
        return EvaluationReport(scored, tuple(map(str, self.specs)), self.limit, tuple(warnings), self.flags)

    def _judged(self, scored: Sequence[ModelScores], used: Sequence[UsedData]) -> list[JudgedTask]:
        """The tasks that were run, with their examples' texts if local data files may contain them."""
        results = {result.task: result for model in scored for result in model.results}
        texts: Mapping[str, frozenset[str]] = {}
        if any(data.prompts for data in used):
            from hf_locstitch.evaluation.harness import quietly, texts_by_task

            with quietly(self.show_progress):
                texts = texts_by_task([task for spec in self.specs for task in self._load(spec)])
        return [JudgedTask(name, one.dataset, one.config, texts.get(name)) for name, one in results.items()]

    def _load(self, spec: TaskSpec) -> list[Task | Group]:
        if spec not in self._tasks:
            self._tasks[spec] = load_task(self.manager, spec)
        return self._tasks[spec]

    @property
    def flags(self) -> tuple[str, ...]:
        """Flags of the command line, without the path of a local folder, which stays private."""
        flags = ["--tasks", *map(str, self.specs)]
        flags += ["--limit", str(self.limit)] if self.limit is not None else []
        flags += ["--include-path", "DIR"] if self.options.include_path is not None else []
        return (*flags, *(["--chat-template"] if self.options.chat_template else []))

    def _read(self, keys: Sequence[str], processes: Processes) -> Known:
        """What the first process finds in the cache, in every process, so that all measure the same."""
        cached: Known = {}
        if processes.first and self.cache:
            cached = {key: results for key in keys if (results := read_cached(key, cache_folder())) is not None}
        return processes.gather(cached)[0]

    def _measure(self, model: Model, keys: Sequence[str], known: Known) -> None:
        """Add to `known` what is not in it."""
        from hf_locstitch.evaluation.harness import load_model, measure, quietly

        missing: Mapping[TaskSpec, str] = {s: key for s, key in zip(self.specs, keys, strict=True) if key not in known}
        if not missing:
            return
        chosen = self.options
        with quietly(self.show_progress):
            for spec in missing:
                self._load(spec)
            with model.folder() as folder:
                lm = load_model(folder, model.ref, chosen.batch_size)
                for spec, key in missing.items():
                    results = measure(
                        lm,
                        model.ref,
                        spec,
                        self._tasks[spec],
                        limit=self.limit,
                        batch_size=chosen.batch_size,
                        chat_template=chosen.chat_template,
                    )
                    known[key] = results or []
                    if results:
                        write_cached(key, results, cache_folder())
