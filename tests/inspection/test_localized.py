"""Localized checkpoints looked into and checked; models that were stitched from them, likewise."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from helpers.damage import adjust, replace_tensor
from helpers.families import finetunes
from helpers.models import State, finetune, load, random_state, save
from helpers.runs import quick_localize, quick_merge, quick_stitch
from safetensors import safe_open
from safetensors.torch import save_file

from hf_locstitch import (
    Magnitude,
    inspect,
    load_localized,
    load_mask,
    verify,
)
from hf_locstitch.cli.main import main
from hf_locstitch.errors import CheckpointError, IntegrityError, MismatchError, RecipeError
from loopback_hub import LoopbackHub

NAME = "model.layers.1.mlp.up_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def make(folder: Path, figures: bool = False, **fields: Any) -> Path:
    """base, maths, code, their localized checkpoints loc-maths and loc-code, and `stitched` of both."""
    base = random_state(0, torch.bfloat16)
    save(folder / "base", base)
    states: dict[str, State] = {
        "maths": finetune({name: tensor.float() for name, tensor in base.items()}, 1),  # wider than the base
        "code": finetune(base, 2),
    }
    for name, state in states.items():
        save(folder / name, state)
        how = {"localizer": Magnitude(density=0.3), "figures": figures, **fields}
        quick_localize(folder / "base", folder / name, out=folder / f"loc-{name}", **how)
    quick_stitch(folder / "base", [folder / "loc-maths", folder / "loc-code"], out=folder / "stitched", figures=figures)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all that to damage, as working directory."""
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def test_inspect_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(make(tmp_path / "home", figures=True))
    found = inspect("loc-maths", figures=tmp_path / "drawn")
    mask = load_mask("loc-maths")
    assert found.kind == "localized" and (found.N, found.k, found.covered_by) == (156, 46, [110, 46])
    (view,) = found.masks
    ones = {tensor: int(kept.sum()) for tensor, kept in mask.items()}
    assert (view.name, view.ref, view.ones) == ("maths", "./maths", 46) and view.densest[0][1] == max(
        ones.values()
    ) / 46
    assert view.norm is not None  # noted when it was localized
    assert {Path(figure).stem for figure in found.figures} == {"places", "layers", "task-vectors", "masks"}
    assert main(["inspect", "loc-maths"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("localized  ./loc-maths\nlocalizer  method magnitude, density 0.3")
    assert "maths: 46 ones, density 29.49 % (requested 30 %), ‖τ‖ about" in said and "no anomalies" in said
    # a stitched model passes on what its parts had noted
    assert [mask.norm for mask in inspect("stitched").masks] == [view.norm, inspect("loc-code").masks[0].norm]


def test_inspect_several(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick_merge("base", ["maths", "code"], out="merged", localizer=Magnitude(density=0.3))
    apart, together = inspect("loc-maths", "loc-code"), inspect("merged")
    assert apart.masks == together.masks and apart.overlap == together.overlap
    assert (apart.covered_by, apart.layers, apart.k) == (together.covered_by, together.layers, 46)
    assert main(["inspect", "loc-maths", "loc-code", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["overlap"][0]["masks"] == ["maths", "code"]
    with pytest.raises(RecipeError, match="two masks are named 'maths'"):
        inspect("loc-maths", "loc-maths")
    with pytest.raises(CheckpointError, match="merged is a merged model"):
        inspect("loc-maths", "merged")
    quick_localize("base", "code", out="fewer", exclude=["*norm*"])
    with pytest.raises(MismatchError, match="ranges over"):
        inspect("loc-maths", "fewer")
    sampled = inspect("loc-maths", "loc-code", inputs=True)
    assert all(view.norm for view in sampled.masks)
    mask = home / "loc-maths" / "masks" / "maths.safetensors"
    mask.write_bytes(mask.read_bytes()[:-9] + b"\xff" * 9)
    with pytest.raises(IntegrityError, match="damaged"):
        inspect("loc-maths", "loc-code")


@pytest.mark.parametrize("fields", [{}, {"localizer": Magnitude(density=0.29, scope="tensor")},
                                    {"localizer": Magnitude(density=1.0)}, {"include": ["*"]}])  # fmt: skip
def test_good_ones_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]) -> None:
    monkeypatch.chdir(make(tmp_path / "home", **fields))
    for ref in ("loc-maths", "loc-code", "stitched"):
        report = verify(ref, tensors="all")
        assert report.findings == () and report.skipped == (), report
        assert report.checked.tensors == report.checked.of_tensors > 0 and report.checked.masks
    assert verify("loc-maths").checked.coordinates > 0


def replace_values(folder: Path, change: Any, file: str = "values/maths.safetensors") -> None:
    """Change a file of a localized checkpoint, and state its new hash in the manifest."""
    path = folder / file
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    record = json.loads((folder / "locstitch.json").read_text())
    record["outputs"][file] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "locstitch.json").write_text(json.dumps(record))


def test_a_wrong_value_is_found(home: Path) -> None:
    one = load_localized("loc-maths")
    start = one.stored(NAME).start

    def flip(content: bytearray) -> None:
        content[start] ^= 1  # the last bit of a float32, which bf16 would not show

    replace_values(home / "loc-maths", flip)
    (finding,) = verify("loc-maths", tensors="all").findings
    assert finding.part == "values" and finding.where == NAME and "1 of 54 values are wrong" in finding.what
    assert main(["verify", "loc-maths", "--tensors", "all", "--quiet"]) == 1


def test_as_many_values_as_ones_in_each_tensor(home: Path) -> None:
    file, other = "values/maths.safetensors", "model.layers.0.norm.weight"
    taken = load_localized("loc-maths").values(NAME)[-1:]
    path = home / "loc-maths" / file
    with safe_open(path, framework="pt") as opened:
        metadata, state = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file({**state, NAME: state[NAME][:-1], other: torch.cat([state[other], taken])}, path, metadata=metadata)
    adjust(home / "loc-maths", file)
    found = {finding.where: finding.what for finding in verify("loc-maths", tensors="all").findings}
    assert found == {NAME: "the number of values", other: "the number of values"}


def test_damaged_files_are_found(home: Path) -> None:
    path = home / "loc-maths" / "values" / "maths.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    findings = verify("loc-maths").findings
    assert findings[0].part == "files" and "sha256" in findings[0].what
    path.unlink()
    assert any("lacks values/maths" in str(finding) for finding in verify("loc-maths").findings)


def test_other_inputs_than_it_was_made_from(home: Path) -> None:
    shutil.rmtree("maths")
    report = verify("loc-maths")
    assert report.ok and str(report.skipped[0]).startswith("values: maths")
    assert report.verdict == "what could be checked holds; not checked: values"
    save(home / "maths", finetune(random_state(0), 5))
    parts = {finding.part for finding in verify("loc-maths").findings}
    assert parts == {"inputs", "values"}


def test_stitched_models_are_checked_against_the_finetunes(home: Path) -> None:
    record = json.loads((home / "stitched" / "locstitch.json").read_text())
    assert [entry["ref"] for entry in record["inputs"]] == ["./base", "./maths", "./code"]
    assert [entry["ref"] for entry in record["localized"].values()] == ["./loc-maths", "./loc-code"]
    assert (
        record["inputs"][1]["files"]
        == json.loads((home / "loc-maths/locstitch.json").read_text())["inputs"][1]["files"]
    )
    card = (home / "stitched" / "README.md").read_text()
    assert "local folder `./loc-maths`, localized from `./maths`" in card
    save(home / "other", finetune(random_state(0), 9))
    wrong = verify("stitched", base="base", finetuned=["other", "code"], tensors="all")
    assert not wrong.ok and any(finding.part == "values" for finding in wrong.findings)


@pytest.fixture(scope="module")
def refitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, ft and ft1; these localized, as `solved`, with values solved for again, and `plain`; `stitched` of both."""
    home = tmp_path_factory.mktemp("refitted")
    finetunes(home)
    how = {"localizer": Magnitude(density=0.3), "show_progress": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        quick_localize("base", "ft", out="solved", stitch="refit", **how)
        quick_localize("base", "ft1", out="plain", **how)
        quick_stitch("base", ["solved", "plain"], out="stitched")
    return home


@pytest.fixture
def stitched(refitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all that to damage, as working directory."""
    shutil.copytree(refitted, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def test_a_stitch_of_refitted_values_is_compared_with_the_localized_checkpoint(stitched: Path) -> None:
    report = verify("stitched", tensors="all")
    assert report.ok and not report.findings and not report.skipped, report.describe()
    masks = json.loads((stitched / "stitched" / "locstitch.json").read_text())["masks"]
    assert {name: mask["refitted"] for name, mask in masks.items()} == {"ft": True, "ft1": False}
    at = load_mask("stitched", "ft")[QUERY] & ~load_mask("stitched", "ft1")[QUERY]
    replace_tensor(stitched / "stitched", QUERY, lambda tensor: tensor + 1e-4 * at)
    found = verify("stitched", tensors="all").findings
    assert found and {finding.where for finding in found} == {QUERY}
    assert f"{int(at.sum())} of {at.numel()} values are wrong" in found[0].what


@pytest.mark.parametrize("moved", [["ft", "ft1"], ["ft"]])
def test_a_stitch_holds_without_the_finetuned_models(stitched: Path, moved: list[str]) -> None:
    for name in moved:
        shutil.rmtree(name)
    report = verify("stitched", tensors="all")
    assert report.ok and [skipped.what for skipped in report.skipped] == ["top k"]
    assert f"{' and '.join(moved)} not at hand".replace(" and ", ", ") in report.describe()
    assert report.checked.tensors == report.checked.of_tensors and not report.checked.partly


def test_localized_checkpoints_that_are_elsewhere(stitched: Path) -> None:
    shutil.move("solved", "moved")
    report = verify("stitched", tensors="all")
    assert report.ok and [skipped.what for skipped in report.skipped] == ["values under the mask of ft"]
    assert (
        "the folder solved does not exist" in report.describe() and "of them outside their masks" in report.describe()
    )
    mask = load_mask("stitched", "ft")
    numel = sum(tensor.numel() for tensor in load(Path("base")).values())
    assert report.checked.coordinates == numel - sum(int(part.sum()) for part in mask.values())
    report = verify("stitched", finetuned=["moved", "plain"], tensors="all")
    assert report.ok and not report.skipped
    replace_tensor(stitched / "moved", QUERY, lambda values: values + 1, "values/ft.safetensors")
    found = verify("stitched", finetuned=["moved", "ft1"], tensors="all").findings
    assert [(finding.part, finding.where) for finding in found] == [
        ("inputs", "ft (moved/values/ft.safetensors)"),
        ("values", QUERY),
    ]


def test_a_mask_of_a_stitch_that_is_another(stitched: Path) -> None:
    shutil.copy("stitched/masks/ft1.safetensors", "stitched/masks/ft.safetensors")
    adjust(stitched / "stitched", "masks/ft.safetensors")
    found = verify("stitched", tensors="all").findings
    assert any("that solved does not have" in finding.what and finding.part == "masks" for finding in found)


def test_from_the_hub_and_back(
    home: Path, home_hub: LoopbackHub, hub_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each step in one commit, without a model on this machine; the bytes are those of folders."""
    run_id = uuid4().hex[:12]
    at = {name: f"demo/{run_id}-{name}" for name in ("base", "maths", "code", "stitched")}
    for name in ("base", "maths", "code"):
        (home / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n# parent\n")
        home_hub.add_repo(at[name], {file.name: file for file in (home / name).iterdir()})
    for name in ("maths", "code"):
        target = f"{at[name]}-localized"
        command = ["localize", "--base", at["base"], "--ft", at[name], "--name", name, "--density", "0.3"]
        assert main([*command, "--push-to", target, "--no-cache", "--no-figures", "--quiet"]) == 0, (
            capsys.readouterr().err
        )
        assert len(home_hub.commits(target)) == 2
        for file in (f"masks/{name}.safetensors", f"values/{name}.safetensors"):
            assert file in home_hub.files(target)
        assert (
            home_hub.read(target, f"values/{name}.safetensors")[-60:]
            == (home / f"loc-{name}" / "values" / f"{name}.safetensors").read_bytes()[-60:]
        )
    assert not list(hub_cache.glob("**/model.safetensors"))
    card = home_hub.read(f"{at['maths']}-localized", "README.md").decode()
    assert "license: apache-2.0" in card and f"- {at['maths']}\n" in card and "base_model_relation: adapter" in card
    assert f"--localized {at['maths']}-localized" in card and "localized-checkpoint" in card

    refs = [f"{at['maths']}-localized", f"{at['code']}-localized"]
    command = ["stitch", "--base", at["base"], "--localized", *refs, "--no-figures", "--no-cache"]
    command += ["--push-to", at["stitched"]]
    assert main([*command, "--quiet"]) == 0, capsys.readouterr().err
    assert len(home_hub.commits(at["stitched"])) == 2
    assert home_hub.read(at["stitched"], "model.safetensors") == (home / "stitched" / "model.safetensors").read_bytes()
    assert verify(at["stitched"], tensors="all").ok and verify(refs[0], tensors="all").ok
    assert load_mask(refs[0]).keys() == load_mask(at["stitched"], "maths").keys()
    assert inspect(*refs).masks == inspect(at["stitched"]).masks
    one = load_localized(refs[0])
    assert one.base.commit == home_hub.head(at["base"]) and one.finetuned.ref.startswith(f"{at['maths']}@")

    home_hub.add_repo(at["base"], {"model.safetensors": (home / "code" / "model.safetensors").read_bytes()})
    assert main([*command, "--quiet"]) == 2  # the base moved on: its hash is another, which the Hub tells at once
    assert "Use the base that it was localized against" in capsys.readouterr().err
    assert main([*command, "--base", one.base.ref, "--quiet"]) == 0


def test_weights_that_nobody_changed_are_not_kept(
    home: Path, home_hub: LoopbackHub, hub_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are in no mask, though more were asked for; what is kept has the finetune's values."""
    base = random_state(0, torch.bfloat16)
    few = {**base, NAME: base[NAME] + 1}
    save(home / "few", few)
    run_id = uuid4().hex[:12]
    for name in ("base", "few"):
        home_hub.add_repo(f"demo/{run_id}-{name}", {file.name: file for file in (home / name).iterdir()})
    command = ["localize", "--base", f"demo/{run_id}-base", "--ft", f"demo/{run_id}-few", "--density", "0.8"]
    assert main([*command, "--out", "loc", "--no-cache", "--no-figures", "--quiet"]) == 0, capsys.readouterr().err
    assert not list(hub_cache.glob("**/model.safetensors"))
    one = load_localized("loc")
    assert one.ones == few[NAME].numel() == 54 < int(0.8 * one.N)
    for name in one.shapes:
        assert torch.equal(one.values(name), few[name][one.mask(name)])
