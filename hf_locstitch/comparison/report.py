"""What a comparison found, as data and for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hf_locstitch.evaluation.report import EvaluationReport, ModelScores, Table, align, markdown, show_score
from hf_locstitch.evaluation.scores import Score, best
from hf_locstitch.runtime import escape, html
from hf_locstitch.runtime.escape import line
from hf_locstitch.runtime.human import counted

FILE = "comparison.json"
BEST = "best.yaml"
FIGURE = "figures/comparison.png"
LEAST = 1e-9  # a score that a share is taken of, where lower is better


@dataclass(frozen=True)
class Entry:
    """One merge of a comparison. settings: its values of what was varied, and label: these for people. density: the
    share of weights that it keeps, None for all. scores: as model of an evaluation. shares: as shares_of."""

    label: str
    settings: Mapping[str, Any]
    density: float | None
    scores: ModelScores
    shares: Mapping[str, float]

    @property
    def mean(self) -> float:
        return sum(self.shares.values()) / len(self.shares)

    @property
    def worst(self) -> float:
        return min(self.shares.values())

    def rank(self, by: Literal["mean", "worst"]) -> tuple[float, float]:
        """The larger, the better; ties are decided by the other of the two."""
        return (self.mean, self.worst) if by == "mean" else (self.worst, self.mean)


def shares_of(scores: ModelScores, references: Sequence[ModelScores]) -> dict[str, float]:
    """For each task the share of the best finetune's main score that is kept; where lower is better, that score's share
    of this one. Unless such shares can be taken on every task: the score itself (its negative)."""
    if not can_be_shares(references):
        return {one.task: one.main.value * (1 if one.main.higher_is_better else -1) for one in scores.results}
    finest = _of_best_finetune(references)
    return {one.task: _share_of(one.main, finest[one.task]) for one in scores.results}


def can_be_shares(references: Sequence[ModelScores]) -> bool:
    """Whether finetunes were evaluated, and the best of them scores more than 0 on every task."""
    finest = _of_best_finetune(references)
    return bool(finest) and all(score.value > 0 for score in finest.values())


def _of_best_finetune(references: Sequence[ModelScores]) -> dict[str, Score]:
    """Task -> its best main score."""
    found: dict[str, dict[str, Score]] = {}
    for model in references:
        for result in model.results if model.role == "finetuned" else ():
            found.setdefault(result.task, {})[model.name] = result.main
    return {task: scores[str(best(scores))] for task, scores in found.items()}


def _share_of(score: Score, finest: Score) -> float:
    if score.higher_is_better:
        return score.value / finest.value
    return finest.value / max(score.value, LEAST)


@dataclass(frozen=True)
class ComparisonReport:
    """entries: in the order they were made. references: base, finetunes and average on the same examples. reported:
    the chosen merge and these on the examples that are reported. same_examples: whether some of these decided.
    scans: how often finetunes were scanned for masks. url, commit: where the chosen merge was pushed.
    """

    entries: tuple[Entry, ...]
    references: tuple[ModelScores, ...]
    by: Literal["mean", "worst"]
    reported: EvaluationReport
    same_examples: bool
    scans: int
    warnings: tuple[str, ...] = ()
    out: str | None = None
    url: str | None = None
    commit: str | None = None

    @property
    def relative(self) -> bool:
        """Whether shares are of the best finetune's scores, or the scores themselves."""
        return can_be_shares(self.references)

    @property
    def chosen(self) -> Entry:
        """The best, the first among equals."""
        return max(self.entries, key=lambda entry: entry.rank(self.by))

    def as_json(self) -> dict[str, Any]:
        entries = [{**asdict(entry), "mean": entry.mean, "worst": entry.worst} for entry in self.entries]
        return {
            **asdict(self),
            "entries": entries,
            "chosen": self.entries.index(self.chosen),
            "reported": self.reported.as_json(),
        }

    @property
    def _axes(self) -> int:
        """How many columns of the table say how a merge was made."""
        return len(self.table()[0]) - len(self.chosen.scores.results) - 2

    def table(self) -> Table:
        """The best first: the settings, the main score of each task, mean and worst of the shares."""
        axes = list(dict.fromkeys(axis for entry in self.entries for axis in entry.settings))
        tasks = self.chosen.scores.results
        rows = [[*axes, *(f"{result.title} {result.main.metric}" for result in tasks), "mean", "worst"]]
        for entry in sorted(self.entries, key=lambda entry: entry.rank(self.by), reverse=True):
            scores = [show_score(entry.scores.score(result.task, result.main.metric), 3) for result in tasks]
            shares = [_share(share, self.relative) for share in (entry.mean, entry.worst)]
            rows.append([*(_cell(entry.settings.get(axis)) for axis in axes), *scores, *shares])
        return rows

    def describe(self, width: int | None = None) -> str:
        """For people. width: of the terminal, which tables then fit."""
        table = align(self.table(), width, keys=self._axes)
        return "\n\n".join([table, self._notes(), self.reported.describe(width)])

    def _repr_html_(self) -> str:
        """For notebooks: the same tables, and the figure."""
        figure = html.picture(Path(self.out) / FIGURE, "Scores of the merges against density") if self.out else None
        found = html.table(self.table(), keys=self._axes), html.summary(self._notes()), figure
        return html.page(*found) + self.reported._repr_html_()

    def _notes(self) -> str:
        notes = [f"chosen     {self.chosen.label} (by {self.by})", f"scans      {self.scans}"]
        notes += [f"warning    {warning}" for warning in self.warnings]
        notes += [f"comparison {self.out}"] if self.out else []
        notes += [f"published  {self.url} at {self.commit}"] if self.url else []
        notes += [f"next       hf-locstitch merge {self.out}/{BEST} --out DIR"] if self.out and not self.url else []
        return "\n".join(map(line, notes))

    def section(self) -> str:
        """Of a card, Markdown."""
        share = "share of the best finetune's score" if self.relative else "score"
        by = f"the mean {share} over the tasks" if self.by == "mean" else f"the {share} on the worst task"
        others = "the same examples" if self.same_examples else "other examples"
        return "\n\n".join(
            [
                "## Comparison",
                f"The best of {counted(len(self.entries), 'merge')} of the same finetunes by {by}: "
                f"{escape.markdown(self.chosen.label)}. They were compared by the scores below; the evaluation's are "
                f"on {others}.",
                f"![Scores of the merges against density: mean over the tasks, and worst task]({FIGURE})",
                markdown(self.table(), left=self._axes),
                *(f"> **Warning**: {escape.markdown(warning)}" for warning in self.warnings),
            ]
        )


def _share(value: float, relative: bool) -> str:
    return f"{100 * value:.1f} %" if relative else f"{value:.4f}"


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key} {setting}" for key, setting in value.items())
    return "" if value is None else str(value)
