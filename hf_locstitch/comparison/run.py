"""The merges of a comparison, one after another: made, scored, and removed."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product, starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from huggingface_hub import ModelCard

from hf_locstitch.checkpoints.checkpoint import CARD
from hf_locstitch.checkpoints.source import file_sha256
from hf_locstitch.comparison.cells import Cell
from hf_locstitch.comparison.figure import save_comparison
from hf_locstitch.comparison.leftovers import SCORES
from hf_locstitch.comparison.report import BEST, FILE, ComparisonReport, Entry, shares_of
from hf_locstitch.comparison.search import search
from hf_locstitch.comparison.sharing import Scans
from hf_locstitch.engine.execute import AfterRun, Finished, execute, make
from hf_locstitch.engine.preflight import check_disk
from hf_locstitch.engine.record import with_fit_data
from hf_locstitch.engine.work_dir import WorkDir, fingerprint
from hf_locstitch.errors import CheckpointError, OutputError, RequestError, WorkError
from hf_locstitch.evaluation.evaluate import AfterMerge, Planned, merged_model
from hf_locstitch.evaluation.models import with_own_names
from hf_locstitch.evaluation.publishing import tell_manifest
from hf_locstitch.evaluation.report import EvaluationReport, ModelScores
from hf_locstitch.evaluation.scores import TaskResult, result_from_json
from hf_locstitch.plan.plans import MergePlan
from hf_locstitch.plan.recipe import Finetuned, Input, Recipe
from hf_locstitch.plan.recipe_file import dump_recipe
from hf_locstitch.report.page import with_part
from hf_locstitch.runtime.escape import line
from hf_locstitch.runtime.files import write_atomically, write_text
from hf_locstitch.runtime.processes import Processes
from hf_locstitch.runtime.progress import Advance, Progress
from hf_locstitch.tasks.benchmarks import EvaluateOptions
from hf_locstitch.tasks.sets import LocalizationSet, OpenSet
from hf_locstitch.tasks.splits import ROWS, may_share_rows, of_file

if TYPE_CHECKING:
    from hf_locstitch.comparison.comparison import Comparison

LOWEST = float("-inf")
STEPS = SCORING, COMPARING, PUBLISHING = ("scoring the finetunes", "comparing", "making the best one")
LOSS = "loss"  # of labelled sets: of a token on average


class ComparisonRun:
    """judges: of the merges, by what they are compared on; then of the chosen one, if it is reported on others."""

    def __init__(self, planned: Comparison, judges: Sequence[Planned], work: WorkDir, progress: Progress) -> None:
        self._planned, self._judges, self._work, self._progress = planned, judges, work, progress
        self._judge = judges[0]
        self._options = planned.options
        self._scans = Scans(work.spill / "scans", (cell.recipe for cell in planned.cells.values()))
        self._merged = work.spill / "merged"
        self._entries: dict[str, Entry] = {}
        self._failed: dict[str, str] = {}
        self._alone = 0  # scans that no other merge shares

    def run(self, out: Path) -> ComparisonReport:
        """Make, score and choose; write the report into the stage. out: what the stage becomes."""
        self._progress.step(SCORING)
        # Also on what the chosen one is reported on: examples that cannot be used are found before the merges are made.
        references, *_ = [_scored_references(judge) for judge in self._judges]
        self._progress.step(COMPARING)
        with self._progress.bar("comparing", self._planned.count, " merges") as advance:
            search(self._options, lambda settings: self._measure(settings, references, advance))
        if not self._entries:
            raise WorkError(f"no merge could be made: {'; '.join(self._failed.values())}")
        cell = self._planned.cells[self._best]
        self._progress.step(PUBLISHING)
        return self._publish(cell, references, out)

    @property
    def _best(self) -> str:
        """The identity of the best, the first among equals."""
        return max(self._entries, key=lambda identity: self._entries[identity].rank(self._options.by))

    def _measure(self, settings: Mapping[str, Any], references: EvaluationReport, advance: Advance) -> float:
        """The score of a combination, measured once; the lowest if its merge cannot be made."""
        cell = self._planned.cell(settings)
        if cell.identity not in self._entries and cell.identity not in self._failed:
            try:
                self._entries[cell.identity] = self._entry(cell, references)
            except (OutputError, CheckpointError):  # of the disk and the inputs, which the next merge needs too
                raise
            except RequestError as error:  # such as values that its dtype cannot hold
                self._failed[cell.identity] = f"{cell.label} could not be merged: {error}"
            advance(1)
        entry = self._entries.get(cell.identity)
        return LOWEST if entry is None else entry.rank(self._options.by)[0]

    def _entry(self, cell: Cell, references: EvaluationReport) -> Entry:
        """Made and scored now, or by an earlier process. Raises RequestError or WorkError."""
        known = self._work.folder / SCORES / f"{self._key(cell)}.json"
        if known.exists():
            scores = _scores_from(json.loads(known.read_text("utf-8")))
        else:
            scores = self._score(cell)
            known.parent.mkdir(exist_ok=True)
            write_atomically(known, json.dumps(asdict(scores)))
        if odd := [one for one in scores.results if not math.isfinite(one.main.value)]:
            raise RequestError(f"its {odd[0].main.metric} of {odd[0].title} is {odd[0].main.value}.")
        return Entry(cell.label, cell.settings, cell.density, scores, shares_of(scores, references.models))

    def _key(self, cell: Cell) -> str:
        """A hash of all that the scores of its merge depend on, so also of data in files. Raises RequestError."""
        facts = [fingerprint(self._planned.plan(cell)), *self._judge.session.keys(self._judge.merge).values()]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]

    def _score(self, cell: Cell) -> ModelScores:
        """Make the merge, evaluate it and remove it."""
        plan = self._sharing(cell, self._planned.plan(cell))
        shutil.rmtree(self._merged, ignore_errors=True)
        self._progress.say(cell.label)
        check_disk(self._merged, plan)
        make(plan, self._merged, self._progress)
        self._note_scan(plan)
        try:
            report = self._judge.session.run([replace(merged_model(self._merged), name=cell.label)], Processes())
        except RequestError as error:  # of the examples, so not this merge's alone
            raise WorkError(f"{cell.label} could not be scored: {error}") from error
        shutil.rmtree(self._merged, ignore_errors=True)
        return report.subject

    def _sharing(self, cell: Cell, plan: MergePlan) -> MergePlan:
        shared = self._scans.of(cell.recipe, plan)
        if shared is not None:
            shared.folder.mkdir(parents=True, exist_ok=True)
        return replace(plan, shared=shared)

    def _note_scan(self, plan: MergePlan) -> None:
        """All that it scanned is verified now."""
        if plan.shared is not None:
            plan.shared.note_verified()
        elif plan.masked:
            self._alone += 1

    def _publish(self, cell: Cell, references: EvaluationReport, out: Path) -> ComparisonReport:
        """Make the chosen merge again, report its scores, push it if asked to, and write the report."""
        chosen = self._work.spill / self._key(cell) / "chosen"
        plan = self._sharing(cell, self._planned.published(cell, chosen))
        reports: list[ComparisonReport] = []

        def prepare() -> AfterRun:
            judge = AfterMerge(plan, self._progress)

            def after(folder: Path, processes: Processes) -> None:
                report = self._report(references, replace(judge.run(folder, processes), figures=()))
                add_to_card(report, folder)
                reports.append(report)

            return after

        done: Finished = execute(plan, self._progress, prepare)
        report = replace(reports[0], out=str(out), url=done.url, commit=done.commit)
        stage = self._work.stage
        save_comparison(report, stage)
        write_text(stage / FILE, json.dumps(report.as_json(), indent=1) + "\n")
        best = f"# The best by comparison: {line(cell.label)}\n{dump_recipe(pinned(cell.recipe, plan))}"
        write_text(stage / BEST, best)
        write_text(stage / CARD, f"# Comparison\n\n{report.section()}\n")
        return report

    def _report(self, references: EvaluationReport, reported: EvaluationReport) -> ComparisonReport:
        decided = examples_of(self._entries[self._best].scores.results, self._options.select)
        asked = self._planned.asked.evaluate or self._options.select
        same = any(starmap(may_be_same, product(decided, examples_of(reported.subject.results, asked))))
        warnings = [*self._failed.values(), *self._planned.warnings]
        if same:
            warnings.append(
                "the chosen merge is reported on examples that it was chosen by, so its scores there are too good: "
                "give others as `evaluate:`"
            )
        tokenizers = {self._planned.cells[identity].recipe.tokenizer for identity in self._entries}
        if len(tokenizers) > 1 and any(one.main.metric == LOSS for one in self._entries[self._best].scores.results):
            warnings.append(
                "merges with different tokenizers are compared by a loss, which is a mean over tokens, and theirs are "
                "not the same: give select another metric, such as exact-match, or compare with one tokenizer"
            )
        return ComparisonReport(
            entries=tuple(self._entries.values()),
            references=references.models,
            by=self._options.by,
            reported=reported,
            same_examples=same,
            scans=self._scans.finished + self._alone,
            warnings=tuple(warnings),
        )


def _scored_references(judge: Planned) -> EvaluationReport:
    models = with_own_names(judge.references())
    return judge.session.run(models, Processes()) if models else EvaluationReport((), (), None)


class Examples(NamedTuple):
    """Which examples a result is of, as far as is known. data: of a file its content, else the data set. config:
    None if it is not known, or there are several, as in a group of tasks."""

    data: str
    config: str | None = None
    split: str | None = None


def examples_of(results: Sequence[TaskResult], asked: EvaluateOptions) -> set[Examples]:
    paths = {name: Path(one.ref).expanduser() for name, one in asked.sets.items()}
    files = {name: file_sha256(path) for name, path in paths.items() if path.is_file()}
    return {
        Examples(files[one.task], None, of_file(one.split or ROWS))
        if one.task in files
        else Examples(one.dataset or one.task, one.config, one.split)
        for one in results
    }


def may_be_same(one: Examples, other: Examples) -> bool:
    """Whether some of these may be among those."""
    if one.data.lower() != other.data.lower():
        return False
    if one.config and other.config and one.config != other.config:
        return False
    return not (one.split and other.split) or may_share_rows(one.split, other.split)


def pinned(recipe: Recipe, plan: MergePlan) -> Recipe:
    """The recipe with repos and data sets at their commits; local folders and files stay as they are written."""

    def at(entry: Input, name: str) -> str:
        source = plan.inputs[name].source
        return source.pinned if source.commit else entry.ref

    entries = zip(recipe.finetuned, plan.finetuned, strict=True)
    finetuned = tuple(Finetuned(ref=at(entry, name), name=name, sha256=entry.sha256) for entry, name in entries)
    base = recipe.base.model_copy(update={"ref": at(recipe.base, "base")})
    data = {name: _data_at(found) for name, found in plan.data.items()}
    recipe = recipe.model_copy(update={"base": base, "finetuned": finetuned, "data": data or ()})
    return with_fit_data(recipe, {name: _data_at(found) for name, found in plan.fit_data.items()})


def _data_at(found: OpenSet) -> LocalizationSet:
    return found.pinned if found.commit else found.asked


def add_to_card(report: ComparisonReport, folder: Path) -> None:
    """The comparison, in a merge's card, figures and manifest."""
    pictures = save_comparison(report, folder)
    card = ModelCard.load(folder / CARD)
    card.text = with_part(card.text, "comparison", report.section())
    card.save(folder / CARD)
    tell_manifest(folder, [folder / CARD, *pictures])


def _scores_from(fields: Mapping[str, Any]) -> ModelScores:
    """The inverse of dataclasses.asdict."""
    return ModelScores(**{**fields, "results": tuple(map(result_from_json, fields["results"]))})
