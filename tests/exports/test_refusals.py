"""What cannot be exported is refused by name, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import vocabularies
from helpers.families import finetunes, with_sinks
from helpers.fp8 import quantized, save_fp8
from helpers.models import finetune, load, random_state, save
from helpers.runs import quick_localize, quick_merge
from safetensors.torch import load_file, save_file

from hf_locstitch import RequestError, export
from hf_locstitch.cli.main import main
from hf_locstitch.errors import CheckpointError, IntegrityError, LocstitchError, MismatchError, OutputError, RecipeError
from hf_locstitch.exports import export as module

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, ft, ft1, `skill` of the first and `merged` of both."""
    root = tmp_path_factory.mktemp("made")
    base, *tuned = finetunes(root, "llama", torch.bfloat16)
    quick_localize(base, tuned[0], out=root / "skill", localizer={"density": 0.05})
    quick_merge(base, tuned, out=root / "merged", localizer={"density": 0.05})
    return root


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "made")
    monkeypatch.chdir(tmp_path / "made")
    return tmp_path / "made"


def refuse(kind: type[LocstitchError], match: str, ref: str = "merged", **options: Any) -> None:
    before = sorted(path for path in Path.cwd().rglob("*"))
    with pytest.raises(kind, match=match):
        export(f"./{ref}", **{"out": "adapter", **options})
    assert sorted(path for path in Path.cwd().rglob("*")) == before or issubclass(kind, IntegrityError)
    assert not Path("adapter").exists()


def test_the_base_is_where_the_manifest_says(here: Path) -> None:
    assert export("./merged", out="adapter").facts["base"] == "./base"
    Path("base").rename("elsewhere")
    for ref in ("merged", "skill"):
        with pytest.raises(CheckpointError, match=r"cannot be exported without its base.*Use --base REF"):
            export(f"./{ref}", out="other")
        export(f"./{ref}", base="elsewhere", out=f"of-{ref}")
        with pytest.raises(MismatchError, match=r"ft is not the base of .*; name that one with --base"):
            export(f"./{ref}", base="./ft", out="other")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"method": "average"}, "merged by average, without masks"),
        ({"rest_from": "ft1"}, "has the tensors outside its masks from ft1"),
        ({"files_from": "ft1"}, "has config and tokenizer from ft1"),
        ({"dtype": "float32"}, r"is F32 \[.*\] in made but BF16 \[.*\] in the base"),
    ],
)
def test_merges_that_are_more_than_changes_under_masks(here: Path, fields: dict[str, Any], match: str) -> None:
    quick_merge("./base", ["./ft", "./ft1"], out="made", **fields)
    refuse(RequestError, match, "made")


def test_weights_that_are_not_those_of_the_masks(here: Path) -> None:
    state = load_file("merged/model.safetensors")
    state[Q] = state[Q] + 1
    save_file(state, "merged/model.safetensors", metadata={"format": "pt"})
    refuse(IntegrityError, rf"{Q} differs from the base in [\d,]+ elements outside the masks of merged")
    with Path("merged/model.safetensors").open("ab") as file:
        file.write(b"0")
    refuse(CheckpointError, "bytes")


@pytest.mark.parametrize("rows", [{"base": 32}, {}], ids=["in spare rows", "in new rows"])
def test_a_merge_with_rows_of_added_tokens(tmp_path: Path, rows: dict[str, int]) -> None:
    """No mask covers them, and an adapter would leave them out."""
    given = vocabularies.family(tmp_path, tied=False, rows=rows, dtype=torch.bfloat16)
    tuned = [given["math"], given["chat"]]
    quick_merge(given["base"], tuned, out=tmp_path / "merged", localizer={"density": 0.3})
    with pytest.raises(RequestError, match=r"from its finetunes' tokens.*--tokenizer base --embeddings base"):
        export(tmp_path / "merged", out=tmp_path / "adapter", base=given["base"])
    assert not (tmp_path / "adapter").exists()
    choice = {"tokenizer": "base", "embeddings": "base"}
    quick_merge(given["base"], tuned, out=tmp_path / "plain", localizer={"density": 0.3}, **choice)
    assert export(tmp_path / "plain", out=tmp_path / "adapter", base=given["base"]).facts["inexact"] == 0


def test_tensors_without_a_mask_are_the_bases(here: Path) -> None:
    """Exact is said of every weight, so every one is compared."""
    state = load_file("merged/model.safetensors")
    state["lm_head.weight"][1, 2] += 1
    save_file(state, "merged/model.safetensors", metadata={"format": "pt"})
    refuse(IntegrityError, r"lm_head\.weight in merged is not the base's, though no mask covers any of it")


def test_another_shape_is_no_matter_of_the_dtype(here: Path) -> None:
    state = load_file("merged/model.safetensors")
    wide = torch.cat([state["lm_head.weight"], state["lm_head.weight"][:1]])
    save_file({**state, "lm_head.weight": wide}, "merged/model.safetensors", metadata={"format": "pt"})
    record = json.loads(Path("merged/locstitch.json").read_text())
    record["outputs"]["model.safetensors"]["size"] = Path("merged/model.safetensors").stat().st_size
    Path("merged/locstitch.json").write_text(json.dumps(record))
    refuse(MismatchError, r"lm_head\.weight is .* in the base base, an adapter cannot change shapes\.$")


def _mask(edit: Callable[[dict[str, Any]], object], ref: str = "merged") -> None:
    """Change what a mask says about its tensors' shapes."""
    path = next(Path(ref, "masks").iterdir())
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    shapes = json.loads(header["__metadata__"]["shapes"])
    edit(shapes)
    header["__metadata__"]["shapes"] = json.dumps(shapes)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def test_hostile_masks_and_manifests(here: Path) -> None:
    def wide(shapes: dict[str, Any]) -> None:
        shapes[Q] = [16, 64]

    _mask(wide)
    refuse(MismatchError, rf"{Q} is \[16, 64\] in merged but \[32, 32\] in the base")
    _mask(lambda shapes: shapes.pop(Q))
    refuse(LocstitchError, "damaged")
    mask = Path("merged/masks/ft.safetensors")
    mask.write_bytes(b"x" * 100)
    refuse(LocstitchError, "damaged")
    mask.unlink()
    refuse(CheckpointError, "lacks masks/ft.safetensors")
    shutil.copy("skill/masks/ft.safetensors", mask)
    manifest = json.loads(Path("merged/locstitch.json").read_text())
    edits: list[tuple[str, Any, str]] = [
        ("inputs", [{**entry, "role": "base"} for entry in manifest["inputs"]], "one base"),
        ("inputs", [{**manifest["inputs"][0], "ref": "-- no ref"}, *manifest["inputs"][1:]], "neither an existing"),
        ("masks", {"third": {**manifest["masks"]["ft"], "file": "masks/third.safetensors"}}, "third is not one of"),
        ("outputs", {}, "its manifest says None"),
        ("masks", {"../x": manifest["masks"]["ft"]}, "not a manifest"),
    ]  # fmt: skip
    for key, value, match in edits:
        Path("merged/locstitch.json").write_text(json.dumps({**manifest, key: value}))
        refuse(LocstitchError, match)
    Path("merged/locstitch.json").write_text(json.dumps(manifest))
    Path("merged/locstitch.yaml").write_text("- no\n- recipe\n")
    refuse(RequestError, "locstitch.yaml")
    Path("merged/locstitch.yaml").unlink()
    refuse(CheckpointError, "lacks locstitch.yaml")


def test_a_skill_whose_mask_has_other_ones(here: Path) -> None:
    path = next(Path("skill/values").iterdir())
    state = load_file(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    names = [name for name in state if len(state[name]) > 2][:2]
    state[names[0]], state[names[1]] = state[names[0]][1:], torch.cat([state[names[1]], state[names[1]][:1]])
    save_file(state, path, metadata=metadata)
    refuse(IntegrityError, "its mask has .* ones there", "skill")


@pytest.mark.parametrize("named", [["pipeline"], ["AutoModel"], ["NoSuchModel"], 5, None])
def test_architectures_of_strangers(here: Path, named: object) -> None:
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps({**config, "architectures": named}))
    assert export("./merged", out="adapter").facts["model_class"] == "LlamaModel"
    Path("base/config.json").write_text(json.dumps({**config, "model_type": "toy", "architectures": named}))
    with pytest.raises(RequestError, match=r"config\.json"):
        export("./merged", out="other")


def test_dtypes_and_tensors_without_a_form(tmp_path: Path) -> None:
    base, tuned = finetunes(tmp_path, "llama", torch.float64, count=1)
    quick_localize(base, tuned, out=tmp_path / "skill")
    with pytest.raises(MismatchError, match=r"is F64 in the base .*; an adapter can change F32, F16, BF16"):
        export(tmp_path / "skill", base=base, out=tmp_path / "adapter")
    base, tuned = finetunes(tmp_path / "more", "llama", torch.float32, count=1)
    for folder in (base, tuned):
        state = {**load(folder), "model.layers.0.extra.weight": torch.randn(4, 4)}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    quick_localize(base, tuned, out=tmp_path / "extra", localizer={"density": 0.9})
    with pytest.raises(RequestError, match=r"model.layers.0.extra.weight: no parameter of LlamaForCausalLM"):
        export(tmp_path / "extra", base=base, out=tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_base_in_fp8(tmp_path: Path) -> None:
    start = random_state(0)
    save_fp8(tmp_path / "base", quantized(start))
    save(tmp_path / "ft", {name: value.bfloat16() for name, value in finetune(start, 1).items()})
    quick_localize(tmp_path / "base", tmp_path / "ft", out=tmp_path / "skill")
    with pytest.raises(MismatchError, match=r"is stored in FP8 .*use a whole merged model"):
        export(tmp_path / "skill", base=tmp_path / "base", out=tmp_path / "adapter")


def test_parameters_of_modules_that_hold_others(tmp_path: Path) -> None:
    """Attention sinks of gpt-oss."""
    base, tuned = with_sinks(tmp_path)
    quick_localize(base, tuned, out=tmp_path / "skill", localizer={"density": 0.5})
    with pytest.raises(
        RequestError, match=r"self_attn \(GptOssAttention\) has no sparse form, nor can .*--exclude"
    ) as e:
        export(tmp_path / "skill", base=base, out=tmp_path / "adapter")
    assert "layers.0" in str(e.value) and "layers.1" in str(e.value)  # all at once


def test_requests(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    refuse(RecipeError, "no output given", out=None)
    refuse(RecipeError, "form: 'pfet' is unknown .*did you mean 'peft'", form="pfet")
    refuse(CheckpointError, "it was not made by hf-locstitch", "ft")
    with pytest.raises(OutputError, match="is not an empty folder"):
        export("./merged", out="base")
    assert main(["export", "./merged", "--dry-run"]) == 0 and "adapter    SHiRA" in capsys.readouterr().out
    assert main(["export", "./merged", "--dry-run", "--out", "base"]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    refuse(RecipeError, "needs --push-to", private=True)
    assert main(["export", "./merged"]) == 2 and "no output given" in capsys.readouterr().err
    monkeypatch.setattr(module, "find_processes", lambda: type("Two", (), {"count": 2}))
    refuse(RecipeError, "works in one process")


def test_out_is_whole_or_not_there(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_locstitch.exports import adapter_card

    with monkeypatch.context() as patched:
        patched.setattr(adapter_card, "write_card", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export("./merged", out="adapter")
    assert not Path("adapter").exists() and [path.name for path in here.glob(".*.partial")]
    export("./merged", out="adapter")
    assert len([*Path("adapter").iterdir()]) == 3 and not [*here.glob(".*.partial")]
