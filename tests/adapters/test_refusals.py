"""What cannot be done with an adapter is refused before the work; what may be wrong is said in the plan."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from helpers.adapters import save_base, save_lora
from helpers.models import load
from helpers.runs import quick_localize, quick_merge
from safetensors.torch import load_file, save_file

from hf_locstitch import Magnitude, evaluate, plan_merge
from hf_locstitch.checkpoints.folder import FolderSource
from hf_locstitch.cli.main import main
from hf_locstitch.errors import CheckpointError, RecipeError, RequestError
from hf_locstitch.plan.describe import format_plan, plan_json
from loopback_hub import LoopbackHub


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    save_base(folder / "base")
    save_lora(folder / "lora", folder / "base")
    return folder


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all that to change, as working directory."""
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def change(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def change_weights(folder: Path, how: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name: value.contiguous() for name, value in how(load_file(file)).items()}, file)


def plan(*refs: str, **fields: Any) -> Any:
    return plan_merge({"base": "base", "finetuned": list(refs or ["lora"]), **fields})


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("PREFIX_TUNING", "changes no weight"),
        ("PROMPT_TUNING", "changes no weight"),
        ("P_TUNING", "changes no weight"),
        ("ADAPTION_PROMPT", "changes no weight"),
        ("XLORA", "mixes other adapters"),
        ("BRAND_NEW", "does not know"),
        (7, "does not know"),
    ],
)
def test_kinds_without_a_task_vector(
    kind: object, words: str, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the config alone: not even a header of the weights is understood."""
    change(home / "lora", peft_type=kind)
    assert main(["merge", "--base", "base", "--ft", "lora", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert words in error and str(kind) in error and "Traceback" not in error


def test_no_weight_is_read_while_planning(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(self: FolderSource, file: str, advance: object = None) -> Path:
        assert not file.endswith(".safetensors")
        return self.folder / file

    monkeypatch.setattr(FolderSource, "fetch", fetch)
    assert plan().adapters["lora"].layers


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 1 << 40}, "r is 1099511627776"),
        ({"lora_alpha": 1e30}, "lora_alpha"),
        ({"target_modules": "(a+)+" * 2000}, "target_modules is a text of 10,000 characters"),
        ({"rank_pattern": {"x" * 5000: 3}}, "rank_pattern is a text"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config"),
        ({"r": "many"}, "PEFT cannot"),
        ({"r": -1}, "PEFT cannot"),
        ({"task_type": "COOKING"}, "PEFT cannot"),
        ({"target_modules": ["nowhere"]}, "PEFT cannot put"),
        ({"target_modules": "(("}, "PEFT cannot"),
        ({"r": 3}, "PEFT cannot put"),
        ({"target_modules": ["q_proj"]}, "for which there is no place"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "lacks"),
    ],
)
def test_settings_of_strangers(settings: dict[str, Any], words: str, home: Path) -> None:
    change(home / "lora", **settings)
    with pytest.raises(CheckpointError, match=r"lora") as caught:
        plan()
    assert words in str(caught.value)


def test_weights_of_strangers(home: Path) -> None:
    def cut(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value[..., :-1] for name, value in state.items()}

    change_weights(home / "lora", lambda state: dict(list(state.items())[1:]))
    with pytest.raises(CheckpointError, match="lacks"):
        plan()
    change_weights(home / "lora", cut)
    with pytest.raises(CheckpointError, match="PEFT cannot put the LORA adapter"):
        plan()
    (home / "lora" / "adapter_model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        plan()


def test_another_base(home: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "wide", hidden_size=64, vocab_size=64, intermediate_size=48, num_hidden_layers=2,
              num_attention_heads=4)  # fmt: skip
    with pytest.raises(CheckpointError, match="Use the base that it was trained on"):
        plan_merge({"base": str(tmp_path / "wide"), "finetuned": ["lora"]})
    (home / "base" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        plan()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"cache": False}, "--no-cache"),
        ({"localizer": {"method": "saliency"}, "data": ["ds.jsonl"]}, "Use the localizer magnitude"),
        ({"stitch": "refit", "data": ["ds.jsonl"]}, "Merge the adapter first"),
        ({"method": "regmean", "data": ["ds.jsonl"]}, "Merge the adapter first"),
        ({"evaluate": {"suite": "quick", "parents": True}}, "Drop parents"),
        ({"files_from": "lora"}, "Drop files_from"),
    ],
)
def test_what_needs_whole_models(fields: dict[str, Any], words: str, home: Path) -> None:
    with pytest.raises(RecipeError, match="lora is an adapter") as caught:
        quick_merge("base", "lora", out="out", **fields)
    assert words in str(caught.value) and not Path("out").exists()


def test_an_adapter_is_no_base_and_no_model_to_judge(home: Path) -> None:
    for work in (
        lambda: plan_merge({"base": "lora", "finetuned": ["lora"]}),
        lambda: evaluate(["lora"], tasks=["anything"]),
    ):
        with pytest.raises(CheckpointError, match="is a PEFT adapter without"):
            work()


def test_nan_in_an_adapter(home: Path) -> None:
    change_weights(home / "lora", lambda state: {name: value * torch.nan for name, value in state.items()})
    with pytest.raises(RequestError, match=r"lora/adapter_model\.safetensors holds NaN"):
        quick_merge("base", "lora", out="out")


def test_whole_weights_beside_an_adapter(home: Path) -> None:
    shutil.copytree("base", "both")
    shutil.copy("lora/adapter_config.json", "both")
    shutil.copy("lora/adapter_model.safetensors", "both")
    found = plan("both")
    assert not found.adapters
    assert any("the whole weights are merged, the adapter is not" in warning for warning in found.warnings)


def test_the_plan_says_what_the_adapter_changes(home: Path) -> None:
    found = plan()
    assert "lora (LORA adapter, changes 8 tensors of the base)" in format_plan(found)
    said = plan_json(found)["adapters"]["lora"]
    assert said["kind"] == "LORA" and "model.layers.1.self_attn.v_proj.weight" in said["changes"]


def test_what_the_base_has_no_tensor_for(home: Path, tmp_path: Path) -> None:
    """Such as embeddings that grew: as of full finetunes, the base's are kept."""

    def grow(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: torch.cat([value, value[:2]]) if "embed_tokens" in name else value for name, value in state.items()
        }

    save_lora(tmp_path / "grown", home / "base", modules_to_save=["embed_tokens"])
    change_weights(tmp_path / "grown", grow)
    found = plan(str(tmp_path / "grown"))
    assert any("model.embed_tokens.weight [66, 32] (base [64, 32])" in warning for warning in found.warnings)
    tied = save_base(tmp_path / "tied", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                     num_attention_heads=4, tie_word_embeddings=True)  # fmt: skip
    adapter = save_lora(tmp_path / "untied", tied, modules_to_save=["lm_head"])
    found = plan_merge({"base": str(tied), "finetuned": [str(adapter)]})
    assert any("share it in the base" in warning for warning in found.warnings)
    quick_merge(tied, adapter, out="out", include=["*"], localizer=Magnitude(density=1))
    assert torch.equal(load(Path("out"))["model.embed_tokens.weight"], load(tied)["model.embed_tokens.weight"])


@pytest.fixture
def published(home: Path, home_hub: LoopbackHub, hub_cache: Path) -> Callable[..., str]:
    """Publishes a folder and returns its repo."""

    def publish(name: str, **settings: Any) -> str:
        repo = f"demo/{uuid4().hex[:8]}-{name}"
        if settings:
            change(home / name, **settings)
        home_hub.add_repo(repo, {path.name: path for path in (home / name).iterdir() if path.suffix != ".md"})
        return repo

    return publish


def test_another_repo_than_the_adapter_names(home: Path, published: Callable[..., str]) -> None:
    base = published("base")
    lora = published("lora", base_model_name_or_path="org/elsewhere")
    found = plan_merge({"base": base, "finetuned": [lora]})
    assert any("was trained on org/elsewhere" in warning for warning in found.warnings)
    change(home / "lora", base_model_name_or_path=base, revision="0" * 40)
    assert any("@0000" in warning for warning in plan_merge({"base": base, "finetuned": ["lora"]}).warnings)
    change(home / "lora", base_model_name_or_path=base, revision=None)
    assert not plan_merge({"base": base, "finetuned": ["lora"]}).warnings


@pytest.mark.parametrize(
    ("named", "another"),
    [
        ("base", False),  # the folder itself
        ("other", True),  # a folder that is here, too
        ("/elsewhere/base", False),  # on the machine that it was trained on
        ("/elsewhere/other", True),
        ("org/base", False),  # a download of it
        ("org/other", True),
    ],
)
def test_another_folder_than_the_adapter_names(home: Path, named: str, another: bool) -> None:
    """Its changes fit any base of these shapes, so only the name tells."""
    shutil.copytree(home / "base", home / "other")
    change(home / "lora", base_model_name_or_path=named, revision=None)
    warned = [warning for warning in plan().warnings if "was trained on" in warning]
    assert bool(warned) is another
    assert all(f"was trained on {named}" in warning and "the base given is base" in warning for warning in warned)


def test_a_folder_of_the_cache_is_the_repo_that_the_adapter_names(home: Path) -> None:
    snapshot = home / "models--org--base" / "snapshots" / ("0" * 40)
    shutil.copytree(home / "base", snapshot)
    change(home / "lora", base_model_name_or_path="org/base", revision=None)
    assert not any(
        "was trained on" in warning for warning in plan_merge({"base": str(snapshot), "finetuned": ["lora"]}).warnings
    )


def test_the_base_that_adapters_name(home: Path, published: Callable[..., str], tmp_path: Path) -> None:
    base = published("base")
    lora = published("lora", base_model_name_or_path=base)
    recipe = tmp_path / "recipe.yaml"
    shutil.copytree("base", "full")
    recipe.write_text(f"finetuned: [{lora}, full]\nlocalizer: {{density: 0.1}}\n")
    assert plan_merge(recipe).base.source.repo == base
    quick_localize(None, lora, out="localized", localizer=Magnitude(density=0.1))
    shutil.copytree("lora", "other")
    change(home / "other", base_model_name_or_path="org/other")
    with pytest.raises(RecipeError, match="name several") as caught:
        plan_merge({"finetuned": ["lora", "other"]})
    assert base in str(caught.value) and "org/other" in str(caught.value)
    for name, words in (("/home/me/llama", "is no repo"), (None, "names no base"), ("../up", "is no repo")):
        change(home / "lora", base_model_name_or_path=name)
        with pytest.raises(RecipeError, match=words):
            plan_merge({"finetuned": ["lora"]})
    with pytest.raises(RecipeError, match="'base' is missing"):
        plan_merge({"finetuned": ["full"]})
    change(home / "lora", base_model_name_or_path=str(home / "base"))
    assert plan_merge({"finetuned": ["lora"]}).base.label == str(home / "base")
    stranger = published("lora", base_model_name_or_path=str(home / "base"))
    with pytest.raises(RecipeError, match="is no repo"):  # a folder of another machine
        plan_merge({"finetuned": [stranger]})


@pytest.mark.parametrize(
    ("settings", "fine"),
    [
        ({"target_modules": r"(\w+\.?)+x"}, False),
        ({"target_modules": ".*a.*a.*a.*a.*a.*x"}, False),
        ({"rank_pattern": {"(a|a)*b": 2}}, False),
        ({"target_modules": r".*\.(q|v)_proj"}, True),
        ({"target_modules": r"(?:.*?(?:language|text|model).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)"}, True),
        ({"rank_pattern": {r"^model\.layers\.\d+\.self_attn\.q_proj$": 4}}, True),
    ],
)
def test_expressions_that_could_take_for_ever(settings: dict[str, Any], fine: bool, home: Path) -> None:
    change(home / "lora", **settings)
    if fine:
        assert plan().adapters
        return
    with pytest.raises(CheckpointError, match="could take for ever to match"):
        plan()
