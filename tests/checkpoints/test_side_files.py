"""Which files go along with the weights: those that a model needs, and nothing else of its folder."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from helpers.models import finetune, random_state, save
from helpers.runs import merge_folders, quick_localize, quick_stitch
from safetensors.torch import load_file, save_file

from hf_locstitch.checkpoints.opening import open_checkpoint
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.checkpoints.side_files import choose_side_files
from hf_locstitch.cli.main import main
from hf_locstitch.errors import CheckpointError, MismatchError, RecipeError
from hf_locstitch.plan.describe import format_plan, plan_json
from hf_locstitch.plan.planning import make_plan
from hf_locstitch.plan.recipe import make_recipe

NEEDED = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tokenizer.model.v3",
    "qwen.tiktoken",
    "tekken.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "LICENSE",
    "LICENSE.txt",
    "Notice.md",
    "USE_POLICY.md",
    "Gemma_License.txt",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "language_model/attrs.json",
]
NOT_NEEDED = [
    "id_rsa",
    "secrets.env",
    "token",
    "optimizer.zip",
    "optimizer.pt",
    "data.parquet",
    "checkpoint-500/config.json",
    "checkpoint-500/x.py",
    "wandb/run.json",
    "runs/events.out.tfevents.1",
    "onnx/model.onnx",
    "openvino/openvino_model.xml",
    "modeling_toy.py",
    "setup.py",
    "trainer_state.json",
    "training_args.json",
    "eval_results.json",
    "pytorch_model.bin",
    "model.gguf",
    "credentials.json",
    "license_keys.py",
    "notes.txt",
    "tokenizer/tokenizer.json",
    "config.json.bak",
    "masks/x.json",
    "Figures/config.json",
    "readme.MD",
]


def _model(folder: Path, files: Mapping[str, str], config: str = '{"model_type": "toy"}', seed: int = 0) -> Path:
    save(folder, random_state(seed), config)
    _add(folder, files)
    return folder


def _add(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def _chosen(folder: Path, *also: str) -> tuple[list[str], list[str]]:
    chosen = choose_side_files(open_checkpoint(parse_ref(str(folder))), also)
    return sorted(chosen.copied), sorted(chosen.left)


def _finetune(tmp: Path) -> dict[str, str]:
    return {"ref": str(save(tmp / "ft", finetune(random_state(0), 1))), "name": "ft"}


def test_what_a_model_needs_is_copied_and_nothing_else(tmp_path: Path) -> None:
    base = _model(tmp_path / "base", {name: "{}" for name in (*NEEDED, *NOT_NEEDED) if name != "config.json"})
    copied, left = _chosen(base)
    assert copied == sorted(NEEDED)
    own = {"masks/x.json", "Figures/config.json", "readme.MD"}  # places of the merge itself
    assert left == sorted(set(NOT_NEEDED) - own)
    out = merge_folders(tmp_path, [_finetune(tmp_path)])
    assert not any((out / name).exists() for name in NOT_NEEDED)
    assert all((out / name).read_bytes() == (base / name).read_bytes() for name in NEEDED)


def test_the_plan_lists_what_is_copied_and_counts_what_is_left(tmp_path: Path) -> None:
    base = _model(tmp_path / "base", {"tokenizer.json": "{}", "id_rsa": "x", "notes.txt": "y", "README.md": "# base"})
    plan = make_plan(make_recipe({"base": str(base), "finetuned": [_finetune(tmp_path)]}))
    assert f"files      from {base}: config.json, tokenizer.json; 2 others left (--also-copy GLOB" in format_plan(plan)
    copied = ["config.json", "tokenizer.json"]
    assert plan_json(plan)["files"] == {"from": "./base", "copied": copied, "made": [], "left": 2}


def test_more_is_copied_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _model(tmp_path / "base", {"notes.txt": "y", "data/a.csv": "a", "data/b.csv": "b", "id_rsa": "x"})
    _finetune(tmp_path)
    monkeypatch.chdir(tmp_path)
    flags = ["--base", "./base", "--ft", "./ft", "--quiet", "--no-figures"]
    assert main(["merge", *flags, "--out", "out", "--also-copy", "notes.txt", "data/*"]) == 0
    names = ("notes.txt", "data/a.csv", "data/b.csv", "id_rsa")
    assert [(tmp_path / "out" / name).exists() for name in names] == [True, True, True, False]
    assert "also_copy:" in (tmp_path / "out" / "locstitch.yaml").read_text()
    quick_localize("./base", "./ft", out="local")
    quick_stitch("./base", ["./local"], out="again", also_copy=["notes.txt"])
    assert (tmp_path / "again" / "notes.txt").exists()
    with pytest.raises(RecipeError, match="also_copy cannot be set for a localized checkpoint"):
        from hf_locstitch.plan.planning import make_localize_plan

        make_localize_plan(make_recipe({"base": "./base", "finetuned": ["./ft"], "also_copy": ["notes.txt"]}))


def test_a_glob_of_nothing_or_of_the_merges_own_files(tmp_path: Path) -> None:
    base = _model(tmp_path / "base", {"notes.txt": "y", "masks/x": "z", "README.md": "# base"})
    entries = [_finetune(tmp_path)]
    for glob in ("note.txt", "README.md", "masks/*"):
        with pytest.raises(MismatchError, match="matches no file"):
            make_plan(make_recipe({"base": str(base), "finetuned": entries, "also_copy": [glob]}))
    save_file(random_state(3), base / "model-00001-of-00002.safetensors")  # of an older save
    recipe = {"base": str(base), "finetuned": entries, "also_copy": ["*.safetensors"], "shard_size": "1kB"}
    stale = next(shard.file for shard in make_plan(make_recipe({**recipe, "also_copy": []})).shards)
    (base / "model-00001-of-00002.safetensors").rename(base / stale)
    with pytest.raises(RecipeError, match=f"also_copy asks for {stale}"):
        make_plan(make_recipe(recipe))


def test_code_that_configs_name_and_what_it_imports(tmp_path: Path) -> None:
    config = {
        "model_type": "toy",
        "auto_map": {"AutoConfig": "configuration_toy.Toy", "AutoModel": "org/other--modeling_other.Other"},
    }
    files = {
        "configuration_toy.py": "raise SystemExit  # never run\nfrom .parts import a\n  from .sub.deep import (\n b)\n",
        "parts.py": "from . import more, (\nimport os\nfrom transformers import x\nfrom .configuration_toy import y\n",
        "more.py": "not python at all(",
        "sub/deep.py": "from .near import z\n",
        "sub/near.py": "",
        "near.py": "",
        "modeling_other.py": "",
        "os.py": "",
        "unused.py": "",
        "tok.py": "",
        "image.py": "",
        "tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": ["tok.Tok", None]}}),
        "preprocessor_config.json": json.dumps({"auto_map": {"AutoImageProcessor": "image.Image"}}),
    }
    copied, left = _chosen(_model(tmp_path / "base", files, json.dumps(config)))
    assert [name for name in copied if name.endswith(".py")] == [
        "configuration_toy.py", "image.py", "more.py", "parts.py", "sub/deep.py", "sub/near.py", "tok.py",
    ]  # fmt: skip
    assert left == ["modeling_other.py", "near.py", "os.py", "unused.py"]


def test_code_is_read_as_bytes_of_any_kind(tmp_path: Path) -> None:
    base = _model(tmp_path / "base", {"b.py": ""}, '{"model_type": "toy", "auto_map": {"AutoModel": "a.A"}}')
    (base / "a.py").write_bytes(b"# \xff\xfe latin\nfrom .b import c\n")
    assert _chosen(base)[0] == ["a.py", "b.py", "config.json"]
    out = merge_folders(tmp_path, [_finetune(tmp_path)])
    assert (out / "a.py").read_bytes() == (base / "a.py").read_bytes()


# ---- Weights of modules


def _modules(*paths: str) -> str:
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    return json.dumps(
        [{"path": path, "type": f"sentence_transformers.models.{kinds.get(path, 'Dense')}"} for path in paths]
    )


def _with_dense(tmp: Path, weights: str | None, *paths: str) -> Path:
    files = {"modules.json": _modules(*paths), "1_Pooling/config.json": "{}", "2_Dense/config.json": '{"in": 2}'}
    base = _model(tmp / "base", files)
    if weights is not None and weights.endswith(".safetensors"):
        save_file(random_state(5), base / weights)
    elif weights is not None:
        (base / weights).write_bytes(b"\x80")
    return base


def test_weights_of_modules_are_copied_byte_for_byte(tmp_path: Path) -> None:
    base = _with_dense(tmp_path, "2_Dense/model.safetensors", "", "1_Pooling", "2_Dense")
    (base / "2_Dense" / "pytorch_model.bin").write_bytes(b"\x80")  # the same weights again
    (base / "2_Dense" / "id_rsa").write_text("x")
    out = merge_folders(tmp_path, [_finetune(tmp_path)], dtype="bfloat16")
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert sorted(path.name for path in (out / "2_Dense").iterdir()) == ["config.json", "model.safetensors"]
    assert load_file(out / "2_Dense" / "model.safetensors").keys() == random_state(5).keys()
    assert "2_Dense/model.safetensors" in json.loads((out / "locstitch.json").read_text())["outputs"]
    assert main(["verify", str(out), "--base", str(base), "--ft", str(tmp_path / "ft"), "--quiet"]) == 0


def test_a_modules_pickled_weights_are_refused_unless_asked_for(tmp_path: Path) -> None:
    base = _with_dense(tmp_path, "2_Dense/pytorch_model.bin", "", "1_Pooling", "2_Dense")
    recipe = {"base": str(base), "finetuned": [_finetune(tmp_path)]}
    with pytest.raises(CheckpointError, match=r"2_Dense/pytorch_model\.bin only.*--also-copy 2_Dense/"):
        make_plan(make_recipe(recipe))
    plan = make_plan(make_recipe({**recipe, "also_copy": ["2_Dense/pytorch_model.bin"]}))
    assert "2_Dense/pytorch_model.bin" in plan.side_files.copied


def test_a_model_that_lies_in_a_modules_folder_would_not_be_the_merge(tmp_path: Path) -> None:
    base = _with_dense(tmp_path, "2_Dense/model.safetensors", "0_Transformer", "1_Pooling", "2_Dense")
    with pytest.raises(CheckpointError, match="puts the model in 0_Transformer/"):
        make_plan(make_recipe({"base": str(base), "finetuned": [_finetune(tmp_path)]}))


def test_code_of_a_module(tmp_path: Path) -> None:
    listed = json.dumps([{"path": "", "type": "custom_st.Transformer"}, {"path": "sub", "type": "sub.own.Layer"}])
    files = {"modules.json": listed, "custom_st.py": "", "sub/own.py": "", "other.py": ""}
    assert _chosen(_model(tmp_path / "base", files)) == (
        ["config.json", "custom_st.py", "modules.json", "sub/own.py"],
        ["other.py"],
    )


@pytest.mark.parametrize("listed", ["[3]", '[{"path": ""}]', "{}", "[", '[{"path": 3, "type": "x"}]'])
def test_malformed_modules(tmp_path: Path, listed: str) -> None:
    base = _model(tmp_path / "base", {"modules.json": listed})
    with pytest.raises(CheckpointError, match=r"modules\.json"):
        make_plan(make_recipe({"base": str(base), "finetuned": [_finetune(tmp_path)]}))


def test_other_weights_are_said(tmp_path: Path) -> None:
    base = _model(tmp_path / "base", {})
    save_file(random_state(0), base / "mtp.safetensors")
    recipe = {"base": str(base), "finetuned": [_finetune(tmp_path)]}
    (said,) = (warning for warning in make_plan(make_recipe(recipe)).warnings if "mtp.safetensors" in warning)
    assert "mtp.safetensors of the base: weights" in said and str(tmp_path) not in said
    assert not any("mtp" in one for one in make_plan(make_recipe({**recipe, "also_copy": ["mtp*"]})).warnings)


# ---- Found before the work, not after it


def test_a_folder_named_as_a_file_of_the_merge(tmp_path: Path) -> None:
    files = {f"{name}/x.txt": "x" for name in ("README.md", "locstitch.yaml", "locstitch.json", "figures")}
    _model(tmp_path / "base", files)
    out = merge_folders(tmp_path, [_finetune(tmp_path)])
    assert (out / "README.md").is_file() and (out / "locstitch.yaml").is_file()


def test_side_files_that_are_not_utf8(tmp_path: Path) -> None:
    base = _model(tmp_path / "base", {})
    for name in ("vocab.txt", "LICENSE", "chat_template.jinja"):
        (base / name).write_bytes(b"caf\xe9\n")
    out = merge_folders(tmp_path, [_finetune(tmp_path)], dtype="bfloat16")
    assert (out / "vocab.txt").read_bytes() == b"caf\xe9\n"
    for name in ("tokenizer_config.json", "config.json"):
        text = (base / name).read_bytes() if (base / name).exists() else None
        (base / name).write_bytes('{"model_type": "toy"}'.encode("utf-16"))
        with pytest.raises(CheckpointError, match=f"{name} is not valid JSON"):
            make_plan(make_recipe({"base": str(base), "finetuned": [str(tmp_path / "ft")], "dtype": "bfloat16"}))
        (base / name).unlink() if text is None else (base / name).write_bytes(text)


def test_a_file_whose_name_cannot_be_written_is_no_part_of_a_model(tmp_path: Path) -> None:
    base = _model(tmp_path / "base", {})
    (base / "LICENSE\udcff").write_text("x")
    (base / "LICENSE\n# heading").write_text("x")
    out = merge_folders(tmp_path, [_finetune(tmp_path)])
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "config.json", "locstitch.json", "locstitch.yaml", "masks", "model.safetensors",
    ]  # fmt: skip


def test_hostile_lists_of_code_and_of_modules_take_no_time_out_of_proportion(tmp_path: Path) -> None:
    config = '{"auto_map": {"AutoModel": "a.A"}}'
    code = {"a.py": "from . import (\n" * 60_000, **{f"{number}.txt": "" for number in range(300)}}
    base = _model(tmp_path / "base", code | {"modules.json": _modules("", *map(str, range(200_000)))}, config)
    began = time.process_time()
    assert _chosen(base)[0] == ["a.py", "config.json", "modules.json"]
    assert time.process_time() - began < 8
