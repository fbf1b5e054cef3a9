"""Python code that a repo or a recipe brings along: never run unless the user says so, and never asked about."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.data import ROWS, write_jsonl, write_texts
from helpers.families import build, family
from helpers.language_models import favouring
from helpers.runs import quick_merge

from hf_locstitch import RequestError, evaluate
from hf_locstitch.cli.main import main
from hf_locstitch.errors import CheckpointError
from hf_locstitch.tasks.loading import load_config, load_processor
from hf_locstitch.tasks.objectives.causal_lm import CausalLM

OWN = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Tokens", None]}


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that exists once code of a model was run. Whoever is asked whether to run it says yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return tmp_path / "ran"


def bring_code(folder: Path, ran: Path, **fields: object) -> Path:
    """Give a model code of its own."""
    (folder / "own.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        f"Path({str(ran)!r}).touch()\n"
        "class Config(LlamaConfig): model_type = 'strange'\nclass Model(LlamaForCausalLM): config_class = Config\n"
        "class Tokens(PreTrainedTokenizerFast): pass\n"
    )
    for file, more in {"config.json": fields, "tokenizer_config.json": {"tokenizer_class": "Tokens"}}.items():
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": OWN, **more}))
    return folder


@pytest.fixture
def folders(tmp_path: Path, ran: Path) -> list[Path]:
    """A base and a finetune that transformers cannot load without their code."""
    return [bring_code(folder, ran, model_type="strange") for folder in family(build("llama", torch.float32), tmp_path)]


def test_a_merge_without_data_loads_nothing(folders: list[Path], ran: Path, tmp_path: Path) -> None:
    quick_merge(folders[0], folders[1:], out=tmp_path / "out")
    assert not ran.exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"localizer": {"method": "saliency"}},
        {"stitch": {"method": "refit", "inputs": 4}},
        {"evaluate": {"tasks": ["arc_easy"]}},
    ],
    ids=["saliency", "refit", "evaluate"],
)
def test_what_loads_models_refuses_those_with_code(
    folders: list[Path], ran: Path, tmp_path: Path, fields: Mapping[str, Any]
) -> None:
    data = [str(write_jsonl(tmp_path / "rows.jsonl", ROWS))] * len(folders[1:]) if "evaluate" not in fields else None
    with pytest.raises(CheckpointError, match=r"no model of type 'strange'.*never run.*without data"):
        quick_merge(folders[0], folders[1:], out=tmp_path / "out", data=data, **fields)
    assert not ran.exists() and not (tmp_path / "out").exists()


def test_evaluate_refuses_them(folders: list[Path], ran: Path) -> None:
    with pytest.raises(CheckpointError, match="never run"):
        evaluate(folders[1], tasks=["arc_easy"])
    assert not ran.exists()


def test_every_loader_refuses_code_without_asking(folders: list[Path], ran: Path) -> None:
    with pytest.raises(RequestError, match="never run"):
        load_config(folders[1])
    with pytest.raises(RequestError, match="never run"):
        load_processor(CausalLM(), folders[1])
    assert not ran.exists()


def test_a_tokenizer_that_nests_without_end_is_refused(tmp_path: Path) -> None:
    favouring(tmp_path, "A")
    (tmp_path / "tokenizer.json").write_text("[" * 50_000 + "]" * 50_000)
    with pytest.raises(RequestError, match=r"no tokenizer .* that AutoTokenizer can read"):
        load_processor(CausalLM(), tmp_path)


def test_a_model_that_transformers_knows_runs_without_its_own_code(ran: Path, tmp_path: Path) -> None:
    folders = [bring_code(folder, ran) for folder in family(build("llama", torch.float32), tmp_path)]
    for folder in folders:
        path = folder / "tokenizer_config.json"
        fields = {key: value for key, value in json.loads(path.read_text()).items() if key != "auto_map"}
        path.write_text(json.dumps({**fields, "tokenizer_class": "PreTrainedTokenizerFast"}))
    data = [str(write_texts(tmp_path / "texts.jsonl"))] * len(folders[1:])
    stitch = {"method": "refit", "inputs": 8, "held_out": 0, "lambdas": [0.1]}
    quick_merge(folders[0], folders[1:], out=tmp_path / "out", data=data, stitch=stitch)
    assert not ran.exists()


def test_a_recipe_runs_task_files_only_with_a_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = family(build("llama", torch.float32), tmp_path)
    (tmp_path / "tasks").mkdir()
    recipe = tmp_path / "recipe.yaml"
    fields = {"base": str(folders[0]), "finetuned": [str(folders[1])], "out": str(tmp_path / "out"), "figures": False}
    asked = {"tasks": ["own"], "include_path": str(tmp_path / "tasks")}
    recipe.write_text(yaml.safe_dump({**fields, "evaluate": asked}))
    for flags in ([], ["--dry-run"]):
        assert main(["merge", str(recipe), "--quiet", *flags]) == 2
        said = capsys.readouterr().err
        assert "can run any Python" in said and "--allow-task-code" in said
    assert not (tmp_path / "out").exists()
    assert main(["merge", str(recipe), "--allow-task-code", "--dry-run"]) == 2
    assert "no task 'own'" in capsys.readouterr().err  # for the folder is empty
