"""Reading merges back: good ones pass, and each kind of damage is found."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from helpers.damage import adjust, edit_manifest
from helpers.models import BLOCK_NAMES, SHAPES, State, finetune, load, random_state, save, save_sharded
from helpers.reference import reference_stitch
from helpers.runs import quick_merge
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_locstitch import VerifyReport, load_mask, verify
from hf_locstitch.artifacts.mask_file import encode_positions
from hf_locstitch.cli.main import main
from hf_locstitch.errors import CheckpointError
from loopback_hub import LoopbackHub

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two finetunes, their merge `out`, and `single` of the first alone."""
    folder = tmp_path_factory.mktemp("made")
    base = random_state(0)
    save(folder / "base", base)
    for i in range(2):
        save(folder / f"ft{i}", finetune(base, i))
    how = {"localizer": {"density": 0.3}, "show_progress": False}
    quick_merge(folder / "base", [folder / "ft0", folder / "ft1"], out=folder / "out", **how)
    quick_merge(folder / "base", [folder / "ft0"], out=folder / "single", **how)
    return folder


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all that to damage, as working directory."""
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def found(report: VerifyReport) -> list[str]:
    assert report.ok == (not report.findings)
    return [str(finding) for finding in report.findings]


def save_mask(merge: Path, name: str, mask: State) -> None:
    path = merge / "masks" / f"{name}.safetensors"
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    ones = {tensor: part.flatten().nonzero().flatten().int().numpy() for tensor, part in mask.items()}
    coded = {tensor: encode_positions([(0, positions)]) for tensor, positions in ones.items()}
    content = {tensor: torch.tensor(list(code), dtype=torch.uint8) for tensor, code in coded.items()}
    save_file(content, path, metadata=metadata)
    adjust(merge, f"masks/{name}.safetensors")


def move_a_one(merge: Path, name: str) -> tuple[State, int, int]:
    """The mask with one of its ones elsewhere in NAME: from the first one to the first zero."""
    mask = load_mask(merge, name)
    flat = mask[NAME].view(-1)
    one, zero = int(flat.nonzero()[0]), int((~flat).nonzero()[0])
    flat[one], flat[zero] = False, True
    save_mask(merge, name, mask)
    return mask, one, zero


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"localizer": {"density": 0.29, "scope": "tensor"}},
        {"localizer": {"density": 0.5}, "scale": 0.3},
        {"localizer": {"density": 0.0}},
        {"localizer": {"density": 1.0}, "include": ["*"]},
        {"localizer": {"density": 0.4}, "rest_from": "ft1", "shard_size": "500B"},
        {"localizer": {"density": 0.4}, "dtype": "float16", "scale": 2.0},
        {"localizer": {"density": 0.4}, "dtype": "float32", "exclude": ["*norm*"]},
    ],
)
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_good_merges_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, fields: dict[str, Any]
) -> None:
    base = random_state(0, dtype) | {
        "model.layers.0.zero.weight": torch.zeros(4, dtype=dtype),
        "model.layers.0.scalar": torch.tensor(2.0, dtype=dtype),
        "model.layers.0.empty": torch.empty(0, 3, dtype=dtype),
        "model.layers.0.position_ids": torch.arange(5),
        "flags": torch.tensor([True, False]),
    }
    save_sharded(tmp_path / "base", base, lambda names: [names[::2], names[1::2]])
    for i in range(3):
        save(tmp_path / f"ft{i}", finetune(base, i))
    folders = [tmp_path / f"ft{i}" for i in range(3)]
    quick_merge(tmp_path / "base", folders, out=tmp_path / "out", show_progress=False, **fields)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_locstitch.inspection.verification.values.PIECE", 7)
    report = verify("out", tensors="all")
    assert found(report) == [] and not report.skipped
    assert report.checked.tensors == report.checked.of_tensors == len(base)
    assert report.checked.masks == 3 and report.checked.inputs == 4


def test_other_dtypes_and_nan_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = random_state(0, BF16)
    wide = finetune({name: tensor.float() for name, tensor in base.items()}, 1)
    wide[NAME][2, 3] = float("nan")
    save(tmp_path / "base", base)
    save(tmp_path / "wide", wide)
    save(tmp_path / "same", finetune(base, 2))
    inputs = [tmp_path / "wide", tmp_path / "same"]
    quick_merge(tmp_path / "base", inputs, out=tmp_path / "out", allow_non_finite=True, show_progress=False)
    monkeypatch.chdir(tmp_path)
    assert found(verify("out", tensors="all")) == []


def test_a_sample_is_the_same_every_time_and_small(home: Path) -> None:
    one, other = verify("out", tensors=2), verify("out", tensors=2)
    assert one == other and found(one) == []
    assert one.checked.tensors == 2 + 2 and one.checked.of_tensors == len(SHAPES)
    assert verify("out").checked.tensors == len(BLOCK_NAMES) + 2


@pytest.mark.parametrize("file", ["model.safetensors", "masks/ft1.safetensors", "config.json", "locstitch.yaml"])
@pytest.mark.parametrize("at", [20, -5])
def test_a_flipped_byte(home: Path, file: str, at: int) -> None:
    content = bytearray((home / "out" / file).read_bytes())
    content[at] ^= 0x10
    (home / "out" / file).write_bytes(content)
    report = verify("out", tensors="all")
    assert not report.ok
    finding = report.findings[0]
    assert (finding.part, finding.where, finding.what) == ("files", file, "sha256")
    assert finding.found == hashlib.sha256(content).hexdigest() != finding.due


@pytest.mark.parametrize("file", ["model.safetensors", "masks/ft1.safetensors", "config.json", "locstitch.yaml"])
def test_a_missing_and_a_short_file(home: Path, file: str) -> None:
    content = (home / "out" / file).read_bytes()
    (home / "out" / file).write_bytes(content[:-1])
    assert found(verify("out"))[0] == f"{file}: size is {len(content) - 1} bytes, expected {len(content)} bytes"
    (home / "out" / file).unlink()
    assert found(verify("out"))[0] == f"{file}: size is absent, expected {len(content)} bytes"


def test_a_file_too_many_and_an_edited_card(home: Path) -> None:
    (home / "out" / "README.md").write_text("# edited")
    (home / "out" / ".gitattributes").write_text("*.safetensors filter=lfs")
    report = verify("out")
    assert report.ok and [finding.warning for finding in report.findings] == [True]
    assert "README.md: edited since the merge" in report.describe() and "all checks passed" in report.describe()
    (home / "out" / "pytorch_model.bin").write_bytes(b"1234")
    report = verify("out")
    assert not report.ok and "pytorch_model.bin: size is 4 bytes, expected absent" in report.describe()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["localizer"].update(density=0.2), "k at density 0.2 is 46, expected 31"),
        (lambda m: m["masks"]["ft0"].update(density=0.2), "density of mask ft0 is 0.2, expected 0.3"),
        (lambda m: m["masks"]["ft0"].update(ones=45), "number of ones is 46, expected 45"),
        (lambda m: m["masks"]["ft0"].update(ones=45), "number of ones of mask ft0 is 45, expected k = 46"),
        (lambda m: m["masks"]["ft1"].update(real_density=0.3), "real density of mask ft1 is 0.3, expected 0.29"),
        (lambda m: m.update(k=47), "k at density 0.3 is 47, expected 46"),
        (lambda m: m.update(N=155), "N is 155, expected 156"),
        (lambda m: m["covered_by"].reverse(), "coordinates covered by 0, 1, … masks is"),
        (lambda m: m["overlap"][0].update(both=1), "overlap (both, jaccard) is"),
        (lambda m: m.update(scale=0.5), "scale is 1.0, expected 0.5"),
        (lambda m: m["inputs"][1].update(ref="./ft9", name="ft9"), "list of inputs is base, ft1, ft9, expected"),
        (lambda m: m["inputs"][0]["files"].update({"model.safetensors": "0" * 64}), "expected 000"),
        (lambda m: m["masks"].pop("ft1"), "list of inputs is base, ft0, ft1, expected base, ft0"),
    ],
)
def test_a_wrong_manifest(home: Path, change: Callable[[dict[str, Any]], None], words: str) -> None:
    edit_manifest(home / "out", change)
    assert words in "\n".join(found(verify("out")))


def test_a_mask_of_other_tensors(home: Path) -> None:
    mask = load_mask(home / "out", "ft0")
    del mask[NAME]
    save_mask(home / "out", "ft0", mask)
    report = verify("out")
    assert "metadata and its tensors disagree" in found(report)[0]
    assert [str(skipped) for skipped in report.skipped] == ["values: the masks cannot be used"]
    path = home / "out" / "masks" / "ft0.safetensors"
    stated = {"format": "hf-locstitch mask 1", "ones": "0"}
    save_file(load_file(path), path, metadata={**stated, "N": "2", "shapes": '{"lm_head.weight": [2]}'})
    adjust(home / "out", "masks/ft0.safetensors")
    assert "disagree" in found(verify("out"))[0]
    coded = torch.tensor([], dtype=torch.uint8)
    save_file({NAME: coded}, path, metadata={**stated, "N": "63", "shapes": f'{{"{NAME}": [9, 7]}}'})
    adjust(home / "out", "masks/ft0.safetensors")
    text = "\n".join(found(verify("out")))
    assert f"the shape of {NAME} is [9, 7], expected [9, 6]" in text
    assert "the shape of model.layers.0.norm.weight is absent, expected [6]" in text


def test_a_moved_bit_of_a_mask(home: Path) -> None:
    _, one, zero = move_a_one(home / "single", "ft0")
    findings = verify("single", tensors="all").findings
    assert {finding.part for finding in findings} == {"values"}
    first = min(one, zero)
    assert findings[0].where == NAME and findings[0].what.startswith("2 of 54 values are wrong")
    assert findings[0].what.endswith(f"the first, at {[first // 6, first % 6]},")
    assert "the largest |task vector| left out" in findings[-1].what and findings[-1].where == "masks/ft0.safetensors"


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_a_mask_that_is_not_the_top_k(home: Path, scope: str) -> None:
    """Weights and mask agree, only the mask keeps the wrong entry."""
    how = {"density": 0.3, "scope": scope}
    quick_merge("base", ["ft0"], out="wrong", localizer=how, show_progress=False)  # type: ignore[arg-type]
    mask, _, _ = move_a_one(home / "wrong", "ft0")
    weights = reference_stitch(load(home / "base"), [load(home / "ft0")], [mask])
    save_file(weights, home / "wrong" / "model.safetensors", metadata={"format": "pt"})
    adjust(home / "wrong", "model.safetensors")
    (finding,) = verify("wrong", tensors="all").findings
    assert finding.where == "masks/ft0.safetensors" and f"left out (in {NAME})" in finding.what
    assert float(finding.found) > float(str(finding.due).split(",")[0].removeprefix("at most "))


@pytest.mark.parametrize("name", ["model.layers.0.norm.weight", "lm_head.weight"])
def test_a_changed_value_behind_an_adjusted_hash(home: Path, name: str) -> None:
    state = load_file(home / "out" / "model.safetensors")
    due = state[name].view(-1)[4].item()
    state[name].view(-1)[4] = 77.5
    save_file(state, home / "out" / "model.safetensors", metadata={"format": "pt"})
    adjust(home / "out", "model.safetensors")
    (finding,) = verify("out", tensors="all").findings
    assert (finding.where, finding.found, finding.due) == (name, "77.5", repr(due))
    assert f"1 of {state[name].numel()} values are wrong in out/model.safetensors" in finding.what


def test_another_layout(home: Path) -> None:
    state = load_file(home / "out" / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"].half()
    state["extra"] = torch.zeros(2)
    del state["lm_head.weight"]
    save_file(state, home / "out" / "model.safetensors")
    text = "\n".join(found(verify("out")))
    assert "model.norm.weight: the tensor in the merge is F16 [6], expected F32 [6] as in base" in text
    assert "extra: the tensor in the merge is F32 [2], expected absent" in text
    assert "lm_head.weight: the tensor in the merge is absent, expected F32 [11, 6]" in text


def test_other_inputs(home: Path) -> None:
    save(home / "elsewhere" / "base", random_state(9))
    report = verify("out", base="elsewhere/base")
    assert {finding.part for finding in report.findings} == {"inputs", "values"}
    assert report.findings[0].where == "base (elsewhere/base/model.safetensors)"
    save(home / "small", random_state(0, shapes={**SHAPES, NAME: (2, 6), "lm_head.weight": (3, 6)}))
    text = "\n".join(found(verify("out", finetuned=["ft0", "small"])))
    assert f"{NAME}: the tensor of ft1 (small) is F32 [2, 6], expected floating-point [9, 6]" in text
    shutil.move("base", "moved")
    report = verify("out")
    assert report.ok and report.checked.tensors == 0 and report.checked.masks == 2
    why = str(report.skipped[0])
    assert "values: base: the folder base does not exist" in why and "--base REF" in why
    assert verify("out", base="moved").checked.tensors > 0


@pytest.mark.parametrize("method", ["average", "ties"])
def test_other_methods(home: Path, method: str) -> None:
    out = home / "other"
    quick_merge("./base", ["./ft0", "./ft1"], out=out, method=method)
    report = verify("other")
    assert found(report) == [] and report.checked.tensors == 0
    assert str(report.skipped[-1]) == (
        f"values: they are recomputed for method locstitch only; this merge was made by {method}, and of its weights "
        "nothing is checked but the files' hashes and NaN and infinity. locstitch.yaml makes the same bytes again"
    )
    assert report.checked.masks == (0 if method == "average" else 2)
    (out / "config.json").unlink()
    assert not verify("other").ok


@pytest.mark.parametrize("method", ["locstitch", "average"])
def test_infinity_in_the_output(home: Path, method: str) -> None:
    """Even where hashes match; unless the recipe lets it through."""
    base = random_state(0)
    base["lm_head.weight"][1, 2] = float("inf")
    save(home / "infinite", base)
    save(home / "tuned", finetune(base, 3))
    quick_merge("./infinite", ["./tuned"], out="out2", allow_non_finite=True, method=method)
    assert found(verify("out2")) == []
    recipe = home / "out2" / "locstitch.yaml"
    recipe.write_text(recipe.read_text().replace("allow_non_finite: true", "allow_non_finite: false"))
    adjust(home / "out2", "locstitch.yaml")
    assert found(verify("out2")) == [
        "lm_head.weight: the number of values that are NaN or infinite is 1 (the first at [1, 2]), expected 0"
    ]


def test_on_the_hub(home_hub: LoopbackHub, home: Path, hub_cache: Path) -> None:
    run_id = uuid4().hex[:12]
    refs = [f"demo/{run_id}-{name}" for name in ("base", "ft0", "ft1")]
    for ref, name in zip(refs, ("base", "ft0", "ft1"), strict=True):
        home_hub.add_repo(ref, {file.name: file for file in (home / name).iterdir()})
    repo = f"demo/{run_id}-merged"
    result = quick_merge(refs[0], refs[1:], push_to=repo, show_progress=False)
    before = sorted(path for path in home.rglob("*"))
    report = verify(repo, tensors="all")
    assert found(report) == [] and not report.skipped and report.checked.tensors == len(SHAPES)
    assert report.ref == f"{repo}@{result.commit}"
    assert sorted(path for path in home.rglob("*")) == before
    home_hub.add_repo(refs[0], {"model.safetensors": home / "ft0" / "model.safetensors"})  # later, elsewhere
    assert found(verify(repo)) == []
    home_hub.add_repo(repo, {"model.safetensors": home / "out" / "model.safetensors", "notes.md": "mine"})
    text = "\n".join(found(verify(repo, tensors="all")))
    assert "model.safetensors: sha256 is" in text and "notes.md: size is 4 bytes" in text and "values are wrong" in text
    assert found(verify(f"{repo}@{result.commit}")) == []


def test_the_command(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*args: str) -> tuple[int, str, str]:
        try:
            status = main(["verify", *args])
        except SystemExit as error:
            status = int(error.code or 0)
        return status, *capsys.readouterr()

    status, out, err = run("out")
    assert status == 0 and out == "" and "values     7 of 8 tensors" in err
    assert err.endswith("result     all checks passed\n")
    assert run("out", "--quiet") == (0, "", "")
    status, out, err = run("out", "--json", "--tensors", "all")
    assert status == 0 and err == "" and json.loads(out)["checked"]["tensors"] == len(SHAPES)
    (home / "out" / "config.json").unlink()
    status, out, err = run("out", "--quiet")
    assert status == 1 and err.startswith("failed     config.json: size is absent") and "1 check failed" in err
    status, out, _ = run("out", "--json")
    assert status == 1 and json.loads(out)["findings"][0]["where"] == "config.json" and not json.loads(out)["ok"]
    for args, words in {
        ("base",): "no locstitch.json",
        ("nowhere/at@",): "neither an existing folder",
        ("./nowhere",): "does not exist",
        ("out", "--tensors", "0"): "--tensors",
        ("out", "--ft", "ft0"): "--ft expects 2, got 1",
        ("out", "--base", "./none"): "does not exist",
    }.items():
        status, out, err = run(*args)
        assert (status, out) == (2, "") and words in err, err


def test_what_was_not_checked_is_part_of_the_verdict(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("base")
    assert main(["verify", "out"]) == 0
    assert capsys.readouterr().err.endswith("result     what could be checked holds; not checked: values\n")
    assert main(["verify", "out", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] and told["verdict"] == "what could be checked holds; not checked: values"
    assert [skipped["what"] for skipped in told["skipped"]] == ["values"]
    (home / "out" / "config.json").unlink()
    assert verify("out").verdict == "1 check failed"


def test_shards_that_were_not_fetched_were_not_searched_for_nan(
    home_hub: LoopbackHub, home: Path, hub_cache: Path
) -> None:
    quick_merge("./base", ["./ft0"], out="parts", localizer={"density": 0.3}, shard_size="500B")
    repo = f"demo/{uuid4().hex[:12]}"
    home_hub.add_repo(repo, {p.relative_to("parts").as_posix(): p for p in Path("parts").rglob("*") if p.is_file()})
    report = verify(repo, tensors=1)
    assert report.ok and "NaN and infinity" in report.verdict
    assert verify(repo, tensors="all").verdict == "all checks passed"


def test_no_manifest_that_can_be_read(home: Path) -> None:
    for content in ("{", "[]", '{"method": "locstitch"}'):
        (home / "out" / "locstitch.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"locstitch\.json"):
            verify("out")


def test_a_strange_file_is_a_finding_only_if_it_could_be_loaded(home: Path) -> None:
    (home / "out" / "notes.md").write_text("mine")
    report = verify("out")
    assert report.ok and "notes.md" in report.describe()
    (home / "out" / "pytorch_model.bin").write_text("old")
    assert not verify("out").ok


def test_many_findings_are_cut_short(home: Path) -> None:
    for i in range(30):
        (home / "out" / f"{i}.bin").write_text("x")
    report = verify("out")
    assert len(report.findings) == 30 and "and 10 more" in report.describe()
    assert report.describe().endswith("30 checks failed")
