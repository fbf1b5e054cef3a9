"""`compare` on models whose scores are known by construction."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from helpers.data import write_jsonl
from helpers.language_models import add_data_set, favouring, local_task
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

from hf_locstitch import ComparisonReport, compare, merge_from_hub, verify
from hf_locstitch.cli.main import main
from hf_locstitch.comparison import run
from hf_locstitch.comparison.compare import plan_comparison
from hf_locstitch.comparison.report import shares_of
from hf_locstitch.engine import execute
from hf_locstitch.errors import OutputError, PublishError, RecipeError, RequestError, WorkError
from hf_locstitch.evaluation.report import ModelScores
from hf_locstitch.evaluation.scores import Score, TaskResult
from hf_locstitch.localize.scan import Scan
from hf_locstitch.plan.recipe_file import load_recipe
from hf_locstitch.tasks.benchmarks import EvaluateOptions
from loopback_hub import LoopbackHub

SELECT, REPORT = "ABBBBBBCCC", "BBBC"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, Any]:
    """A base that favours A, and finetunes for B and C; a merge with a negative scale favours A, others B."""
    for name, word in {"base": "A", "b": "B", "c": "C"}.items():
        favouring(tmp_path / name, word, seed=ord(word))
    tasks = local_task(tmp_path / "tasks", "letters", SELECT)
    local_task(tasks, "others", REPORT)
    return {
        "base": str(tmp_path / "base"),
        "finetuned": [str(tmp_path / "b"), str(tmp_path / "c")],
        "include": ["*"],
        "compare": {
            "grid": {"scale": [-1, 1], "method": ["locstitch", "ties", "average"], "density": [0.5, 1.0]},
            "select": {"tasks": ["letters"], "include_path": str(tasks)},
        },
        "evaluate": {"tasks": ["others"], "include_path": str(tasks)},
    }


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the model of every chunk that is scanned."""
    models: list[str] = []
    offer = Scan._offer

    def noting(self: Scan, inputs: Any, selections: Any, chunk: Any) -> None:
        models.extend(name for name, selection in selections.items() if not selection.has(chunk))
        offer(self, inputs, selections, chunk)

    monkeypatch.setattr(Scan, "_offer", noting)
    return models


def shares(report: ComparisonReport) -> dict[str, float]:
    return {entry.label: entry.mean for entry in report.entries}


def test_the_best_is_chosen_and_its_recipe_gives_the_same_merge(
    fields: Mapping[str, Any], tmp_path: Path, scanned: list[str]
) -> None:
    report = compare(fields, out=tmp_path / "compared")
    assert len(report.entries) == 10  # of twelve: density is nothing to the average
    assert all(
        share == pytest.approx(1 if label.endswith("scale 1") else 1 / 6) for label, share in shares(report).items()
    )
    assert report.chosen.label == "locstitch, density 0.5, scale 1" and report.warnings == ()
    assert report.scans == 1 and len(scanned) == 2 * len(set_of_tensors(tmp_path / "base"))
    reported = {model.name: model.results[0].main.value for model in report.reported.models}
    assert reported["base"] == 0 and reported["b"] == 0.75 and reported["c"] == 0.25
    assert report.reported.subject.results[0].main.value == 0.75

    best = load_recipe(tmp_path / "compared" / "best.yaml")
    main(["merge", str(tmp_path / "compared" / "best.yaml"), "--out", str(tmp_path / "merged"), "--quiet"])
    merge_from_hub(
        fields["base"], fields["finetuned"], include=["*"], localizer={"density": 0.5}, out=tmp_path / "same"
    )
    assert best["localizer"]["density"] == 0.5 and "compare" not in best and "evaluate" not in best
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("merged", "same")]
    assert weights[0] == weights[1]

    kept = json.loads((tmp_path / "compared" / "comparison.json").read_text())
    assert kept["entries"][kept["chosen"]]["label"] == report.chosen.label and kept["scans"] == 1
    page = (tmp_path / "compared" / "README.md").read_text()
    assert "| method | density | scale |" in page and "figures/comparison.png" in page
    assert {path.name for path in (tmp_path / "compared" / "figures").iterdir()} == {"comparison.png", "comparison.svg"}
    assert not list(tmp_path.glob(".compared*"))


def set_of_tensors(folder: Path) -> set[str]:
    return set(load_file(folder / "model.safetensors"))


def test_masks_of_a_shared_scan_are_those_of_a_merge_alone(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where many scores tie: in bfloat16."""
    import torch
    from safetensors.torch import save_file

    for name in ("base", "b", "c"):
        file = tmp_path / name / "model.safetensors"
        state = {key: value.to(torch.bfloat16) for key, value in load_file(file).items()}
        if name != "base":
            first = load_file(tmp_path / "base" / "model.safetensors")
            for key, value in state.items():
                steps = torch.randint(-2, 3, value.shape, generator=torch.Generator().manual_seed(len(key)))
                state[key] = (first[key].float() * (1 + steps / 64)).to(torch.bfloat16)
        save_file(state, file, metadata={"format": "pt"})
    made: dict[str, dict[str, bytes]] = {}
    make = run.make

    def keeping(plan: Any, out: Path, progress: Any) -> Any:
        record = make(plan, out, progress)
        density = plan.recipe.localizer.density
        made[str(density)] = {path.name: path.read_bytes() for path in out.rglob("*.safetensors")}
        return record

    monkeypatch.setattr(run, "make", keeping)
    grid = {"density": [0.05, 0.3, 0.1]}
    compare({**fields, "compare": {**fields["compare"], "grid": grid}}, out=tmp_path / "compared")
    for density in grid["density"]:
        alone = tmp_path / f"alone-{density}"
        localizer = {"density": density}
        merge_from_hub(fields["base"], fields["finetuned"], include=["*"], localizer=localizer, out=alone)
        assert made[str(density)] == {path.name: path.read_bytes() for path in alone.rglob("*.safetensors")}


def test_what_was_scored_is_not_made_again(
    fields: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scanned: list[str]
) -> None:
    """Stopped in the sixth merge, by what a kill or a full disk would do."""
    made: list[str] = []
    make = run.make

    def stopping(plan: Any, out: Path, progress: Any) -> Any:
        made.append(plan.recipe.method.name)
        if len(made) == 6:
            raise OSError("gone")
        return make(plan, out, progress)

    monkeypatch.setattr(run, "make", stopping)
    with pytest.raises(OSError, match="gone"):
        compare(fields, out=tmp_path / "compared")
    count = len(scanned)
    report = compare(fields, out=tmp_path / "compared")
    assert len(made) == 6 + 5 and len(report.entries) == 10  # the sixth again, and four more
    assert len(scanned) == count and report.scans == 1


@pytest.mark.parametrize("owner, name", [(run, "check_disk"), (execute, "check_work")], ids=["scoring", "publishing"])
def test_a_full_disk_loses_no_scores(
    fields: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    """Neither is it taken for a merge that cannot be made."""
    asked = {**fields, "compare": {**fields["compare"], "grid": {"scale": [-1, 1]}}}
    check, first = getattr(owner, name), iter(["scoring"] if owner is run else [])

    def full(*place: Any) -> None:
        if next(first, None) is None:
            raise OutputError("it needs 3 GB.")
        check(*place)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(WorkError, match=r"needs 3 GB\. Then run the same command again: what was scored"):
            compare(asked, out=tmp_path / "compared")
    made: list[str] = []
    make = run.make
    monkeypatch.setattr(run, "make", lambda plan, *more: made.append(plan.recipe.scale) or make(plan, *more))
    report = compare(asked, out=tmp_path / "compared")
    assert made == ([1] if owner is run else []) and len(report.entries) == 2 and report.warnings == ()
    assert not list(tmp_path.glob(".compared*"))


def test_examples_that_cannot_be_judged_end_it_at_the_first_merge(fields: Mapping[str, Any], tmp_path: Path) -> None:
    asked = on_sets(fields, tmp_path, "BBBC", parents=False)
    (tmp_path / "select.jsonl").write_text('{"text": "A B"}\n{"text": 5}\n')
    with pytest.raises(WorkError, match=r"scale 1 could not be scored: .*has 5 as the text of example 2"):
        compare(asked, out=tmp_path / "compared")


def test_examples_of_the_report_are_read_before_any_merge_is_made(
    fields: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = on_sets(fields, tmp_path, "BBBC")
    (tmp_path / "report.jsonl").write_text('{"text": "A B"}\n{"text": 5}\n')
    monkeypatch.delattr(run.ComparisonRun, "_score")
    with pytest.raises(RequestError, match="has 5 as the text of example 2"):
        compare(asked, out=tmp_path / "compared")
    assert not list(tmp_path.glob(".compared*"))


def test_a_branch_that_moves_meanwhile_changes_nothing(
    home_hub: LoopbackHub, fields: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models are looked up once, however many merges are made of them."""
    repo = f"demo/{uuid4().hex[:12]}-moving"
    first = home_hub.add_repo(repo, {path.name: path for path in (tmp_path / "b").iterdir()})
    score = run.ComparisonRun._score

    def moving(self: Any, cell: Any) -> ModelScores:
        home_hub.add_repo(repo, {"model.safetensors": tmp_path / "base" / "model.safetensors"})
        return score(self, cell)

    monkeypatch.setattr(run.ComparisonRun, "_score", moving)
    asked = on_sets(fields, tmp_path, "BBBC") | {"finetuned": [repo, str(tmp_path / "c")]}
    since = len(home_hub.requests)
    compare(asked, out=tmp_path / "compared")
    assert load_recipe(tmp_path / "compared" / "best.yaml")["finetuned"][0]["ref"] == f"{repo}@{first}"
    assert sum(one.path.startswith(f"/api/models/{repo}") for one in home_hub.requests[since:]) == 1


def test_one_merge_that_cannot_be_made_ends_nothing(fields: Mapping[str, Any], tmp_path: Path) -> None:
    grid = {"scale": [1e39, 1], "method": ["average"]}
    report = compare({**fields, "compare": {**fields["compare"], "grid": grid}}, out=tmp_path / "compared")
    assert [entry.label for entry in report.entries] == ["average, scale 1"]
    (warning,) = report.warnings
    assert warning.startswith("average, scale 1e+39 could not be merged: ")


def test_scores_on_the_examples_that_decided_are_warned_of(fields: dict[str, Any], tmp_path: Path) -> None:
    grid = {"method": ["average"]}
    asked = {**fields, "compare": {**fields["compare"], "grid": grid}, "evaluate": None}
    report = compare(asked, out=tmp_path / "compared")
    assert "on examples that it was chosen by" in report.warnings[0]


def test_trials_find_the_best_of_a_large_grid(fields: Mapping[str, Any], tmp_path: Path) -> None:
    grid = {"scale": [-1, -0.5, 1], "method": ["locstitch", "average", "task-arithmetic"], "density": [0.4, 0.6, 1.0]}
    asked = {**fields, "compare": {**fields["compare"], "grid": grid, "trials": 6}}
    report = compare(asked, out=tmp_path / "compared")
    assert 1 < len(report.entries) <= 6 and report.chosen.mean == max(shares(report).values())
    again = compare(asked, out=tmp_path / "again")
    assert shares(again) == shares(report)


def test_the_best_is_pushed_with_the_comparison_on_its_card(
    home_hub: LoopbackHub, fields: Mapping[str, Any], tmp_path: Path
) -> None:
    target = f"demo/{uuid4().hex[:12]}-best"
    report = compare(
        {**fields, "compare": {**fields["compare"], "grid": {"density": [0.5, 1.0]}}},
        out=tmp_path / "compared", push_to=target,
    )  # fmt: skip
    assert report.commit is not None and str(report.url).endswith(target)
    files = home_hub.files(target)
    card = Path(hf_hub_download(target, "README.md")).read_text("utf-8")
    assert (
        0 < card.index("## Use") < card.index("## Evaluation") < card.index("## Comparison") < card.index("| density |")
    )
    assert card.index("| density |") < card.index("## Settings")
    assert "figures/comparison.png" in files
    assert verify(target, base=fields["base"], finetuned=fields["finetuned"]).ok


def test_another_merge_is_pushed_where_one_could_not_be(
    home_hub: LoopbackHub, fields: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, asked = f"demo/{uuid4().hex[:12]}-best", on_sets(fields, tmp_path, "BBBC") | {"figures": False}

    def best_of(density: float) -> ComparisonReport:
        compared = asked["compare"] | {"grid": {"density": [density]}}
        return compare(asked | {"compare": compared}, out=tmp_path / "compared", push_to=target)

    def refused(*_: Any) -> None:
        raise PublishError("the Hub is gone.")

    with monkeypatch.context() as patch:
        patch.setattr("hf_locstitch.report.publish.Upload.commit", refused)
        with pytest.raises(PublishError, match=r"the Hub is gone\."):
            best_of(0.5)
    assert best_of(0.25).commit == home_hub.head(target)
    assert not (tmp_path / "home" / "hf-locstitch" / target.replace("/", "--")).exists()


def test_wrong_requests(fields: dict[str, Any], tmp_path: Path) -> None:
    def refused(message: str, **compared: Any) -> None:
        with pytest.raises(RecipeError, match=message):
            compare({**fields, "compare": {**fields["compare"], **compared}}, out=tmp_path / "compared")

    refused("differ in 'densty' .did you mean 'density'", grid={"densty": [0.1]})
    refused("no values to try for scale", grid={"scale": []})
    refused("unknown method 'tise'", grid={"method": ["tise"]})
    refused("more than 1,000", grid={"scale": [n / 2000 for n in range(2000)]})
    refused("5 % is 0.05", grid={"density": [5]})
    with pytest.raises(RecipeError, match="does not say what to compare"):
        compare({**fields, "compare": None}, out=tmp_path / "compared")
    (tmp_path / "compared").mkdir()
    (tmp_path / "compared" / "file").write_text("")
    with pytest.raises(OutputError, match="not an empty folder"):
        compare(fields, out=tmp_path / "compared")


def test_the_command_plans_and_prints(
    fields: Mapping[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    command = ["compare", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "compared")]
    assert main([*command, "--dry-run"]) == 2  # strangers' task files can run any code
    assert "--allow-task-code" in capsys.readouterr().err
    assert main([*command, "--dry-run", "--allow-task-code"]) == 0
    planned = capsys.readouterr().out
    assert "merges     10" in planned and "ties, density 0.5, scale 1" in planned
    assert "cost       to download: 0 B, read for each merge: " in planned
    assert not (tmp_path / "compared").exists()
    assert main([*command, "--json", "--quiet", "--allow-task-code"]) == 0
    printed, said = capsys.readouterr()
    assert json.loads(printed)["by"] == "mean" and said == ""
    shutil.rmtree(tmp_path / "compared")


def answering(path: Path, letters: str) -> str:
    """A set whose second words are these."""
    return str(write_jsonl(path, [{"text": f"A {letter}"} for letter in letters]))


def on_sets(fields: Mapping[str, Any], tmp_path: Path, select: str, **options: Any) -> dict[str, Any]:
    """Compared with one sign and the other, by exact match on one file of answers, and reported on another."""
    files = {name: answering(tmp_path / f"{name}.jsonl", letters) for name, letters in
             (("select", select), ("report", "BBC"))}  # fmt: skip
    asked, reported = ({"data": {name: file}, "metrics": ["exact-match"]} for name, file in files.items())
    return {**fields, "compare": {"grid": {"scale": [1, -1]}, "select": {**asked, **options}}, "evaluate": reported}


def test_other_examples_in_the_same_file_are_scored_anew(
    fields: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a killed run has scored the first merge."""
    asked, make, made = on_sets(fields, tmp_path, "BBBC"), run.make, []

    def stopping(plan: Any, out: Path, progress: Any) -> Any:
        made.append(plan)
        if len(made) == 2:
            raise OSError("gone")
        return make(plan, out, progress)

    monkeypatch.setattr(run, "make", stopping)
    with pytest.raises(OSError, match="gone"):
        compare(asked, out=tmp_path / "compared")
    answering(tmp_path / "select.jsonl", "ACCC")
    report = compare(asked, out=tmp_path / "compared")
    assert [entry.scores.results[0].main.value for entry in report.entries] == [0.0, 0.25]


def test_scores_stay_what_they_are_where_no_finetune_has_any(fields: Mapping[str, Any], tmp_path: Path) -> None:
    report = compare(on_sets(fields, tmp_path, "AAA"), out=tmp_path / "compared")
    assert shares(report) == {"scale 1": 0.0, "scale -1": 1.0} and not report.relative
    assert "by the mean score over the tasks" in report.section() and "100.0 %" not in report.section()


def test_slices_of_a_split_are_the_same_examples_unless_they_share_no_row() -> None:
    half = run.Examples("org/set", "a", "test[:50%]")
    assert all(run.may_be_same(half, half._replace(split=split)) for split in ("test[40%:]", "test"))
    for other in ({"split": "test[50%:]"}, {"split": "train"}, {"config": "b"}, {"data": "org/other"}):
        assert not run.may_be_same(half, half._replace(**other))
    for unknown in ({"split": None}, {"config": None}, {"config": None, "data": "Org/Set"}):  # as of a group of tasks
        assert run.may_be_same(half, half._replace(**unknown)) and run.may_be_same(half._replace(**unknown), half)
    task = run.Examples("letters")
    assert run.may_be_same(task, task) and not run.may_be_same(task, run.Examples("others"))


def test_slices_of_a_file_are_the_same_examples_unless_they_share_no_row(tmp_path: Path) -> None:
    file = str(write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}]))

    def of(split: str) -> set[run.Examples]:
        result = TaskResult("rows", None, None, 1, (), split=split)
        return run.examples_of([result], EvaluateOptions(data={"rows": {"ref": file, "split": split}}))

    def same(one: str, other: str) -> bool:
        return any(run.may_be_same(*pair) for pair in product(of(one), of(other)))

    assert not same("test[:50%]", "test[50%:]") and same("test[:50%]", "train[40%:]") and same("test", "validation")


def test_a_plan_says_what_should_not_decide_and_which_combination_cannot_be(
    fields: Mapping[str, Any], tmp_path: Path
) -> None:
    asked, rows = on_sets(fields, tmp_path, "BBBC"), str(tmp_path / "select.jsonl")
    with_data = {**asked, "localizer": "saliency", "data": [rows, rows]}
    planned = plan_comparison(with_data, None, None, "request")
    (warning,) = planned.warnings
    assert warning.startswith("compare.select: select is named like ") and warning in planned.describe()
    grid = {"localizer": ["magnitude", "joint"]}
    with pytest.raises(RecipeError, match=r"combination \(joint\): the values under a joint mask are solved"):
        plan_comparison({**asked, "compare": {**asked["compare"], "grid": grid}}, None, None, "request")


def test_shares_of_scores_of_both_kinds() -> None:
    def scored(role: Any, accuracy: float, loss: float) -> ModelScores:
        metrics = {"acc": Score("accuracy", accuracy), "loss": Score("loss", loss, higher_is_better=False)}
        results = tuple(TaskResult(task, None, None, 1, (score,)) for task, score in metrics.items())
        return ModelScores(f"{role} {accuracy}", role, "", "", results)

    finetunes = (scored("finetuned", 0.8, 3.0), scored("finetuned", 0.5, 2.0))
    assert shares_of(scored("model", 0.4, 4.0), finetunes) == {"acc": 0.5, "loss": 0.5}
    assert shares_of(scored("model", -0.4, 4.0), finetunes) == {"acc": -0.5, "loss": 0.5}  # a correlation
    for references in ((), (scored("finetuned", 0.0, 2.0),), (scored("average", 0.8, 2.0),)):
        assert shares_of(scored("model", 0.4, 4.0), references) == {"acc": 0.4, "loss": -4.0}


def test_the_same_file_is_known_under_another_path(
    fields: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = on_sets(fields, tmp_path, "BBBC")
    shutil.copy(tmp_path / "select.jsonl", tmp_path / "copied.jsonl")
    monkeypatch.chdir(tmp_path)
    asked["evaluate"] = {"data": {"report": "./copied.jsonl"}}
    assert compare(asked, out=tmp_path / "compared").same_examples


def test_a_finetune_may_be_called_average(fields: Mapping[str, Any], tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "c", tmp_path / "average")
    asked = on_sets(fields, tmp_path, "BBBC", average=True) | {
        "finetuned": [str(tmp_path / one) for one in ("average", "b")]
    }
    found = compare(asked, out=tmp_path / "compared").references
    assert [(model.role, model.results[0].main.value) for model in found] == [
        ("base", 0.0), ("finetuned", 0.25), ("finetuned", 0.75), ("average", 0.75),
    ]  # fmt: skip


def test_a_score_that_is_no_number_is_not_chosen(
    fields: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = run.ComparisonRun._score

    def overflowing(self: Any, cell: Any) -> ModelScores:
        found = score(self, cell)
        if cell.label != "scale 1":
            return found
        (result,) = found.results
        return replace(found, results=(replace(result, scores=(Score("exact-match", float("nan")),)),))

    monkeypatch.setattr(run.ComparisonRun, "_score", overflowing)
    report = compare(on_sets(fields, tmp_path, "BBBC"), out=tmp_path / "compared")
    assert report.chosen.label == "scale -1" and "exact-match of select is nan" in report.warnings[0]


def test_localizers_with_data_beside_others(fields: Mapping[str, Any], tmp_path: Path) -> None:
    asked: dict[str, Any] = on_sets(fields, tmp_path, "BBBC") | {"data": [str(tmp_path / "report.jsonl")] * 2}

    def planned(*localizers: str) -> list[int]:
        compared = asked["compare"] | {"grid": {"localizer": localizers}}
        cells = plan_comparison(asked | {"compare": compared}, None, None, "request").cells.values()
        return [len(cell.recipe.data) for cell in cells]

    assert planned("magnitude", "saliency") == [0, 2]
    with pytest.raises(RecipeError, match="data is given, but only"):
        planned("magnitude")


def test_data_sets_of_the_best_are_pinned(home_hub: LoopbackHub, fields: Mapping[str, Any], tmp_path: Path) -> None:
    repo = f"demo/{uuid4().hex[:12]}-rows"
    add_data_set(home_hub, repo, {"default": {"train": [{"text": "A B"}, {"text": "A C"}]}})
    asked = on_sets(fields, tmp_path, "BBBC") | {
        "localizer": "saliency",
        "data": [repo, str(tmp_path / "report.jsonl")],
    }
    compare(asked, out=tmp_path / "compared")
    best = load_recipe(tmp_path / "compared" / "best.yaml")
    assert [one["ref"].partition("@")[0] for one in best["data"].values()] == [repo, str(tmp_path / "report.jsonl")]
    assert len(best["data"]["b"]["ref"].partition("@")[2]) == 40
