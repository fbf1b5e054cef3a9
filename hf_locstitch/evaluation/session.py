"""One evaluation: suites, run on any number of models. Cached scores are not measured again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from hf_locstitch.errors import RecipeError
from hf_locstitch.evaluation.cache import cache_folder, cache_key, read_cached, write_cached
from hf_locstitch.evaluation.models import Model
from hf_locstitch.evaluation.report import EvaluationReport, ModelScores
from hf_locstitch.evaluation.scores import TaskResult
from hf_locstitch.evaluation.suite import Suite
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.runtime.progress import Advance, Progress
from hf_locstitch.tasks.leaks import UsedData, leaks

LOG = logging.getLogger("hf_locstitch")
Known = dict[str, list[TaskResult]]  # cache key -> results


@dataclass(frozen=True)
class Session:
    """dtype: that models are judged in. cache: whether cached scores are used. Raises RecipeError if two suites have an
    item of one name.
    """

    suites: Sequence[Suite]
    dtype: str = "auto"
    cache: bool = True
    progress: Progress = field(default_factory=lambda: Progress(False))

    def __post_init__(self) -> None:
        names = [name.partition(":")[0] for suite in self.suites for name in suite.names]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise RecipeError(f"a task and a set are both named {twice[0]!r}. Name the set anew: --data NAME=REF.")

    def check(self, models: Sequence[Model]) -> None:
        """Raises CheckpointError if one of them cannot be judged."""
        for suite in self.suites:
            for model in models:
                suite.check(model)

    def keys(self, model: Model) -> dict[str, str]:
        """Item -> what its scores are cached by: a hash of all that determines them."""
        return {name: cache_key(suite.facts(model, name)) for suite in self.suites for name in suite.names}

    def run(self, models: Sequence[Model], processes: Processes, used: Sequence[UsedData] = ()) -> EvaluationReport:
        """Every item on every model. used: data sets that the models were made with.

        Raises RequestError or WorkError; finished scores stay cached.
        """
        from hf_locstitch.evaluation.running import quietly

        keys = {model.name: self.keys(model) for model in models}
        known = self._read([key for of_model in keys.values() for key in of_model.values()], processes)
        before = frozenset(known)
        todo = [
            (model, suite, missing)
            for model in models
            for suite in self.suites
            if (missing := [name for name in suite.names if keys[model.name][name] not in known])
        ]
        count = sum(len(missing) for _, _, missing in todo)
        with self.progress.bar("evaluating", count, " scores") if count else nullcontext(_uncounted) as advance:
            for model, suite, missing in todo:
                model.fetch(self.progress)
                LOG.info(f"evaluating {model.name} on {', '.join(missing)}")
                with quietly(self.progress.shown):
                    self._measure(suite, model, missing, keys[model.name], known, processes, advance)
        scored = tuple(
            ModelScores(
                model.name,
                model.role,
                model.ref,
                model.content,
                tuple(result for key in keys[model.name].values() for result in known.get(key, [])),
                sum(key in before for key in keys[model.name].values()),
            )
            for model in models
        )
        return EvaluationReport(
            scored,
            tuple(name for suite in self.suites for name in suite.names),
            self._limit,
            tuple(self._warnings(known, keys[models[0].name], used)),
            self._flags,
            {name: entry for suite in self.suites for name, entry in suite.entries.items()},
        )

    @property
    def _limit(self) -> int | None:
        return next((suite.limit for suite in self.suites if suite.limit is not None), None)

    @property
    def _flags(self) -> tuple[str, ...]:
        flags = [flag for suite in self.suites for flag in suite.flags]
        flags += ["--limit", str(self._limit)] if self._limit is not None else []
        return (*flags, *(["--dtype", self.dtype] if self.dtype != "auto" else []))

    def _warnings(self, known: Known, keys: dict[str, str], used: Sequence[UsedData]) -> list[str]:
        """keys: of one model, whose results name what all are judged on."""
        from hf_locstitch.evaluation.running import quietly

        leaking, notes = [], []
        for suite in self.suites:
            results = [result for name in suite.names for result in known.get(keys[name], [])]
            with quietly(self.progress.shown):
                judged = suite.judged(results, texts=any(data.prompts for data in used))
            leaking += leaks(judged, used)
            notes += suite.notes(results)
        return [*leaking, *notes]

    def _read(self, keys: Sequence[str], processes: Processes) -> Known:
        """What the first process finds in the cache, in every process, so that all measure the same."""
        cached: Known = {}
        if processes.first and self.cache and not any(suite.logs for suite in self.suites):
            cached = {key: results for key in keys if (results := read_cached(key, cache_folder())) is not None}
        return processes.gather(cached)[0]

    def _measure(
        self,
        suite: Suite,
        model: Model,
        missing: Sequence[str],
        keys: dict[str, str],
        known: Known,
        processes: Processes,
        advance: Advance,
    ) -> None:
        """Add to `known` what is not in it."""
        for name, results in suite.measure(model, missing, processes):
            known[keys[name]] = results
            advance(1)
            if results and processes.first:
                write_cached(keys[name], results, cache_folder())


def _uncounted(count: int) -> None:
    del count
