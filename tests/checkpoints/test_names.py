"""Names that strangers choose and that become paths."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.models import finetune, random_state, save, save_sharded
from helpers.runs import merge_folders, quick_localize, quick_merge, quick_stitch

from hf_locstitch.checkpoints.names import make_name, safe_file, safe_name, same_place
from hf_locstitch.checkpoints.opening import open_checkpoint
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.errors import CheckpointError, RecipeError
from hf_locstitch.plan.describe import format_plan
from hf_locstitch.plan.planning import make_plan
from hf_locstitch.plan.recipe import make_recipe


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("my model", "my-model"),
        ("_ft", "ft"),
        ("модель", "модель"),
        ("ft (1)", "ft-1"),
        ("checkpoint+1", "checkpoint-1"),
        ("((", "finetune-1"),
        ("e\u0301te\u0301", "\u00e9t\u00e9"),  # composed: a combining accent is no letter
        ("x-", "x-"),
        ("ж" * 120, "ж" * 100),  # 200 bytes
        ("Aux", "finetune-1"),  # a device on Windows
        ("con.v2", "finetune-1"),
        ("console", "console"),
    ],
)
def test_a_safe_name_is_made_of_any_folder_and_said(tmp_path: Path, folder: str, name: str) -> None:
    assert make_name(folder, "finetune-1") == name and safe_name(name) == name
    if len(folder.encode()) > 200:
        return
    base = random_state(0)
    save(tmp_path / "base", base)
    save(tmp_path / folder, finetune(base, 1))
    recipe = make_recipe({"base": str(tmp_path / "base"), "finetuned": [str(tmp_path / folder)]})
    plan = make_plan(recipe)
    assert list(plan.finetuned) == [name]
    said = [warning for warning in plan.warnings if f"{folder!r} is called {name}" in warning]
    assert len(said) == (folder != name) and all("--names" in one and str(tmp_path) not in one for one in said)
    assert all(one in format_plan(plan) for one in said)


def test_names_are_compared_without_case(tmp_path: Path) -> None:
    base = random_state(0)
    save(tmp_path / "base", base)
    for name in ("Math", "math"):
        save(tmp_path / name, finetune(base, 1))
    refs = [str(tmp_path / "Math"), str(tmp_path / "math")]
    with pytest.raises(RecipeError, match=r"'Math' and 'math'.*--names"):
        make_plan(make_recipe({"base": str(tmp_path / "base"), "finetuned": refs}))
    with pytest.raises(RecipeError, match="named 'Base'"):
        make_plan(make_recipe({"base": str(tmp_path / "base"), "finetuned": [{"ref": refs[0], "name": "Base"}]}))


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "", ".x", "_x", "a\n", "a b", "ж" * 120, "nul"])
def test_a_recipe_takes_safe_names_only(name: str) -> None:
    with pytest.raises(RecipeError, match="names a file"):
        make_recipe({"base": "a", "finetuned": [{"ref": "b", "name": name}]})


@pytest.mark.parametrize("file", ["../x", "/x", "a/../x", "a//b", "./x", "", ".", "a\\b", "a\0b", "a\nb", "a\udcffb"])
def test_paths_that_lead_elsewhere_or_cannot_be_written(file: str) -> None:
    with pytest.raises(ValueError, match="not a plain path"):
        safe_file(file)


@pytest.mark.parametrize("file", ["a:b", "x/con", "Com1.json", "lpt².txt", "a.", "x /y", "what?.json", 'a"b', "a|b"])
def test_files_that_windows_takes_for_something_else(monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    monkeypatch.setattr("hf_locstitch.checkpoints.names.ON_WINDOWS", False)
    assert safe_file(file) == file
    monkeypatch.setattr("hf_locstitch.checkpoints.names.ON_WINDOWS", True)
    with pytest.raises(ValueError, match="on Windows"):
        safe_file(file)
    assert safe_file("model-00001-of-00002.safetensors") and safe_file("console/auxiliary.json")


def test_places_that_a_file_system_may_take_for_one() -> None:
    assert same_place(["a", "b/c", "A"]) == ("a", "A")
    assert same_place(["a/b", "A"]) == ("A", "a/b")  # a file in a file
    assert same_place(["a", "b", "c/a"]) is None


@pytest.mark.parametrize("field", ["name", "file", "values", "outputs", "files"])
def test_no_manifest_leads_out_of_its_folder(tmp_path: Path, field: str) -> None:
    base = random_state(0)
    save(tmp_path / "base", base)
    save(tmp_path / "ft", finetune(base, 1))
    quick_localize(tmp_path / "base", tmp_path / "ft", out=tmp_path / "evil")
    victim = save(tmp_path / "victim", base) / "model.safetensors"
    before = victim.read_bytes()
    record = json.loads((tmp_path / "evil" / "locstitch.json").read_text())
    mask = record["masks"].pop("ft")
    up = "../" * 3 + "victim/model"
    record["masks"][up if field == "name" else "ft"] = mask
    if field == "name":
        record["inputs"][1]["name"] = up
    if field == "file":
        mask["file"] = f"masks/{up}.safetensors"
    if field == "values":
        mask["values"] = f"values/{up}.safetensors"
    if field == "outputs":
        record["outputs"][f"{up}.safetensors"] = {"size": 1, "sha256": "0" * 64}
    if field == "files":
        record["inputs"][0]["files"][f"{up}.safetensors"] = "0" * 64
    (tmp_path / "evil" / "locstitch.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"locstitch\.json is not a manifest"):
        quick_stitch(tmp_path / "base", [tmp_path / "evil"], out=tmp_path / "out")
    assert victim.read_bytes() == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "file",
    ["README.md", "locstitch.yaml", "config2.json", "../ft/model.safetensors", "/tmp/x.safetensors",
     "masks/ft.safetensors", "Values/x.safetensors", "readme.md/x.safetensors", "a\\b.safetensors", 7, {}],
)  # fmt: skip
def test_an_index_names_plain_shards_only(tmp_path: Path, file: object) -> None:
    base = save_sharded(tmp_path / "base", random_state(0), lambda names: [names[:4], names[4:]])
    index = json.loads((base / "model.safetensors.index.json").read_text())
    first = next(iter(index["weight_map"].values()))
    if isinstance(file, str) and not file.startswith(("/", "..")):
        (base / file).parent.mkdir(exist_ok=True)
        (base / first).rename(base / file)
    index["weight_map"] = {name: file if at == first else at for name, at in index["weight_map"].items()}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"cannot be a shard|no weight_map"):
        open_checkpoint(parse_ref(str(base)))


def test_shards_that_differ_by_case_only(tmp_path: Path) -> None:
    base = save_sharded(tmp_path / "base", random_state(0), lambda names: [names[:4], names[4:]])
    files = sorted(path.name for path in base.glob("*.safetensors"))
    names = {files[0]: "model-a.safetensors", files[1]: "model-A.safetensors"}
    for old, new in names.items():
        (base / old).rename(base / new)
    text = (base / "model.safetensors.index.json").read_text()
    for old, new in names.items():
        text = text.replace(old, new)
    (base / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="have no case"):
        open_checkpoint(parse_ref(str(base)))


def test_shards_in_a_folder_of_the_model_are_written_beside_each_other(tmp_path: Path) -> None:
    base = save_sharded(tmp_path / "base", random_state(0), lambda names: [names[:4], names[4:]])
    index = json.loads((base / "model.safetensors.index.json").read_text())
    (base / "parts").mkdir()
    for file in set(index["weight_map"].values()):
        shutil.move(base / file, base / "parts" / file)
    index["weight_map"] = {name: f"parts/{file}" for name, file in index["weight_map"].items()}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    save(tmp_path / "ft", finetune(random_state(0), 1))
    out = merge_folders(tmp_path, [{"ref": str(tmp_path / "ft")}])
    assert sorted(path.name for path in out.glob("*.safetensors")) == [
        f"model-0000{i}-of-00002.safetensors" for i in (1, 2)
    ]


def test_the_made_name_is_pinned_in_the_recipe(tmp_path: Path) -> None:
    base = random_state(0)
    save(tmp_path / "base", base)
    save(tmp_path / "my model", finetune(base, 1))
    quick_merge(tmp_path / "base", tmp_path / "my model", out=tmp_path / "out")
    assert (tmp_path / "out" / "masks" / "my-model.safetensors").is_file()
    assert "name: my-model" in (tmp_path / "out" / "locstitch.yaml").read_text()
