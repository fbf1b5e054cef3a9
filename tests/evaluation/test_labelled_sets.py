"""Labelled sets: which rows are judged, what is refused, cached, warned of and published."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from helpers.data import write_jsonl
from helpers.language_models import LOGIT, WORDS, favouring
from huggingface_hub import ModelCard, parse_eval_result_entries

from hf_locstitch import evaluate, merge_from_hub
from hf_locstitch.errors import RecipeError, RequestError
from hf_locstitch.evaluation import judged_model, labelled_suite
from hf_locstitch.evaluation.report import EvaluationReport
from hf_locstitch.tasks.evaluation_sets import EvaluationSet, named_sets, open_evaluation_set
from loopback_hub import LoopbackHub

Run = Callable[..., tuple[int, str, str]]


def answers(path: Path, letters: str) -> Path:
    """Texts of two words, of which a model is asked for the second alone, as no first word is ever predicted."""
    rows = [{"text": f"A {letter}", "number": number} for number, letter in enumerate(letters)]
    return write_jsonl(path, rows)


def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by the label of every model that is loaded from now on."""
    loaded: list[str] = []
    load = judged_model.open_judged_model

    def noting(*args: Any) -> Any:
        loaded.append(args[-1])
        return load(*args)

    monkeypatch.setattr(judged_model, "open_judged_model", noting)
    return loaded


def exact(report: EvaluationReport) -> dict[str, float]:
    found = {}
    for model in report.models:
        score = model.score("letters", "exact-match")
        assert score is not None
        found[model.name] = score.value
    return found


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """The second words are A, B and C in one, six and three of ten."""
    return answers(tmp_path / "letters.jsonl", "ABBBBBBCCC")


def test_known_scores_side_by_side(run: Run, letters: Path, a: Path, b: Path) -> None:
    asked = ["evaluate", b, "--data", letters, "--base", a, "--ft", b, "--average", "--json"]
    status, out, err = run(*asked)
    assert status == 0 and err == ""
    report = json.loads(out)
    values = {model["name"]: model["results"][0]["scores"] for model in report["models"]}
    assert {name: scores[1]["value"] for name, scores in values.items()} == {
        "base": 0.1, "b": 0.6, "average": 0.6, "./b": 0.6,
    }  # fmt: skip
    mass = math.exp(LOGIT)
    total = math.log(mass + len(WORDS) - 1)
    assert values["b"][0]["value"] == pytest.approx(total - 0.6 * LOGIT, 1e-6)
    assert [score["metric"] for score in values["b"]] == ["loss", "exact-match"]
    assert report["comparisons"]["./b"]["letters"]["exact-match"]["difference"] == pytest.approx(0.5)
    assert report["flags"][0] == "--data" and str(letters) not in out


def test_known_scores_are_not_measured_again(
    letters: Path, a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loads(monkeypatch)
    first, again = evaluate(a, data=[letters]), evaluate(a, data=[letters])
    assert loaded == ["./a"] and again.models[0].cached == 1 and first.models[0].results == again.models[0].results
    evaluate(a, data=[letters], limit=5)
    evaluate(a, data={"letters": {"ref": str(letters), "where": {"number": [0, 1]}}})
    evaluate(a, data=[letters], objective={"kind": "causal-lm", "max_length": 8})
    assert len(loaded) == 4
    assert exact(evaluate(a, data=[answers(letters, "AAAC")])) == {"a": 0.75} and len(loaded) == 5
    favouring(a, "C")
    assert exact(evaluate(a, data=[letters])) == {"a": 0.25} and len(loaded) == 6


def test_rows_are_chosen_and_labels_mapped(letters: Path, a: Path) -> None:
    some = {"letters": {"ref": str(letters), "where": {"number": [0, 1, 2, 3]}}}
    assert exact(evaluate(a, data=some)) == {"a": 0.25}
    few = evaluate(a, data=[letters], limit=4)
    assert few.models[0].results[0].examples == 4 == few.limit and "of only 4 drawn examples" in few.warnings[0]
    assert evaluate(a, data=[letters], limit=11).warnings == ()


def test_sets_have_names() -> None:
    assert named_sets(["./x/cola.jsonl", "sst2=org/sst2@main", "org/rte"]) == {
        "cola": "./x/cola.jsonl", "sst2": "org/sst2@main", "rte": "org/rte",
    }  # fmt: skip
    with pytest.raises(RecipeError, match="two sets are named 'a'"):
        named_sets(["a.jsonl", "b/a.csv"])


def test_a_file_of_sets(run: Run, letters: Path, b: Path, tmp_path: Path) -> None:
    sets = tmp_path / "sets.yaml"
    fields = {"letters": {"ref": str(letters), "metrics": ["exact-match"], "objective": {"kind": "causal-lm"}}}
    sets.write_text(yaml.safe_dump(fields))
    status, out, _ = run("evaluate", b, "--data", sets, "--json")
    (result,) = json.loads(out)["models"][0]["results"]
    assert status == 0 and [score["metric"] for score in result["scores"]] == ["exact-match"]
    sets.write_text("- letters")
    status, _, err = run("evaluate", b, "--data", sets)
    assert status == 2 and "must map names to sets" in err


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--data", "nowhere.jsonl"], "Check the path"),
        (["--data", "{letters}", "--metrics", "accuracy"], "accuracy is not defined for causal-lm"),
        (["--data", "{letters}", "--objective", "features"], "nothing is right or wrong under features"),
        (["--data", "{letters}", "--objective", "causal"], "causal"),
        (["--data", "{letters}", "--objective", "masked-lm"], "label_words"),
        (["--data", "{letters}", "--tasks", "letters"], "both named 'letters'"),
        (["--data", "{letters}", "--objective", "sequence-classification"], "LlamaForCausalLM, which has no head"),
    ],
)
def test_what_is_refused(run: Run, letters: Path, a: Path, asked: list[str], words: str) -> None:
    status, out, err = run("evaluate", a, *(str(one).format(letters=letters) for one in asked))
    assert status == 2 and out == "" and words in err and err.count("\n") == 1, err


def add_set(hub: LoopbackHub, name: str, splits: dict[str, str]) -> str:
    """A data set on the Hub: split -> letters."""
    repo = f"demo/{uuid4().hex[:12]}-{name}"
    files = {f"{s}.jsonl": "".join(json.dumps({"text": f"A {x}"}) + "\n" for x in them) for s, them in splits.items()}
    named = [{"split": split, "path": f"{split}.jsonl"} for split in splits]
    head = yaml.safe_dump({"configs": [{"config_name": "default", "data_files": named}]}, sort_keys=False)
    hub.add_repo(repo, {"README.md": f"---\n{head}---\n", **files}, repo_type="dataset")
    return repo


def test_the_test_split_or_what_there_is(home_hub: LoopbackHub, a: Path) -> None:
    both = add_set(home_hub, "both", {"train": "CC", "validation": "AA", "test": "AB"})
    assert open_evaluation_set(EvaluationSet(ref=both))[0].asked.split == "test"
    less = add_set(home_hub, "less", {"train": "CC", "validation": "AA"})
    opened, note = open_evaluation_set(EvaluationSet(ref=less))
    assert opened.asked.split == "validation" and note == "it has no split test: validation is judged"
    report = evaluate(a, data={"letters": less})
    assert exact(report) == {"a": 1.0} and report.warnings == ("letters: it has no split test: validation is judged",)
    with pytest.raises(RequestError, match="no split 'dev': it has train, validation"):
        open_evaluation_set(EvaluationSet(ref=less, split="dev"))


def test_pushed_scores(home_hub: LoopbackHub, published: str, run: Run, letters: Path) -> None:
    dataset = add_set(home_hub, "set", {"test": "BBBC"})
    asked = ["--data", f"set={dataset}", letters, "--metrics", "exact-match", "--parents", "--push"]
    status, _, err = run("evaluate", published, *asked)
    assert status == 0, err
    card = ModelCard(home_hub.read(published, "README.md").decode())
    data: Any = card.data
    found = {
        (entry.metric_name, entry.metric_value, entry.dataset_type, entry.metric_type) for entry in data.eval_results
    }
    assert found == {
        ("set exact-match", 0.75, dataset, "exact_match"), ("letters exact-match", 0.6, "letters", "exact_match"),
    }  # fmt: skip
    assert "Measured with hf-locstitch" in card.text and "lm-eval" not in card.text
    assert f"**set**: causal-lm, 4 rows of {dataset}" in card.text and "--data sets.yaml" in card.text
    (entry,) = parse_eval_result_entries(yaml.safe_load(home_hub.read(published, ".eval_results/set.yaml")))
    assert (entry.dataset_id, entry.task_id, entry.value) == (dataset, "set", 0.75)
    assert entry.notes is not None and entry.notes.startswith("exact-match, causal-lm")
    assert run("verify", published)[0] == 0
    assert str(letters.parent) not in card.text
    snippet = card.text.partition("```yaml\n")[2].partition("```")[0]
    repeated = EvaluationSet.model_validate(yaml.safe_load(snippet)["set"])
    assert repeated.ref == f"{dataset}@{home_hub.head(dataset, repo_type='dataset')}"


def test_the_card_repeats_which_models_were_compared(run: Run, letters: Path, a: Path, b: Path) -> None:
    status, _, err = run("evaluate", b, "--data", letters, "--base", a, "--ft", b, a, "--average", "--push")
    assert status == 0, err
    command = (b / "README.md").read_text().partition("hf-locstitch evaluate")[2].partition("```")[0]
    assert " ".join(command.split()) == "./b \\ --data sets.yaml \\ --base ./a \\ --ft ./b ./a \\ --average"


def test_a_merge_is_judged_by_its_recipe(a: Path, b: Path, letters: Path, run: Run, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    fields = {
        "base": str(a), "finetuned": [{"ref": str(b), "name": "letters"}], "include": ["*"], "figures": False,
        "localizer": {"density": 1.0}, "evaluate": {"data": {"letters": str(letters)}, "average": True},
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump(fields))
    status, _, err = run("merge", recipe, "--out", out)
    assert status == 0 and "exact-match" in err, err
    assert "| letters | exact-match | 0.100" in (out / "README.md").read_text()
    for wrong, words in [
        ({"data": {"letters": {"ref": str(letters), "head": "nobody"}}}, "'nobody', which is no input"),
        ({"data": {"letters": {"ref": str(letters), "heads": "letters"}}}, "did you mean 'head'"),
        ({"data": {"letters": str(letters)}, "metrics": ["acc"]}, "unknown metric 'acc'"),
    ]:
        recipe.write_text(yaml.safe_dump({**fields, "evaluate": wrong}))
        status, _, err = run("merge", recipe, "--out", tmp_path / "other", "--quiet")
        assert status == 2 and words in err and not (tmp_path / "other").exists(), err
        assert run("merge", recipe, "--dry-run", "--quiet")[0] == 2  # refuses what the run refuses


def test_rows_that_masks_were_found_with_are_warned_of(a: Path, b: Path, letters: Path, tmp_path: Path) -> None:
    """By the hash of a file, where a pinned recipe tells no more; another split of a data set is no leak."""
    merge_from_hub(a, [b], out=tmp_path / "out", data=[str(letters)], figures=False,
                   localizer={"method": "saliency", "density": 0.5})  # fmt: skip
    (warning,) = evaluate(tmp_path / "out", data={"mine": str(letters)}).warnings
    assert "mine is evaluated on letters.jsonl, with which masks were found" in warning
    other = answers(tmp_path / "unlike.jsonl", "CC")
    assert evaluate(tmp_path / "out", data=[other]).warnings == ()


def test_a_language_model_needs_no_finetune_for_its_set(a: Path, b: Path, letters: Path, tmp_path: Path) -> None:
    """The finetune of the set's name is not to be had, but each language model has a head of its own."""
    merge_from_hub(a, [b], names=["letters"], out=tmp_path / "out", figures=False)
    shutil.rmtree(b)
    assert exact(evaluate(tmp_path / "out", data=[letters])) == {"out": 0.1}


def test_a_part_of_a_set_without_answers_is_left_out(a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of one word has none; a set of such texts is refused."""
    monkeypatch.setattr(labelled_suite, "BLOCK", 2)
    rows = [{"text": text} for text in ("A A", "A B", "A", "B", "A C")]
    report = evaluate(a, data=[write_jsonl(tmp_path / "letters.jsonl", rows)])
    assert exact(report) == {"a": pytest.approx(1 / 3)} and report.models[0].results[0].left_out == 2
    with pytest.raises(RequestError, match="none of the 2 examples of letters has an answer"):
        evaluate(a, data=[write_jsonl(tmp_path / "letters.jsonl", rows[2:4])])


@pytest.mark.parametrize("texts", [("A B", None), (8, 7)])
def test_rows_without_a_text_are_refused(texts: tuple[Any, Any], a: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "letters.jsonl", [{"text": text} for text in texts])
    with pytest.raises(RequestError, match=r"None as the text of example 2|8 as the text of example 1"):
        evaluate(a, data=[rows])
