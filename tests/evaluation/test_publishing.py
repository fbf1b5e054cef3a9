"""Scores on model cards and on the Hub: those that are pushed, and those that a merge ends with."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from helpers.language_models import add_benchmark, favouring
from helpers.models import load
from huggingface_hub import HfApi, ModelCard, parse_eval_result_entries

from hf_locstitch import evaluate
from hf_locstitch.errors import PublishError, WorkError
from hf_locstitch.evaluation import harness
from hf_locstitch.evaluation.cache import cache_folder
from loopback_hub import LoopbackHub

Run = Callable[..., tuple[int, str, str]]


def test_pushed_scores_survive(home_hub: LoopbackHub, published: str, tasks: Path, run: Run, tmp_path: Path) -> None:
    dataset = add_benchmark(home_hub, tasks, "bench", "ABBBBBBCCC")
    commits = len(home_hub.commits(published))
    asked = ["--tasks", "letters", "bench:2", "--include-path", tasks, "--parents", "--push"]
    status, out, _ = run("evaluate", published, *asked)
    assert status == 0 and home_hub.head(published) in out
    assert len(home_hub.commits(published)) == commits + 1

    card = ModelCard(home_hub.read(published, "README.md").decode())
    data: Any = card.data
    found = {(entry.metric_name, entry.metric_value, entry.dataset_type) for entry in data.eval_results}
    assert found == {("letters acc", 0.6, "letters"), ("bench acc", 0.6, dataset)}
    assert data.license == "apache-2.0" and data.base_model_relation == "merge"
    assert "| letters (0-shot) | acc | 0.100<br>±" in card.text and "**0.600<br>±" in card.text
    assert (
        "It keeps 100 % of the best finetune's score, averaged over 2 tasks (at least 100 %, on letters)." in card.text
    )
    assert card.text.count("## Evaluation") == 1 and card.text.count("figures/scores.png") == 1
    assert "figures/layers.png" not in card.text  # the scores are at the top in its place
    assert 0 < card.text.index("figures/scores.png") < card.text.index("It keeps 100 %") < card.text.index("## Use")

    (entry,) = parse_eval_result_entries(yaml.safe_load(home_hub.read(published, ".eval_results/bench.yaml")))
    assert (entry.dataset_id, entry.task_id, entry.value) == (dataset, "bench", 0.6)
    assert entry.dataset_revision == home_hub.head(dataset, repo_type="dataset")
    assert entry.notes is not None and entry.notes.startswith("acc, 2-shot")
    assert ".eval_results/letters.yaml" not in home_hub.files(published)  # its data are nobody else's

    assert run("verify", published)[0] == 0 and "failed" not in run("verify", published)[2]
    favouring(tmp_path / "other", "C")
    status, _, _ = run("evaluate", published, *asked, "--limit", "5")
    card = ModelCard(home_hub.read(published, "README.md").decode())
    data = card.data
    assert status == 0 and card.text.count("## Evaluation") == 1 and "first 5 examples" in card.text
    assert "## Evaluation on the first 5 examples of each task" in card.text and "0-shot, first 5 examples" in card.text
    due = {("letters acc", 0.6), ("bench acc", 0.6)}  # those of all examples stay
    due |= {("letters acc, first 5 examples", 0.8), ("bench acc, first 5 examples", 0.8)}
    assert {(entry.metric_name, entry.metric_value) for entry in data.eval_results} == due
    (entry,) = parse_eval_result_entries(yaml.safe_load(home_hub.read(published, ".eval_results/bench.yaml")))
    assert entry.value == 0.6
    assert run("evaluate", published, *asked)[0] == 0
    data = ModelCard(home_hub.read(published, "README.md").decode()).data
    assert {(entry.metric_name, entry.metric_value) for entry in data.eval_results} == {
        ("letters acc", 0.6),
        ("bench acc", 0.6),
    }


def test_the_card_can_be_run(published: str, home_hub: LoopbackHub, a: Path, b: Path) -> None:
    card = ModelCard(home_hub.read(published, "README.md").decode())
    snippets = re.findall("```python\n(.*?)```", card.text, re.DOTALL)
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(snippet, names)
    assert len(snippets) == 2 and type(names["model"]).__name__ == "LlamaForCausalLM"
    base, words = load(a), load(b)
    changed = sum(int((words[name] != base[name]).sum()) for name in base)
    assert f"# {names['kept']:,}" in snippets[1] and names["kept"] == changed > 0


def test_scores_of_others_stay_in_the_card(a: Path, tasks: Path) -> None:
    (a / "README.md").write_text(
        "---\nlicense: mit\nmodel-index:\n- name: theirs\n  results:\n  - task: {type: text-generation}\n"
        "    dataset: {name: GSM8K, type: openai/gsm8k}\n    metrics: [{type: acc, value: 0.7, name: theirs}]\n---\n"
        "# A model\n\nAbout it.\n"
    )
    evaluate(a, tasks=["letters"], include_path=tasks, push=True)
    card = ModelCard.load(a / "README.md")
    data: Any = card.data
    assert [(entry.metric_name, entry.metric_value) for entry in data.eval_results] == [
        ("theirs", 0.7),
        ("letters acc", 0.1),
    ]
    assert "About it." in card.text and "<!-- evaluation -->" in card.text


def test_a_repo_that_moved_is_left_alone(
    home_hub: LoopbackHub, published: str, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_locstitch.evaluation import publishing

    record = publishing.record_in

    def slow(*args: Any) -> Any:
        home_hub.add_repo(published, {"moved.txt": "by somebody else"})
        return record(*args)

    monkeypatch.setattr(publishing, "record_in", slow)
    with pytest.raises(PublishError, match="moved from"):
        evaluate(published, tasks=["letters"], include_path=tasks, push=True)
    assert ".eval_results" not in str(home_hub.files(published)) and "figures/scores.png" not in home_hub.files(
        published
    )


def test_scores_of_a_branch_go_to_the_branch(home_hub: LoopbackHub, published: str, tasks: Path, run: Run) -> None:
    HfApi().create_branch(published, branch="next")
    main_head = home_hub.head(published)
    status, out, _ = run("evaluate", f"{published}@next", "--tasks", "letters", "--include-path", tasks, "--push")
    assert status == 0 and f"{published}/tree/next" in out
    assert home_hub.head(published) == main_head
    assert "## Evaluation" in home_hub.read(published, "README.md", revision="next").decode()


@pytest.mark.parametrize("kind", ["commit", "tag", "folder"])
def test_what_cannot_be_committed_to_is_refused_before_the_work(
    home_hub: LoopbackHub, published: str, a: Path, tasks: Path, run: Run, kind: str
) -> None:
    HfApi().create_tag(published, tag="v1")
    home_hub.add_repo(published, {f"part/{file.name}": file for file in a.iterdir()})
    ref, said = {
        "commit": (f"{published}@{home_hub.head(published)}", "is no branch of"),
        "tag": (f"{published}@v1", "v1 is no branch of"),
        "folder": (f"{published}/part", "only a part of"),
    }[kind]
    commits = len(home_hub.commits(published))
    status, _, err = run("evaluate", ref, "--tasks", "letters", "--include-path", tasks, "--push")
    assert status == 2 and said in err
    assert len(home_hub.commits(published)) == commits and not cache_folder().exists()


def test_from_checkpoints_to_an_evaluated_page(
    home_hub: LoopbackHub, a: Path, b: Path, tasks: Path, run: Run, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    target = f"demo/{uuid4().hex[:12]}-merged"
    fields = {
        "base": str(a), "finetuned": [str(b)], "include": ["*"], "localizer": {"density": 1.0}, "figures": False,
        "push_to": target,
        "evaluate": {"tasks": ["letters"], "include_path": str(tasks), "average": True},
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump(fields))
    out = tmp_path / "out"
    status, _, err = run("merge", recipe, "--out", out, "--allow-task-code")
    assert status == 0, err
    assert len(home_hub.commits(target)) == 2  # the repo's own first one, and all of ours together
    data: Any = ModelCard.load(out / "README.md").data
    assert [(entry.metric_name, entry.metric_value) for entry in data.eval_results] == [("letters acc", 0.6)]
    assert home_hub.read(target, "README.md") == (out / "README.md").read_bytes()
    assert str(tmp_path) not in (out / "README.md").read_text() + (out / "figures" / "scores.json").read_text()

    only = target.replace("merged", "only")
    assert (
        run("merge", recipe, "--push-to", only, "--quiet", "--allow-task-code")[0] == 0
    )  # nothing but the scores stays here
    assert home_hub.read(only, "model.safetensors") == (out / "model.safetensors").read_bytes()
    assert b"## Evaluation" in home_hub.read(only, "README.md")
    assert {path.name for path in cache_folder().parent.iterdir()} <= {"evaluations", "hashes", "loops"}
    status, _, err = run("merge", recipe, "--push-to", only, "--no-cache", "--allow-task-code")
    assert status == 2 and "Drop --no-cache" in err

    status, _, err = run(
        "merge", recipe, "--out", out, "--allow-task-code"
    )  # a finished merge is recognised, its scores are known
    assert status == 0 and "measured   0 scores, 4 more from the cache" in err


def test_a_recipe_with_a_wrong_evaluation_writes_nothing(
    a: Path, b: Path, tasks: Path, run: Run, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    fields: dict[str, Any] = {"base": str(a), "finetuned": [str(b)], "figures": False}
    for evaluation, words in [
        ({"tasks": ["lettres"], "include_path": str(tasks)}, "did you mean letters"),
        ({"task": ["letters"]}, "did you mean 'tasks'"),
        ({}, "set tasks, a suite or data"),
    ]:
        recipe.write_text(yaml.safe_dump({**fields, "evaluate": evaluation}))
        status, _, err = run("merge", recipe, "--out", tmp_path / "out", "--quiet", "--allow-task-code")
        assert status == 2 and words in err, err
        assert not (tmp_path / "out").exists()


def test_a_failed_evaluation_keeps_the_merge(
    a: Path, b: Path, tasks: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    asked = {"tasks": ["letters"], "include_path": str(tasks)}
    recipe.write_text(yaml.safe_dump({"base": str(a), "finetuned": [str(b)], "figures": False, "evaluate": asked}))

    def fail(*_: Any) -> None:
        raise WorkError("the lights went out.")

    with monkeypatch.context() as patch:
        patch.setattr(harness, "load_model", fail)
        status, _, err = run("merge", recipe, "--out", tmp_path / "out", "--allow-task-code")
    assert status == 1 and "is complete, but its evaluation failed" in err and "lights" in err
    assert run("merge", recipe, "--out", tmp_path / "out", "--allow-task-code")[0] == 0
