"""lm-eval's options through `evaluate` give, to the last digit and letter, what lm-eval gives on its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from demo.skills import make_tokenizer
from helpers.families import build, noisy

from hf_locstitch import evaluate
from hf_locstitch.errors import RecipeError
from hf_locstitch.evaluation import harness
from hf_locstitch.plan.recipe_file import check_task_code
from hf_locstitch.tasks.benchmarks import make_options

Run = Callable[..., tuple[int, str, str]]
TURNS = (
    "{% for m in messages %}{{ m['role'][0] }}={{ m['content'] }}{% endfor %}"
    + "{% if add_generation_prompt %}a={% endif %}"
)
ROWS = [{"q": f"copy {word}=", "a": word} for word in ("cab", "0718", "LAB", "ace", "1234", "hij")]


@pytest.fixture
def chatting(tmp_path: Path) -> Path:
    folder = noisy(build("llama", torch.float32, max_position_embeddings=512), tmp_path / "chatting", 4)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TURNS
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """One of perplexities, and one of generated texts, both with examples in the prompt."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test",
        "fewshot_split": "test", "num_fewshot": 2, "doc_to_text": "{{q}}", "doc_to_target": "{{a}}",
        "target_delimiter": "", "fewshot_delimiter": "=",
    }  # fmt: skip
    said = {"output_type": "loglikelihood", "metric_list": [{"metric": "perplexity", "higher_is_better": False}]}
    told = {"output_type": "generate_until", "metric_list": [{"metric": "exact_match"}],
            "generation_kwargs": {"until": ["="], "max_gen_toks": 6, "do_sample": False}}  # fmt: skip
    for name, fields in {"said": said, "told": told}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **fields}))
    return folder


@pytest.fixture(autouse=True)
def no_report_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval lists all installed packages beside its scores, which takes seconds."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)


def on_its_own(folder: Path, tasks: Path, task: str, arguments: str = "", **options: Any) -> Any:
    """As lm-eval's command runs it."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(
        model="hf", model_args=f"pretrained={folder}{arguments}", tasks=[task], batch_size=8, device="cpu",
        task_manager=manager, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    "ours",
    [
        {"chat_template": True},
        {"chat_template": True, "lm_eval": {"fewshot_as_multiturn": False, "system_instruction": "next "}},
        {"lm_eval": {"system_instruction": "swap ", "max_length": 20, "seed": 7}, "dtype": "bfloat16"},
    ],
    ids=["turns", "one-turn", "no-template"],
)
def test_scores_are_those_of_lm_eval(chatting: Path, tasks: Path, ours: dict[str, Any]) -> None:
    own = ours.get("lm_eval", {})
    report = evaluate(chatting, tasks=["said"], include_path=tasks, **ours)
    plain = evaluate(chatting, tasks=["said"], include_path=tasks)
    chat = ours.get("chat_template", False)
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    theirs = on_its_own(
        chatting, tasks, "said",
        arguments=f",dtype={ours.get('dtype', 'auto')}" + (",max_length=20" if "max_length" in own else ""),
        apply_chat_template=chat, fewshot_as_multiturn=own.get("fewshot_as_multiturn", chat),
        system_instruction=own.get("system_instruction"), **({seed: 7 for seed in seeds} if "seed" in own else {}),
    )  # fmt: skip
    found = report.models[0].results[0].main.value
    assert found == theirs["results"]["said"]["perplexity,none"]
    assert found != plain.models[0].results[0].main.value and report.models[0].cached == plain.models[0].cached == 0


def test_generation_and_samples_are_those_of_lm_eval(chatting: Path, tasks: Path, run: Run, tmp_path: Path) -> None:
    """Sampled, at a temperature: the seed, the settings and the prompts must all be lm-eval's."""
    logged = tmp_path / "samples"
    asked = ["--tasks", "told", "--include-path", tasks, "--gen-kwargs", "do_sample=true", "temperature=2.0", "--json"]
    status, out, err = run("evaluate", chatting, *asked, "--log-samples", logged)
    assert status == 0, err
    theirs = on_its_own(
        chatting, tasks, "told", gen_kwargs="do_sample=True,temperature=2.0", fewshot_as_multiturn=False
    )
    (file,) = logged.glob("*/samples_told_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(samples) == len(ROWS)
    assert [one["resps"] for one in samples] == [one["resps"] for one in theirs["samples"]["told"]]
    assert len({one["resps"][0][0] for one in samples}) > 1
    report = json.loads(out)
    assert report["models"][0]["results"][0]["scores"][0]["value"] == theirs["results"]["told"]["exact_match,none"]
    assert report["flags"][-3:] == ["--gen-kwargs", "do_sample=true", "temperature=2.0"]

    file.unlink()
    assert json.loads(run("evaluate", chatting, *asked)[1])["models"][0]["cached"] == 1
    again = json.loads(run("evaluate", chatting, *asked, "--log-samples", logged)[1])
    assert again["models"][0]["cached"] == 0 and len(list(logged.glob("*/samples_told_*.jsonl"))) == 1


def test_more_arguments_of_the_model(chatting: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    build = harness.load_model

    def noting(folder: Path, label: str, options: Any) -> Any:
        loaded.append(build(folder, label, options))
        return loaded[-1]

    monkeypatch.setattr(harness, "load_model", noting)
    evaluate(chatting, tasks=["said"], include_path=tasks)
    evaluate(chatting, tasks=["said"], include_path=tasks, lm_eval={"model_args": ["add_bos_token=true"]})
    assert [lm.add_bos_token for lm in loaded] == [None, True]


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"backend": "vllm"}, "needs the package vllm: pip install vllm"),
        ({"fewshot_as_multiturn": True}, "needs chat_template"),
        ({"gen_kwargs": {"custom_generate": "x/y"}}, "would run Python code"),
        ({"model_args": ["trust_remote_code=true"]}, "would run Python code"),
        ({"model_args": {"pretrained": "x/y"}}, "pretrained has an option of its own"),
        ({"gen_kwargs": "hot"}, "'hot' is not KEY=VALUE"),
        ({"seed": [1, 2]}, "seed"),
    ],
)
def test_what_is_refused(own: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make_options({"tasks": ["said"], "lm_eval": own})


def test_arguments_of_a_strangers_recipe() -> None:
    with pytest.raises(RecipeError, match=r"evaluate.lm_eval.model_args.*--allow-task-code"):
        check_task_code({"evaluate": {"lm_eval": {"model_args": {"attn_implementation": "x/y"}}}}, "recipe.yaml")
    check_task_code({"evaluate": {"lm_eval": {"system_instruction": "Be brief."}}}, "recipe.yaml")


def test_vllm_gets_the_same_settings(chatting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its class is not run here: the package needs a GPU."""
    import sys
    import types

    given: dict[str, Any] = {}
    fake = types.ModuleType("lm_eval.models.vllm_causallms")
    fake.VLLM = lambda **settings: given.update(settings)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", fake)
    monkeypatch.setattr("hf_locstitch.tasks.lm_eval_options.find_spec", lambda name: name == "vllm")
    own = {"backend": "vllm", "model_args": {"gpu_memory_utilization": 0.5}, "max_length": 64}
    harness.load_model(chatting, "it", make_options({"tasks": ["said"], "lm_eval": own, "dtype": "float16"}))
    assert given == {
        "pretrained": str(chatting), "batch_size": "auto", "dtype": "float16", "max_length": 64, "seed": 1234,
        "trust_remote_code": False, "gpu_memory_utilization": 0.5,
    }  # fmt: skip
