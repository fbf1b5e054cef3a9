"""`evaluate` on models whose scores are known by construction, with the real lm-eval and the real client."""

from __future__ import annotations

import json
import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from language_models import add_benchmark, favouring, local_task
from models import finetune, random_state, save

from hf_locstitch import evaluate, merge_from_hub
from hf_locstitch.cli.main import main
from hf_locstitch.errors import PublishError, TaskError, WorkError
from hf_locstitch.evaluation import harness
from hf_locstitch.evaluation.cache import cache_folder
from loopback_hub import Fault, LoopbackHub

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Of ten questions the answers are A, B and C in one, six and three."""
    return local_task(tmp_path / "tasks", "letters", "ABBBBBBCCC")


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return favouring(tmp_path / "a", "A")


@pytest.fixture
def b(tmp_path: Path) -> Path:
    return favouring(tmp_path / "b", "B", seed=1)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*args: object) -> tuple[int, str, str]:
        status = main([str(arg) for arg in args])
        return status, *capsys.readouterr()

    return run


def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by the label of every model that is loaded from now on."""
    loaded: list[str] = []
    load = harness.load_model

    def noting(folder: Path, label: str, *rest: Any) -> Any:
        loaded.append(label)
        return load(folder, label, *rest)

    monkeypatch.setattr(harness, "load_model", noting)
    return loaded


def test_exact_scores_side_by_side(run: Run, tasks: Path, a: Path, b: Path, tmp_path: Path) -> None:
    c = favouring(tmp_path / "c", "C", seed=2)
    status, out, err = run(
        "evaluate", c, "--tasks", "letters:1", "--include-path", tasks, "--base", a, "--ft", b, "--json"
    )
    assert status == 0 and err == ""
    report = json.loads(out)
    values = {model["name"]: model["results"][0]["scores"][0] for model in report["models"]}
    assert {name: score["value"] for name, score in values.items()} == {"base": 0.1, "b": 0.6, "c": 0.3}
    assert values["c"]["stderr"] == pytest.approx((0.3 * 0.7 / 9) ** 0.5)
    (beside,) = report["comparisons"]["c"]["letters"].values()
    assert beside["difference"] == pytest.approx(0.2) and beside["kept"] == pytest.approx(0.5)
    assert report["models"][0]["results"][0]["shots"] == 1 and report["models"][0]["results"][0]["examples"] == 10


def test_known_scores_are_not_measured_again(
    tasks: Path, a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loads(monkeypatch)
    first = evaluate(a, tasks=["letters"], include_path=tasks)
    again = evaluate(a, tasks=["letters"], include_path=tasks)
    copy = evaluate(shutil.copytree(a, tmp_path / "copy"), tasks=["letters"], include_path=tasks)
    assert loaded == ["./a"] and again.models[0].cached == copy.models[0].cached == 1
    assert again.models[0].results == first.models[0].results == copy.models[0].results

    evaluate(a, tasks=["letters"], include_path=tasks, cache=False)
    evaluate(a, tasks=["letters:1"], include_path=tasks)
    limited = evaluate(a, tasks=["letters"], include_path=tasks, limit=5)
    assert len(loaded) == 4 and limited.models[0].results[0].main.value == 0.2
    assert limited.models[0].results[0].examples == 5 and "first 5 examples" in limited.warnings[0]


def test_changed_content_is_measured_again(tasks: Path, a: Path) -> None:
    assert evaluate(a, tasks=["letters"], include_path=tasks).models[0].results[0].main.value == 0.1
    favouring(a, "C")  # in the same place
    assert evaluate(a, tasks=["letters"], include_path=tasks).models[0].results[0].main.value == 0.3
    config = json.loads((a / "tokenizer_config.json").read_text())
    (a / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 512}))
    assert evaluate(a, tasks=["letters"], include_path=tasks).models[0].cached == 0
    local_task(tasks, "letters", "CCCC")
    assert evaluate(a, tasks=["letters"], include_path=tasks).models[0].results[0].main.value == 1.0


def test_a_damaged_cache_is_no_harm(tasks: Path, a: Path) -> None:
    evaluate(a, tasks=["letters"], include_path=tasks)
    (kept,) = cache_folder().iterdir()
    kept.write_text("[{}]")
    assert evaluate(a, tasks=["letters"], include_path=tasks).models[0].results[0].main.value == 0.1


def test_a_plain_average_is_made_on_the_fly(tasks: Path, a: Path, b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of two that favour B, and of one that favours B and one that favours A (a draw: the first wins)."""
    loaded = loads(monkeypatch)
    report = evaluate(b, tasks=["letters"], include_path=tasks, base=a, finetuned=[b, a], average=True)
    values = {(model.name, model.role): model.results[0].main.value for model in report.models}
    assert values == {
        ("base", "base"): 0.1, ("b", "finetuned"): 0.6, ("a", "finetuned"): 0.1, ("average", "average"): 0.1,
        ("./b", "model"): 0.6,
    }  # fmt: skip
    assert report.subject.name == "./b"
    count = len(loaded)
    evaluate(b, tasks=["letters"], include_path=tasks, base=a, finetuned=[b, a], average=True)
    assert len(loaded) == count  # nor is the average made again


@pytest.fixture
def published(home_hub: LoopbackHub, a: Path, b: Path, tmp_path: Path) -> str:
    """A merge on the Hub that has all of b, which favours B."""
    run_id = uuid4().hex[:12]
    for name, folder in {"base": a, "words": b}.items():
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# parent\n")
        home_hub.add_repo(f"demo/{run_id}-{name}", {file.name: file for file in folder.iterdir()})
    merge_from_hub(
        f"demo/{run_id}-base", [f"demo/{run_id}-words"], names=["words"], push_to=f"demo/{run_id}-merged",
        include=["*"], localizer={"density": 1.0},
    )  # fmt: skip
    return f"demo/{run_id}-merged"


@pytest.mark.figures
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
    assert card.text.count("## Evaluation") == 1 and "figures/scores.png" in card.text

    (entry,) = parse_eval_result_entries(yaml.safe_load(home_hub.read(published, ".eval_results/bench.yaml")))
    assert (entry.dataset_id, entry.task_id, entry.value) == (dataset, "bench", 0.6)
    assert entry.dataset_revision == home_hub.head(dataset, repo_type="dataset")
    assert entry.notes is not None and entry.notes.startswith("acc, 2-shot")
    assert ".eval_results/letters.yaml" not in home_hub.files(published)  # its data are nobody else's

    assert run("verify", published)[0] == 0 and "wrong" not in run("verify", published)[2]
    favouring(tmp_path / "other", "C")
    status, _, _ = run("evaluate", published, *asked, "--limit", "5")
    card = ModelCard(home_hub.read(published, "README.md").decode())
    data = card.data
    assert status == 0 and card.text.count("## Evaluation") == 1 and "first 5 examples" in card.text
    assert {entry.metric_value for entry in data.eval_results} == {0.8} and len(data.eval_results) == 2


def test_the_card_can_be_run(published: str, home_hub: LoopbackHub) -> None:
    card = ModelCard(home_hub.read(published, "README.md").decode())
    snippets = re.findall("```python\n(.*?)```", card.text, re.DOTALL)
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(snippet, names)
    assert len(snippets) == 2 and type(names["model"]).__name__ == "LlamaForCausalLM"
    assert f"# {names['kept']:,}" in snippets[1] and names["kept"] == sum(
        mask.numel() for mask in names["mask"].values()
    )


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


def test_from_checkpoints_to_an_evaluated_page(
    home_hub: LoopbackHub, a: Path, b: Path, tasks: Path, run: Run, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    target = f"demo/{uuid4().hex[:12]}-merged"
    fields = {
        "base": str(a), "finetuned": [str(b)], "include": ["*"], "localizer": {"density": 1.0}, "push_to": target,
        "evaluate": {"tasks": ["letters"], "include_path": str(tasks), "average": True},
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump(fields))
    out = tmp_path / "out"
    status, _, err = run("merge", recipe, "--out", out)
    assert status == 0, err
    assert len(home_hub.commits(target)) == 2  # the repo's own first one, and all of ours together
    data: Any = ModelCard.load(out / "README.md").data
    assert [(entry.metric_name, entry.metric_value) for entry in data.eval_results] == [("letters acc", 0.6)]
    assert home_hub.read(target, "README.md") == (out / "README.md").read_bytes()
    assert str(tmp_path) not in (out / "README.md").read_text() + (out / "figures" / "scores.json").read_text()

    only = target.replace("merged", "only")
    assert run("merge", recipe, "--push-to", only, "--quiet")[0] == 0  # nothing but the scores stays here
    assert home_hub.read(only, "model.safetensors") == (out / "model.safetensors").read_bytes()
    assert b"## Evaluation" in home_hub.read(only, "README.md")
    assert [path.name for path in cache_folder().parent.iterdir()] == ["evaluations"]
    status, _, err = run("merge", recipe, "--push-to", only, "--no-cache")
    assert status == 2 and "Drop --no-cache" in err

    status, _, err = run("merge", recipe, "--out", out)  # a finished merge is recognised, its scores are known
    assert status == 0 and "measured   0 scores, 4 known" in err


def test_a_recipe_with_a_wrong_evaluation_writes_nothing(
    a: Path, b: Path, tasks: Path, run: Run, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    fields: dict[str, Any] = {"base": str(a), "finetuned": [str(b)]}
    for evaluation, words in [
        ({"tasks": ["lettres"], "include_path": str(tasks)}, "did you mean letters"),
        ({"task": ["letters"]}, "did you mean 'tasks'"),
        ({}, "neither tasks nor a suite"),
    ]:
        recipe.write_text(yaml.safe_dump({**fields, "evaluate": evaluation}))
        status, _, err = run("merge", recipe, "--out", tmp_path / "out", "--quiet")
        assert status == 2 and words in err, err
        assert not (tmp_path / "out").exists()


def test_a_failed_evaluation_keeps_the_merge(
    a: Path, b: Path, tasks: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    asked = {"tasks": ["letters"], "include_path": str(tasks)}
    recipe.write_text(yaml.safe_dump({"base": str(a), "finetuned": [str(b)], "evaluate": asked}))

    def fail(*_: Any) -> None:
        raise WorkError("the lights went out.")

    with monkeypatch.context() as patch:
        patch.setattr(harness, "load_model", fail)
        status, _, err = run("merge", recipe, "--out", tmp_path / "out")
    assert status == 1 and "the merge is complete in" in err and "lights" in err
    assert run("merge", recipe, "--out", tmp_path / "out")[0] == 0


def paragraph(result: tuple[int, str, str], status: int, *words: str) -> None:
    """One paragraph with these words, and that exit status."""
    got, out, err = result
    assert got == status and out == "", err
    assert err.startswith("hf-locstitch: error: ") and err.count("\n") == 1 and "Traceback" not in err
    for word in words:
        assert word in err, err


def test_unknown_task(run: Run, a: Path) -> None:
    paragraph(run("evaluate", a, "--tasks", "arc_eazy"), 2, "'arc_eazy'", "arc_easy")


def test_wrong_requests(run: Run, a: Path, tasks: Path, tmp_path: Path) -> None:
    paragraph(run("evaluate", a), 2, "--tasks NAME", "--suite")
    paragraph(run("evaluate", a, "--tasks", "mmlu:five"), 2, "NAME:SHOTS")
    paragraph(run("evaluate", a, "--tasks", "mmlu", "mmlu:5"), 2, "'mmlu' is named twice")
    paragraph(run("evaluate", a, "--tasks", "letters", "--include-path", tmp_path / "none"), 2, "is no folder")
    paragraph(run("evaluate", a, "--tasks", "letters", "--limit", "0"), 2, "--limit must be 1 or more")
    paragraph(run("evaluate", a, "--tasks", "letters", "--parents", "--include-path", tasks), 2, "is no merge")
    paragraph(
        run("evaluate", a, "--tasks", "letters", "--include-path", tasks, "--track", "wandb"), 2, "pip install wandb"
    )


def test_what_is_no_language_model(run: Run, tasks: Path, tmp_path: Path) -> None:
    state = finetune(random_state(0), 1)
    save(tmp_path / "toy", state)
    config = '{"model_type": "bert", "architectures": ["BertForMaskedLM"]}'
    save(tmp_path / "bert", state, config)
    asked = ["--tasks", "letters", "--include-path", tasks]
    paragraph(run("evaluate", tmp_path / "bert", *asked), 2, "BertForMaskedLM", "no language model")
    paragraph(run("evaluate", tmp_path / "toy", *asked), 2, "no language model")


def test_a_missing_tokenizer(run: Run, a: Path, tasks: Path) -> None:
    for file in a.glob("tokenizer*"):
        file.unlink()
    paragraph(
        run("evaluate", a, "--tasks", "letters", "--include-path", tasks), 2, "has no tokenizer", "save_pretrained"
    )


def test_a_model_that_does_not_load(run: Run, a: Path, tasks: Path) -> None:
    (a / "tokenizer.json").write_text("{}")
    paragraph(run("evaluate", a, "--tasks", "letters", "--include-path", tasks), 2, "cannot load ./a")


@pytest.mark.parametrize(
    ("size", "words"), [("16", "Try --batch-size 8"), ("1", "larger device"), ("auto", "Try --batch-size 16")]
)
def test_out_of_memory(run: Run, a: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch, size: str, words: str) -> None:
    import torch
    from lm_eval.models.huggingface import HFLM

    def exhausted(self: Any, *_: Any, **__: Any) -> None:
        self.batch_sizes = {0: 32} if size == "auto" else {}
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(HFLM, "_model_call", exhausted)
    asked = ["--tasks", "letters", "--include-path", tasks, "--batch-size", size]
    paragraph(run("evaluate", a, *asked), 1, "./a ran out of memory", words)


def test_a_gated_data_set(home_hub: LoopbackHub, a: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = add_benchmark(home_hub, tasks, "gated", "AB", gated=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(TaskError, match="gated dataset") as raised:
        evaluate(a, tasks=["gated"], include_path=tasks)
    assert dataset in str(raised.value) and "hf auth login" in str(raised.value)


def test_a_missing_data_set(home_hub: LoopbackHub, a: Path, tasks: Path, run: Run) -> None:
    (tasks / "letters.yaml").write_text(
        (tasks / "letters.yaml").read_text().replace("dataset_path: json", "dataset_path: demo/none")
    )
    asked = ["--tasks", "letters", "--include-path", tasks]
    paragraph(run("evaluate", a, *asked), 2, "demo/none", "dataset_path")


def test_no_network(home_hub: LoopbackHub, a: Path, tasks: Path, run: Run) -> None:
    add_benchmark(home_hub, tasks, "remote", "AB")
    home_hub.fail(Fault("reset", path="/datasets/", times=99))
    try:
        paragraph(run("evaluate", a, "--tasks", "remote", "--include-path", tasks), 1, "could not be fetched", "remote")
    finally:
        home_hub._faults._waiting.clear()


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_tracking(name: str, a: Path, b: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    fake = types.ModuleType(name)
    fake.init = lambda **fields: calls.append(("init", fields))  # type: ignore[attr-defined]
    fake.log = lambda metrics: calls.append(("log", metrics))  # type: ignore[attr-defined]
    fake.finish = lambda: calls.append(("finish", None))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, fake)
    evaluate(b, tasks=["letters"], include_path=tasks, base=a, track=name)  # type: ignore[arg-type]
    assert [call for call, _ in calls] == ["init", "log", "finish"] * 2
    assert [fields["name"] for call, fields in calls if call == "init"] == ["base", "b"]
    base, judged = (metrics for call, metrics in calls if call == "log")
    assert base["letters/acc"] == 0.1 and judged["letters/acc"] == 0.6 and "letters/acc_stderr" in judged


def test_the_leak_rule_reads_the_recipe(a: Path, tasks: Path) -> None:
    (a / "locstitch.yaml").write_text(
        "base: x\nfinetuned: [y]\nlocalizer: {method: saliency}\ndata: {y: {ref: somebody/letters, number: 8}}\n"
    )
    (warning,) = evaluate(a, tasks=["letters"], include_path=tasks).warnings
    assert "somebody/letters" in warning
