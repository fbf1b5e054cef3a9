"""Writing results into a model's repo: card metadata and table, .eval_results/, a figure, in one commit."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    constants,
    eval_result_entries_to_yaml,
)
from markupsafe import Markup

from hf_locstitch.artifacts.manifest import FILE, parse_manifest, to_json
from hf_locstitch.checkpoints.checkpoint import CARD, open_source
from hf_locstitch.checkpoints.ref import Ref, parse_ref
from hf_locstitch.checkpoints.source import file_sha256
from hf_locstitch.errors import OutputError
from hf_locstitch.evaluation.report import EvaluationReport, ModelScores, Table, markdown
from hf_locstitch.evaluation.scores import TaskResult
from hf_locstitch.plan.push_target import MAIN, PushTarget
from hf_locstitch.report.page import has_part, picture, with_part
from hf_locstitch.runtime import escape
from hf_locstitch.runtime.files import write_atomically, write_text
from hf_locstitch.runtime.human import counted

ENTRIES = ".eval_results"
SCORES, FIGURE = "figures/scores.json", "figures/scores.png"
PART, PICTURE = "evaluation", "picture"  # parts of a card
ALT = "Scores, one marker per model, with standard errors"
HARNESS = "https://github.com/EleutherAI/lm-evaluation-harness"


def check_writable(ref: str) -> None:
    """Raises OutputError unless the results can be written where `ref` is."""
    parsed = parse_ref(ref)
    if parsed.path:
        whole = parsed.repo or parsed.folder
        raise OutputError(
            f"{ref} is only a part of {whole}, whose card speaks of the whole, so scores are not written there. Leave "
            f"out --push, or evaluate {whole}."
        )
    if parsed.folder is None:
        from hf_locstitch.report.push_rights import check_branch, check_target

        check_target(_target(parsed))
        check_branch(_target(parsed))
    elif not parsed.folder.is_dir():
        raise OutputError(
            f"{parsed.folder} is not a folder, so results cannot be written there. Name a folder or a repo."
        )


def _target(ref: Ref) -> PushTarget:
    return PushTarget(str(ref.repo), ref.revision or MAIN)


def write_results(report: EvaluationReport, ref: str) -> EvaluationReport:
    """Write them into the folder or, in one commit on top of the evaluated one, into the repo.

    Returns the report with what was written. Raises PublishError, for instance if the repo has changed since.
    """
    parsed = parse_ref(ref)
    if parsed.folder is not None:
        written = record_in(report, parsed.folder, parsed.name)
        return replace(report, figures=tuple(str(path) for path in written))
    from hf_locstitch.report.publish import publish_files

    source = open_source(parse_ref(report.subject.ref))
    with tempfile.TemporaryDirectory(prefix="hf-locstitch-results-") as folder:
        stage = Path(folder)
        for file in (CARD, FILE):
            if file in source.files:
                shutil.copyfile(source.fetch(file), stage / file)
        record_in(report, stage, parsed.name)
        message = f"Add scores: {', '.join(report.tasks)}"
        done = publish_files(stage, _target(parsed), parent=str(source.commit), message=message)
    return replace(report, url=done.url, commit=done.commit)


def record_in(report: EvaluationReport, folder: Path, title: str) -> list[Path]:
    """Write card, .eval_results/ and figure into a model's folder, and update its manifest if it has one.

    title: the model's name in the card's metadata. Returns the figures' paths.
    """
    from hf_locstitch.evaluation.figure import draw_evaluation

    pictures = draw_evaluation(report, folder / "figures")
    write_text(folder / SCORES, json.dumps(report.as_json(), indent=1, ensure_ascii=False) + "\n")
    path = folder / CARD
    card = ModelCard(
        path.read_text(encoding="utf-8") if path.exists() else f"---\nlibrary_name: transformers\n---\n\n# {title}\n"
    )
    card = with_results(card, report, title)
    if has_part(card.text, PICTURE):
        card.text = with_part(card.text, PICTURE, top(report, picture(folder / FIGURE, ALT)))
    card.save(path)
    write_entries(report.subject.results, folder / ENTRIES)
    if (folder / FILE).exists():
        tell_manifest(folder, [path, folder / SCORES, *pictures])
    return pictures


def with_results(card: ModelCard, report: EvaluationReport, title: str) -> ModelCard:
    """The card with the subject's scores in its metadata, and with a section that replaces an earlier one."""
    before: Any = card.data
    fields = before.to_dict()
    fields.pop("model-index", None)
    new = [entry for result in report.subject.results for entry in eval_results(result)]
    old = [one for one in before.eval_results or [] if not any(_replaces(entry, one) for entry in new)]
    data = ModelCardData(**{**fields, "model_name": title, "eval_results": [*old, *new]})
    text = with_part(card.text, PART, describe_for_card(report, figure=not has_part(card.text, PICTURE)))
    return ModelCard(f"---\n{data.to_yaml(line_break=chr(10))}\n---\n{text}")


def _replaces(new: EvalResult, old: EvalResult) -> bool:
    """Whether it is of the same, or the old one of no more than some examples of the same."""
    named = str(new.metric_name)
    before = str(old.metric_name)
    same = before == named or (before.startswith(f"{named}, ") and before.endswith(" examples"))
    return same and old.dataset_type == new.dataset_type


def eval_results(result: TaskResult) -> list[EvalResult]:
    """One entry per metric. metric_name distinguishes tasks on the same data set, which the metadata group together,
    and says where only some examples were evaluated."""
    return [
        EvalResult(
            task_type=result.hub_task,
            dataset_type=result.dataset or result.task,
            dataset_name=result.dataset or result.task,
            dataset_config=result.config,
            dataset_split=result.split,
            dataset_revision=result.revision,
            metric_type=score.metric.replace("-", "_"),
            metric_name=", ".join(filter(None, [f"{result.task} {score.metric}", result.taken])),
            metric_value=score.value,
            metric_args={**_settings(result), "stderr": score.stderr, "limit": result.limit},
            source_name=f"lm-evaluation-harness {result.lm_eval}" if result.lm_eval else None,
            source_url=HARNESS if result.lm_eval else None,
        )
        for score in result.scores
    ]


def _settings(result: TaskResult) -> dict[str, Any]:
    if result.objective is None:
        return {"num_few_shot": result.shots}
    return {"measured_by": result.measured_by}


def entries_of(results: Sequence[TaskResult]) -> dict[str, EvalResultEntry]:
    """File name -> entry with the main metric, of each task whose data set is on the Hub.

    None of scores of some examples only: the Hub ranks entries beside those of others, and nothing marks them there.
    """
    entries = {}
    for result in results:
        if result.dataset is None or result.limit is not None:
            continue
        tool, _, how = result.measured_by.partition(", ")
        notes = [result.main.metric, how]
        notes += [f"stderr {result.main.stderr:.6g}"] if result.main.stderr is not None else []
        entries[f"{result.task.replace('/', '_')}.yaml"] = EvalResultEntry(
            dataset_id=result.dataset,
            task_id=result.task,
            value=result.main.value,
            dataset_revision=result.revision,
            date=result.date,
            notes=", ".join([*notes, tool]),
        )
    return entries


def write_entries(results: Sequence[TaskResult], folder: Path) -> None:
    for file, entry in entries_of(results).items():
        folder.mkdir(exist_ok=True)
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
        write_text(folder / file, text)


def top(report: EvaluationReport, scores: Markup) -> str:
    """What the card begins with: the figure of the scores, and what they say in a sentence."""
    return "\n\n".join([scores, *_summary(report)])


def describe_for_card(report: EvaluationReport, *, figure: bool = True) -> str:
    """The section of the card, Markdown. figure: whether it holds the figure and what this says, or the top does."""
    subject = report.subject
    partly = f" on {report.taken}" if report.taken else ""
    parts = [f"## Evaluation{partly}", *(_summary(report) if figure else [])]
    scores = [[_on_two_lines(cell) for cell in row] for row in report.score_table(digits=3)]
    parts.append(markdown(_emphasized(scores, subject.name), left=2))
    comparison = report.comparison_table()
    if len(comparison) > 1:
        parts.append(
            "Compared with the base (does the difference exceed its standard error, computed as for independent "
            "scores?) and with the best finetune on each task:"
        )
        parts.append(markdown(comparison, left=3))
    parts += [f"![{ALT}]({FIGURE})"] if figure else []
    parts.append(", ".join(f"**{escape.markdown(model.name)}**: {_where(model)}" for model in report.models) + ".")
    parts += _objectives(subject.results)
    parts.append(f"Measured with {_tools(subject.results)}; all numbers are in [{SCORES}]({SCORES}). To repeat:")
    flags = " ".join(report.flags).split(" --")
    by_manifest = "--ft" not in report.flags and any(model.role == "finetuned" for model in report.models)
    flags += ["parents"] if by_manifest else []
    flags += ["average"] if any(model.role == "average" for model in report.models) else []
    command = " \\\n  --".join(
        [f"hf-locstitch evaluate {escape.shell(subject.ref.split('@')[0])}", flags[0][2:], *flags[1:]]
    )
    parts.append(f"```bash\n{command}\n```")
    if report.sets:
        text = yaml.safe_dump(dict(report.sets), sort_keys=False, allow_unicode=True)
        parts.append(f"where `sets.yaml` is\n\n```yaml\n{text}```")
    parts += [f"> **Warning**: {escape.markdown(warning)}" for warning in report.warnings]
    return "\n\n".join(parts)


def _tools(results: Sequence[TaskResult]) -> str:
    lm_eval = next((f"[lm-eval]({HARNESS}) {one.lm_eval}" for one in results if one.lm_eval), None)
    own = next((f"hf-locstitch {one.hf_locstitch}" for one in results if one.hf_locstitch), None)
    return " and ".join(tool for tool in (lm_eval, own) if tool)


def _objectives(results: Sequence[TaskResult]) -> list[str]:
    """How the labelled sets are judged, if there are any."""
    said = []
    for one in results:
        if one.objective is not None:
            head = f" with the head of {escape.markdown(one.head)}" if one.head is not None else ""
            rows = counted(one.examples, "row") + (f" of {escape.markdown(one.dataset)}" if one.dataset else "")
            said.append(f"**{escape.markdown(one.task)}**: {one.objective}{head}, {rows}")
    return [", ".join(said) + "."] if said else []


def _on_two_lines(cell: str) -> Markup:
    """A score above its standard error."""
    return Markup(escape.markdown(cell).replace(" ± ", Markup("<br>±\u00a0")))


def _summary(report: EvaluationReport) -> list[str]:
    """One sentence, if there are finetunes to compare with."""
    if not (kept := report.kept()):
        return []
    mean = sum(share for _, share in kept) / len(kept)
    task, least = min(kept, key=lambda one: one[1])
    at_least = f"at least {100 * least:.0f} %, on {escape.markdown(task)}"
    over = " on one task" if len(kept) == 1 else f", averaged over {len(kept)} tasks ({at_least})"
    partly = f", on {report.taken} only" if report.taken else ""
    return [f"It keeps {100 * mean:.0f} % of the best finetune's score{over}{partly}."]


def _emphasized(table: Sequence[Sequence[str]], name: str) -> Table:
    """The table with the subject's column in bold."""
    bold = {place for place, title in enumerate(table[0]) if title == name}
    return [[_bold(cell) if place in bold else cell for place, cell in enumerate(row)] for row in table]


def _bold(text: str) -> Markup:
    return Markup(f"**{escape.markdown(text)}**")


def _where(model: ModelScores) -> str:
    repo, at, commit = model.ref.partition("@")
    if not at:
        return escape.code(model.ref) if model.role != "average" else escape.markdown(model.ref)
    return f"{escape.link(repo, f'{constants.ENDPOINT}/{repo}/tree/{commit}')} at {escape.code(commit[:7])}"


def tell_manifest(folder: Path, paths: Sequence[Path]) -> None:
    """Update the files' sizes and hashes, which `verify` checks."""
    record = parse_manifest((folder / FILE).read_bytes(), str(folder / FILE))
    outputs = dict(record.outputs)
    for path in paths:
        outputs[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    written = sum(entry["size"] for entry in outputs.values())
    record = replace(record, outputs=dict(sorted(outputs.items())), bytes={**record.bytes, "written": written})
    write_atomically(folder / FILE, to_json(record))
