"""`evaluate` on models whose scores are known by construction, with the real lm-eval and the real client."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.language_models import add_benchmark, favouring, local_task
from helpers.models import finetune, random_state, save

from hf_locstitch import evaluate
from hf_locstitch.errors import TaskError
from hf_locstitch.evaluation import harness
from hf_locstitch.evaluation.cache import cache_folder
from loopback_hub import Fault, LoopbackHub

Run = Callable[..., tuple[int, str, str]]


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
    paragraph(run("evaluate", a, "--tasks", "mmlu", "mmlu:5"), 2, "'mmlu' is given twice")
    paragraph(run("evaluate", a, "--tasks", "letters", "--include-path", tmp_path / "none"), 2, "is not a folder")
    paragraph(run("evaluate", a, "--tasks", "letters", "--limit", "0"), 2, "--limit must be 1 or more")
    paragraph(
        run("evaluate", a, "--tasks", "letters", "--parents", "--include-path", tasks), 2, "not made by hf-locstitch"
    )
    paragraph(
        run("evaluate", a, "--tasks", "letters", "--include-path", tasks, "--track", "wandb"), 2, "pip install wandb"
    )


def test_what_is_no_language_model(run: Run, tasks: Path, tmp_path: Path) -> None:
    state = finetune(random_state(0), 1)
    save(tmp_path / "toy", state)
    config = '{"model_type": "bert", "architectures": ["BertForMaskedLM"]}'
    save(tmp_path / "bert", state, config)
    asked = ["--tasks", "letters", "--include-path", tasks]
    paragraph(run("evaluate", tmp_path / "bert", *asked), 2, "BertForMaskedLM", "not a language model")
    paragraph(run("evaluate", tmp_path / "toy", *asked), 2, "not a language model")


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
        paragraph(
            run("evaluate", a, "--tasks", "remote", "--include-path", tasks), 1, "could not be downloaded", "remote"
        )
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
