"""The scores of several models side by side, as data and for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_locstitch.evaluation.models import Role
from hf_locstitch.evaluation.scores import Comparison, Score, TaskResult, compare
from hf_locstitch.runtime import escape, html
from hf_locstitch.runtime.escape import line
from hf_locstitch.runtime.human import counted

Table = list[list[str]]  # the first row is the head
GAP = "  "  # between columns


@dataclass(frozen=True)
class ModelScores:
    """results: in the order of the tasks. cached: how many of the requested tasks came from the cache."""

    name: str
    role: Role
    ref: str
    content: str
    results: tuple[TaskResult, ...]
    cached: int = 0

    def score(self, task: str, metric: str) -> Score | None:
        return next((s for r in self.results if r.task == task for s in r.scores if s.metric == metric), None)


@dataclass(frozen=True)
class EvaluationReport:
    """models: base, finetunes, average, then the models under evaluation. url, commit: where the results were pushed.

    tasks: as requested, NAME or NAME:SHOTS, and names of labelled sets. flags: of the command line that repeats the
    evaluation. sets: the labelled sets, by name, where flags do not say all of them; their file is called sets.yaml.
    """

    models: tuple[ModelScores, ...]
    tasks: tuple[str, ...]
    limit: int | None
    warnings: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    sets: Mapping[str, Any] = field(default_factory=dict)
    url: str | None = None
    commit: str | None = None
    figures: tuple[str, ...] = field(default=())

    @property
    def judged(self) -> list[ModelScores]:
        """Those that are compared with the base and its finetunes."""
        return [model for model in self.models if model.role in ("model", "average")]

    @property
    def subject(self) -> ModelScores:
        """The model that the evaluation is about: the first of those under evaluation."""
        return next((model for model in self.models if model.role == "model"), self.models[-1])

    @property
    def taken(self) -> str:
        """Which examples of each task, if only some: `the first 100 examples of each task`."""
        drawn = {one.objective is not None for one in self.subject.results if one.limit is not None}
        if self.limit is None or not drawn:
            return ""
        if len(drawn) > 1:
            return f"{counted(self.limit, 'example')} of each task"
        (of_sets,) = drawn
        taken = counted(self.limit, "drawn example") if of_sets else f"the first {counted(self.limit, 'example')}"
        return f"{taken} of each {'set' if of_sets else 'task'}"

    def rows(self) -> list[tuple[TaskResult, Score]]:
        """Each task with each of its metrics, taken from the first model."""
        return [(result, score) for result in self.models[0].results for score in result.scores]

    def comparison(self, model: ModelScores, task: str, metric: str) -> Comparison:
        """Raises KeyError if the model has no such score."""
        score = model.score(task, metric)
        if score is None:
            raise KeyError(f"{model.name} has no {metric} of {task}")
        base = next((one.score(task, metric) for one in self.models if one.role == "base"), None)
        parents = {one.name: one.score(task, metric) for one in self.models if one.role == "finetuned"}
        return compare(score, base, {name: found for name, found in parents.items() if found is not None})

    def kept(self) -> list[tuple[str, float]]:
        """Each task with the share of the best finetune's main score that the subject keeps, where it is defined."""
        shares = [(r.task, self.comparison(self.subject, r.task, r.main.metric).kept) for r in self.subject.results]
        return [(task, kept) for task, kept in shares if kept is not None]

    def as_json(self) -> dict[str, Any]:
        comparisons = {
            model.name: {
                result.task: {s.metric: asdict(self.comparison(model, result.task, s.metric)) for s in result.scores}
                for result in model.results
            }
            for model in self.judged
        }
        return {**asdict(self), "comparisons": comparisons}

    def describe(self, width: int | None = None) -> str:
        """For people. width: of the terminal, which tables then fit."""
        parts = [align(self.score_table(), width, keys=2)]
        if len(comparison := self.comparison_table()) > 1:
            parts.append(align(comparison, width, keys=3))
        return "\n\n".join([*parts, self._notes()])

    def _repr_html_(self) -> str:
        """For notebooks: the same tables."""
        tables = html.table(self.score_table(), keys=2), html.table(self.comparison_table(), keys=3)
        return html.page(*tables, html.summary(self._notes()))

    def _notes(self) -> str:
        cached = sum(model.cached for model in self.models)
        measured = counted(len(self.models) * len(self.tasks) - cached, "score")
        counts = f"measured   {measured}, {cached} more from the cache"
        notes = [f"warning    {warning}" for warning in self.warnings]
        notes += [f"figure     {figure}" for figure in self.figures]
        notes += [f"published  {self.url} at {self.commit}"] if self.url else []
        return "\n".join(map(line, [counts, *notes]))

    def score_table(self, digits: int = 4) -> Table:
        """A row for each task and metric, a column for each model: value ± standard error."""
        rows = [["task", "metric", *(model.name for model in self.models)]]
        for result, score in self.rows():
            scores = [model.score(result.task, score.metric) for model in self.models]
            rows.append([result.title, score.metric, *(show_score(one, digits) for one in scores)])
        return rows

    def comparison_table(self) -> Table:
        """A row for each judged model, task and metric that can be compared with the base or a finetune."""
        rows = [
            [
                "model",
                "task",
                "metric",
                "difference from base",
                "exceeds the standard error",
                "best parent",
                "% of best parent",
            ]
        ]
        for model in self.judged:
            for result, score in self.rows():
                if model.score(result.task, score.metric) is None:
                    continue
                beside = self.comparison(model, result.task, score.metric)
                if beside.difference is None and beside.best_parent is None:
                    continue
                rows.append([model.name, result.title, score.metric, *show_comparison(beside)])
        return rows


def show_score(score: Score | None, digits: int = 4) -> str:
    if score is None:
        return "–"
    return f"{score.value:.{digits}f}" + ("" if score.stderr is None else f" ± {score.stderr:.{digits}f}")


def show_comparison(beside: Comparison) -> list[str]:
    difference = "–" if beside.difference is None else f"{beside.difference:+.4f}"
    difference += "" if beside.stderr is None else f" ± {beside.stderr:.4f}"
    exceeds = {None: "–", True: "yes", False: "no"}[beside.exceeds]
    kept = "–" if beside.kept is None else f"{100 * beside.kept:.1f} %"
    return [difference, exceeds, beside.best_parent or "–", kept]


def align(table: Table, width: int | None = None, keys: int = 1) -> str:
    """Aligned columns; the first to the left.

    width: of the terminal: what does not fit beside one another comes in several tables. keys: how many columns say
    what a row is about; each of the tables has them.
    """
    table = [[line(cell) for cell in row] for row in table]
    widths = [max(len(row[place]) for row in table) for place in range(len(table[0]))]
    return "\n\n".join(_aligned(table, widths, columns) for columns in fitting(widths, width, keys))


def fitting(widths: Sequence[int], width: int | None, keys: int) -> list[list[int]]:
    """The columns of each table: all keys, and as many others as fit, at least one. widths: of the columns."""
    always, others = list(range(keys)), range(keys, len(widths))
    taken = sum(widths[place] + len(GAP) for place in always)
    tables = [[*always]]
    used = taken
    for place in others:
        if width is not None and used + widths[place] > width and len(tables[-1]) > keys:
            tables.append([*always])
            used = taken
        tables[-1].append(place)
        used += widths[place] + len(GAP)
    return tables


def _aligned(table: Table, widths: Sequence[int], columns: Sequence[int]) -> str:
    def cell(row: list[str], place: int) -> str:
        return row[place].ljust(widths[place]) if place == 0 else row[place].rjust(widths[place])

    return "\n".join(GAP.join(cell(row, place) for place in columns) for row in table)


def markdown(table: Table, left: int = 1) -> str:
    """A Markdown table; the first `left` columns to the left, the others to the right. Cells are escaped for it."""
    head, *rows = [[escape.markdown(cell) for cell in row] for row in table]
    rule = [":---" if place < left else "---:" for place in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])
