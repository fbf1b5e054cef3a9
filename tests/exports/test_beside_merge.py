"""The adapter that one command writes beside its merge: as `export` writes it, refused before the work, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import vocabularies
from helpers.families import finetunes, with_sinks
from helpers.runs import Killed, files_of, quick_merge, quick_stitch
from huggingface_hub import HfApi

from hf_locstitch import RequestError, WorkError, export, localize_from_hub
from hf_locstitch.checkpoints.source import file_sha256
from hf_locstitch.cli.main import main
from hf_locstitch.errors import OutputError, RecipeError
from hf_locstitch.exports import beside_merge
from hf_locstitch.plan.planning import make_localize_plan
from hf_locstitch.plan.recipe import make_recipe
from loopback_hub import LoopbackHub

LOCALIZER = {"density": 0.05}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base, ft and ft1, in the current folder."""
    finetunes(tmp_path, "llama", torch.bfloat16)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merge(**fields: Any) -> Any:
    given = {"out": "merged", "adapter": "adapter", "localizer": LOCALIZER, **fields}
    return quick_merge("./base", ["./ft", "./ft1"], **{key: one for key, one in given.items() if one is not None})


def test_it_is_what_export_writes(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["merge", "--base", "base", "--ft", "ft", "ft1", "--density", "0.05", "--no-figures", "--json"]
    assert main([*command, "--out", "merged", "--adapter", "adapter"]) == 0
    said = capsys.readouterr()
    export("./merged", out="exported")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert file_sha256(home / "adapter" / file) == file_sha256(home / "exported" / file)
    result = json.loads(said.out)["adapter"]
    assert result["out"] == "adapter" and result["inexact"] == 0 and result["sparse"]
    assert "adapter    to adapter, once all is merged" in said.err


def test_stitches_have_one_too(home: Path) -> None:
    for name in ("ft", "ft1"):
        localize_from_hub("./base", f"./{name}", out=f"{name}-skill", localizer=LOCALIZER, figures=False)
    done = quick_stitch("./base", ["./ft-skill", "./ft1-skill"], out="stitched", adapter="adapter")
    assert done.adapter is not None and "exact      every weight" in done.describe()
    merge(out="merged", adapter="of-merge")
    weights = "adapter_model.safetensors"
    assert (home / "adapter" / weights).stat().st_size == (home / "of-merge" / weights).stat().st_size


def test_the_same_command_writes_what_is_missing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(beside_merge, "write_adapter", killed)
        patched.setattr("hf_locstitch.api.write_adapter", killed)
        with pytest.raises(Killed):
            merge()
    before = files_of(home / "merged")
    assert not (home / "adapter").exists()
    assert merge().adapter is not None and (home / "adapter" / "adapter_config.json").is_file()
    written = files_of(home / "adapter")
    assert merge().adapter is None, "it is there already"
    assert (files_of(home / "merged"), files_of(home / "adapter")) == (before, written)
    (home / "adapter" / "adapter_config.json").unlink()
    (home / "adapter" / "mine.txt").touch()
    with pytest.raises(OutputError, match=r"adapter exists and is not an empty folder"):
        merge()
    (home / "adapter" / "mine.txt").unlink()
    assert merge().adapter is not None and files_of(home / "adapter") == written
    with pytest.raises(OutputError, match=r"adapter exists and is not an empty folder.*such as --adapter adapter-2"):
        merge(out="other", localizer={"density": 0.1})
    assert not (home / "other").exists()


def test_what_fails_then_leaves_the_merge(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("hf_locstitch.exports.export.check_possible", _full)
        with pytest.raises(WorkError, match=r"complete in merged, but its adapter in adapter is not: full"):
            merge()
    assert merge().adapter is not None


def _full(*_: object) -> None:
    raise OutputError("full")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"method": "average", "localizer": None}, "the merge is merged by average, without masks"),
        ({"rest_from": "ft1"}, "has the tensors outside its masks from ft1"),
        ({"files_from": "ft1"}, "has config and tokenizer from ft1"),
        ({"dtype": "float32"}, r"is F32 \[.*\] in the merge but BF16 \[.*\] in the base"),
        ({"adapter": "merged"}, "are one folder"),
        ({"adapter": "merged/adapter"}, "one lies in the other"),
        ({"adapter": "ft"}, "ft exists and is not an empty folder"),
    ],
)
def test_refused_before_the_work(fields: dict[str, Any], match: str, home: Path) -> None:
    before = sorted(home.rglob("*"))
    with pytest.raises(RequestError, match=match):
        merge(**fields)
    assert sorted(home.rglob("*")) == before


def test_a_dry_run_refuses_likewise(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["merge", "--base", "base", "--ft", "ft", "--dry-run", "--adapter", "adapter"]
    assert main([*command, "--method", "average"]) == 2 and "without masks" in capsys.readouterr().err
    assert main(command) == 0 and "adapter    to adapter" in capsys.readouterr().out


def test_rows_of_new_tokens_and_parameters_without_a_form(tmp_path: Path) -> None:
    given = vocabularies.family(tmp_path, tied=False, dtype=torch.bfloat16)
    place = {"out": tmp_path / "merged", "adapter": tmp_path / "adapter", "localizer": {"density": 0.3}}
    with pytest.raises(RequestError, match=r"which no mask covers.*--tokenizer base --embeddings base"):
        quick_merge(given["base"], given["math"], **place)
    sinks = with_sinks(tmp_path / "sinks")
    with pytest.raises(RequestError, match=r"self_attn \(GptOssAttention\) has no sparse form.*--exclude"):
        quick_merge(*sinks, **place)
    assert not (tmp_path / "merged").exists()
    assert quick_merge(*sinks, exclude=["*.sinks"], **place).adapter is not None


def test_only_to_the_hub_and_to_a_folder(home: Path, home_hub: LoopbackHub) -> None:
    """What is pushed is the merge alone; the adapter stays here."""
    for name in ("base", "ft"):
        home_hub.add_repo(f"org/{name}", {file.name: file for file in (home / name).iterdir()})
    done = quick_merge("org/base", "org/ft", push_to="demo/merged", adapter="adapter", localizer=LOCALIZER)
    assert done.adapter is not None and done.adapter.facts["base"].startswith("org/base@")
    pushed = HfApi().list_repo_files("demo/merged")
    assert "model.safetensors" in pushed and not [file for file in pushed if "adapter" in file]


def test_requests_that_do_not_go_together(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe({"base": "./base", "finetuned": ["./ft"], "adapter": "adapter", "out": "skill"})
    with pytest.raises(RecipeError, match="adapter cannot be set for a localized checkpoint"):
        make_localize_plan(recipe)
    monkeypatch.setattr(beside_merge, "find_processes", lambda: type("Two", (), {"count": 2}))
    with pytest.raises(RecipeError, match=r"in one process.*drop --adapter"):
        merge()
