"""Every shipped recipe, and every variant in its comments, is carried out against repos of the same ids and schemas."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.language_models import add_arc, add_truthfulqa
from helpers.protocols import (
    add_clip,
    add_language_data,
    add_language_tasks,
    add_llama,
    add_roberta,
    add_vision_tasks,
    expert,
)

from hf_locstitch import Inspection, inspect
from hf_locstitch.cli.main import main
from loopback_hub import LoopbackHub

RECIPES = Path(__file__).parents[2] / "recipes"


def variants(name: str) -> list[dict[str, Any]]:
    """The recipe, and what becomes of it with each block of keys in its comments, without another evaluation."""
    text = (RECIPES / f"{name}.yaml").read_text()
    fields = yaml.safe_load(text)
    found = [fields]
    for block in re.findall(r"(?:^#   (?:localizer|data|stitch): .*\n)+", text, re.MULTILINE):
        own = yaml.safe_load(re.sub(r"^#   ", "", block, flags=re.MULTILINE))
        dataless = own.get("localizer", {}).get("method") == "magnitude"
        kept = {key: value for key, value in fields.items() if not (dataless and key in ("data", "stitch"))}
        found.append({**kept, **own, "evaluate": None})
    return found


def carry_out(fields: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Plan, merge, and judge; the manifest, and the evaluation if the recipe asks for one: of the merge beside the base
    and each finetune, with a score of every set."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields))
    out = folder / f"out{len(list(folder.glob('out*')))}"
    command = ["merge", str(folder / "recipe.yaml"), "--out", str(out), "--no-figures", "--json", "--quiet"]
    assert main([*command, "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert main(command) == 0
    done = json.loads(capsys.readouterr().out)
    looked = inspect(out)
    assert isinstance(looked, Inspection) and plan["N"] == done["manifest"]["N"] > 0
    if asked := fields.get("evaluate"):
        models = done["evaluation"]["models"]
        assert [model["name"] for model in models[:-1]] == ["base", *plan["finetuned"]]
        sets = sorted([*asked.get("data", ()), *asked.get("tasks", ())])
        assert all(sorted(result["task"] for result in model["results"]) == sets for model in models)
        assert not [warning for warning in done["evaluation"]["warnings"] if "unseen" in warning]
    return done


@pytest.fixture
def here(tmp_path: Path, home_hub: LoopbackHub, hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_are_tried() -> None:
    tried = {"roberta-12-tasks": 2, "clip-vit-b32-8-tasks": 2, "llm-surrogates": 1, "mergebench-llama-3.2-3b": 2,
             "mergebench-llama-3.2-3b-data": 2, "demo": 1}  # fmt: skip
    assert {path.stem: len(variants(path.stem)) for path in RECIPES.glob("*.yaml")} == tried


def test_twelve_language_tasks(here: Path, home_hub: LoopbackHub, capsys: pytest.CaptureFixture[str]) -> None:
    add_roberta(home_hub, here / "base")
    add_language_tasks(home_hub)
    recipe, dataless = variants("roberta-12-tasks")
    for seed, ref in enumerate(recipe["finetuned"]):
        if ref.endswith("/snli"):  # as the recipe's first lines have it
            command = ["--base", recipe["base"], "--data", Path(ref).name, "--out", ref, "--epochs", "1", "--quiet"]
            assert main(["finetune", *command]) == 0
        else:
            expert(here / "base", here / ref, "AutoModelForMaskedLM", seed)
    capsys.readouterr()
    done = carry_out(recipe, here, capsys)["manifest"]
    assert len(done["masks"]) == 12 and done["data"]["mnli"]["ref"].startswith("nyu-mll/glue@")
    assert done["masks"]["snli"]["examples"] == 6 and done["masks"]["trec"]["examples"] == 8
    assert {mask["ones"] for mask in done["masks"].values()} == {done["k"]}
    assert carry_out(dataless, here, capsys)["manifest"]["localizer"]["density"] == 0.05


def test_eight_vision_tasks(here: Path, home_hub: LoopbackHub, capsys: pytest.CaptureFixture[str]) -> None:
    add_clip(home_hub, here)
    add_vision_tasks(home_hub, here)
    for fields in variants("clip-vit-b32-8-tasks"):
        done = carry_out(fields, here, capsys)["manifest"]
        assert len(done["masks"]) == 8
    assert done["data"]["sun397"]["limit"] == 1024 and done["masks"]["cars"]["examples"] == 4


def test_surrogates_and_the_papers_benchmarks(
    here: Path, home_hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    add_llama(home_hub, here)
    add_language_data(home_hub)
    add_arc(home_hub, ["B", "C"])
    add_truthfulqa(home_hub, ["beta", "delta"])
    expert(here / "llama", here / "experts" / "qa", "AutoModelForCausalLM", 9)
    (recipe,) = variants("llm-surrogates")
    assert recipe["evaluate"] == {"suite": "paper"}  # with MMLU's 57 subjects it takes a minute
    quick = {"tasks": ["arc_challenge", "truthfulqa_mc1"], "limit": 1}
    done = carry_out({**recipe, "evaluate": quick}, here, capsys)
    assert done["manifest"]["data"]["qa"]["role"] == "surrogate" and not done["manifest"]["warnings"]
    models = done["evaluation"]["models"]
    assert [model["name"] for model in models[:-1]] == ["base", "instruction", "reasoning", "qa"]
    assert all({result["task"] for result in model["results"]} == {*quick["tasks"]} for model in models)


@pytest.mark.parametrize("name", ["mergebench-llama-3.2-3b", "mergebench-llama-3.2-3b-data"])
def test_five_experts(name: str, here: Path, home_hub: LoopbackHub, capsys: pytest.CaptureFixture[str]) -> None:
    add_llama(home_hub, here)
    add_language_data(home_hub)
    for fields in variants(name):
        done = carry_out(fields, here, capsys)["manifest"]
        assert set(done["masks"]) == {"instruction", "math", "coding", "multilingual", "safety"}
