"""Merges with adapters among the inputs are those of the full finetunes that the adapters stand for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest
import torch
import yaml
from helpers.adapters import merged_by_peft, on_disk, save_base, save_lora
from helpers.launch import launch
from helpers.models import load, same_bits
from helpers.runs import Killed, files_of, quick_localize, quick_merge, quick_stitch
from helpers.streaming import served

from hf_locstitch import Magnitude, load_localized, load_mask, verify
from hf_locstitch.adapters.adapted_model import AdaptedModel
from hf_locstitch.cli.main import main
from hf_locstitch.engine.shard_writer import ShardWriter
from hf_locstitch.localize import scan
from hf_locstitch.localize.scan import Scan
from loopback_hub import LoopbackHub

LORAS = {
    "a": {"target_modules": "all-linear"},
    "b": {"use_dora": True, "modules_to_save": ["norm", "lm_head"]},
    "c": {"bias": "all", "target_modules": ["up_proj"]},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, in bfloat16; adapters lora-a, lora-b, lora-c; and full-a, full-b, full-c, in float32, with them merged."""
    folder = tmp_path_factory.mktemp("made")
    base = save_base(folder / "base", torch.bfloat16)
    for seed, (name, options) in enumerate(LORAS.items()):
        adapter = save_lora(folder / f"lora-{name}", base, seed, **options)
        on_disk(merged_by_peft(base, adapter), folder / f"full-{name}")
    return folder


@pytest.fixture
def home(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def same(one: Path, other: Path) -> bool:
    """Whether two merges have the same weights, and the same masks."""
    masks = [sorted(path.name for path in (out / "masks").glob("*")) for out in (one, other)]
    assert masks[0] == masks[1]
    for name in (Path(file).stem for file in masks[0]):
        ours, theirs = load_mask(one, name), load_mask(other, name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[tensor], theirs[tensor]) for tensor in ours)
    return same_bits(load(one), load(other))


@pytest.mark.parametrize("method", ["locstitch", "average", "task-arithmetic", "ties", "dare"])
def test_as_the_full_finetunes(method: str, home: Path, tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    for kind in ("lora", "full"):
        quick_merge("base", [f"{kind}-{name}" for name in names], names=names, out=tmp_path / kind, method=method)
    assert same(tmp_path / "lora", tmp_path / "full")
    assert not same_bits(load(tmp_path / "lora"), load(home / "base"))


def test_beside_a_full_finetune(home: Path, tmp_path: Path) -> None:
    """In the other tensors, those of the adapter's modules to save are taken, with the base's config."""
    for kind in ("lora", "full"):
        refs = ["full-a", f"{kind}-b"]
        quick_merge(
            "base", refs, names=["a", "b"], out=tmp_path / kind, rest_from="b", localizer=Magnitude(density=0.2)
        )
    assert same(tmp_path / "lora", tmp_path / "full")
    assert not torch.equal(load(tmp_path / "lora")["lm_head.weight"], load(home / "base")["lm_head.weight"])
    assert (tmp_path / "lora" / "config.json").read_bytes() == (home / "base" / "config.json").read_bytes()


def test_localized_and_stitched(home: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        quick_localize("base", f"lora-{name}", name=name, out=tmp_path / name, localizer=Magnitude(density=0.1))
        assert verify(tmp_path / name, base="base", finetuned=[f"lora-{name}"], tensors="all").ok
    quick_stitch("base", [tmp_path / "a", tmp_path / "b"], out=tmp_path / "stitched")
    quick_merge("base", ["lora-a", "lora-b"], names=["a", "b"], out=tmp_path / "out", localizer=Magnitude(density=0.1))
    assert same(tmp_path / "stitched", tmp_path / "out")


def test_verified(home: Path, tmp_path: Path) -> None:
    refs = ["lora-a", "lora-b"]
    quick_merge("base", refs, out=tmp_path / "out")
    report = verify(tmp_path / "out", base="base", finetuned=refs, tensors="all")
    assert report.ok and report.checked.inputs == 3, report.describe()
    for file, kind in (("adapter_config.json", "inputs"), ("adapter_model.safetensors", "inputs")):
        shutil.copytree("lora-a", tmp_path / file)
        content = (tmp_path / file / file).read_bytes()
        (tmp_path / file / file).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        if file.endswith(".json"):
            (tmp_path / file / file).write_bytes(content.replace(b'"lora_alpha": 8', b'"lora_alpha": 9'))
        report = verify(tmp_path / "out", base="base", finetuned=[tmp_path / file, "lora-b"], tensors="all")
        assert not report.ok and any(finding.part == kind and file in finding.where for finding in report.findings)


def test_what_the_adapters_are_made_of_is_recorded(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick_merge("base", ["lora-a", "full-b"], out=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "locstitch.json").read_text())
    files = {entry["name"]: entry["files"].keys() for entry in record["inputs"]}
    assert files["lora-a"] == {"adapter_config.json", "adapter_model.safetensors"}
    assert files["base"] == files["full-b"] == {"model.safetensors"}
    assert record["versions"].keys() >= {"peft", "transformers"}
    quick_merge("base", ["full-a", "full-b"], out=tmp_path / "full")
    assert "peft" not in json.loads((tmp_path / "full" / "locstitch.json").read_text())["versions"]
    shutil.copytree("lora-a", tmp_path / "lora-a")
    shutil.copytree("base", tmp_path / "base")
    shutil.copytree("full-b", tmp_path / "full-b")
    config = tmp_path / "lora-a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    monkeypatch.chdir(tmp_path)
    assert main(["merge", "out/locstitch.yaml", "--out", "again", "--quiet"]) == 2
    assert "the recipe expects" in capsys.readouterr().err


@pytest.mark.parametrize(("owner", "method", "calls"), [(Scan, "_offer", 9), (ShardWriter, "_merge", 3)])
def test_resumed(
    owner: type, method: str, calls: int, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that were scanned before the kill are not computed again."""
    names, how = ["lora-a", "lora-b"], {"localizer": Magnitude(density=0.1)}
    computed: list[str] = []
    original, compute, count = getattr(owner, method), AdaptedModel.compute, iter(range(calls))

    def killed(*args: object) -> object:
        if next(count, None) is None:
            raise Killed
        return original(*args)

    def counted(self: AdaptedModel, layer: object) -> object:
        computed.append(str(layer))
        return compute(self, layer)  # type: ignore[arg-type]

    monkeypatch.setattr(AdaptedModel, "compute", counted)
    quick_merge("base", names, out=tmp_path / "whole", **how)
    layers, computed[:] = len(computed), []
    monkeypatch.setattr(owner, method, killed)
    with pytest.raises(Killed):
        quick_merge("base", names, out=tmp_path / "out", **how)
    monkeypatch.setattr(owner, method, original)
    assert len(list(tmp_path.glob(".out.*.partial"))) == 1
    before, computed[:] = len(computed), []
    quick_merge("base", names, out=tmp_path / "out", **how)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert 0 < before <= layers and len(computed) < layers


def test_each_layer_is_computed_once(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[object] = []
    compute = AdaptedModel.compute
    monkeypatch.setattr(AdaptedModel, "compute", lambda self, layer: computed.append(layer) or compute(self, layer))
    quick_merge("base", ["lora-a"], out=tmp_path / "out", localizer=Magnitude(density=0.1))
    assert len(computed) == len(set(computed)) == 14


@pytest.mark.parametrize("density", [0.02, 0.3])
def test_a_sample_of_few_layers(density: float, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only some layers tell about the threshold, the masks are those of all scores."""
    for name, value in {"SAMPLE": 512, "SMALLEST_SAMPLE": 512, "SAMPLE_RUN": 32, "LEAST": 2}.items():
        monkeypatch.setattr(scan, name, value)
    sampled: list[int] = []
    some_of = scan._some_of
    monkeypatch.setattr(scan, "_some_of", lambda tensors: sampled.append(len(some_of(tensors))) or some_of(tensors))
    for kind in ("lora", "full"):
        refs, how = [f"{kind}-a", f"{kind}-b"], Magnitude(density=density)
        quick_merge("base", refs, names=["a", "b"], out=tmp_path / kind, localizer=how)
    assert sampled and max(sampled) < 14
    assert same(tmp_path / "lora", tmp_path / "full")


def test_several_processes(home: Path, tmp_path: Path) -> None:
    refs = ["./lora-a", "./full-b", "./lora-c"]
    quick_merge("./base", refs, out=tmp_path / "out1")
    done = launch(2, home, "--base", "./base", "--ft", *refs, "--out", tmp_path / "out2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert files_of(tmp_path / "out1") == files_of(tmp_path / "out2")


def test_full_finetunes_need_no_peft(home: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from hf_locstitch import merge_from_hub; "
        f"merge_from_hub('base', ['full-a', 'full-b'], out={str(tmp_path / 'out')!r}, figures=False); "
        "assert not {'torch', 'peft', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=home)


@pytest.fixture
def repos(made: Path, home_hub: LoopbackHub, hub_cache: Path) -> dict[str, str]:
    """Of the base and two adapters, whose configs name the base's repo."""
    run = uuid4().hex[:8]
    names = {name: f"demo/{run}-{name}" for name in ("base", "lora-a", "lora-b")}
    for name, repo in names.items():
        files = {path.name: path.read_bytes() for path in (made / name).iterdir() if path.suffix != ".md"}
        if "adapter_config.json" in files:
            config = json.loads(files["adapter_config.json"])
            files["adapter_config.json"] = json.dumps({**config, "base_model_name_or_path": names["base"]}).encode()
        home_hub.add_repo(repo, files)
    home_hub.requests.clear()
    return names


def test_from_the_hub_by_one_command(repos: dict[str, str], home_hub: LoopbackHub, tmp_path: Path) -> None:
    """Without naming the base; each file is fetched once; the pinned recipe makes the same again."""
    pushed = f"{repos['base']}-merged"
    refs = [repos["lora-a"], f"{repos['lora-b']}@main"]
    result = quick_merge(None, refs, out=tmp_path / "out", push_to=pushed)
    sent = {name: served(home_hub, repo) for name, repo in repos.items()}
    assert [list(files) for files in sent.values()] == [["model.safetensors"], *[["adapter_model.safetensors"]] * 2]
    recipe = yaml.safe_load((tmp_path / "out" / "locstitch.yaml").read_text())
    pins = [recipe["base"]["ref"], *(entry["ref"] for entry in recipe["finetuned"])]
    assert pins == [f"{repo}@{home_hub.head(repo)}" for repo in repos.values()]
    assert verify(pushed, tensors="all").ok and result.commit is not None
    quick_merge(None, refs, out=tmp_path / "again")
    ours, theirs = files_of(tmp_path / "out"), files_of(tmp_path / "again")
    assert {**ours, "README.md": ""} == {**theirs, "README.md": ""}  # whose commands differ


def test_a_refit_without_data(home: Path, tmp_path: Path) -> None:
    """That of the full finetunes; updates of low rank are told as such, whichever way they come."""
    joint = {"localizer": {"method": "joint"}, "stitch": "refit"}
    quick_merge("base", ["lora-a", "lora-c"], out=tmp_path / "loras", names=["a", "c"], **joint)
    quick_merge("base", ["full-a", "full-c"], out=tmp_path / "full", names=["a", "c"], **joint)
    assert same(tmp_path / "loras", tmp_path / "full")
    quick_localize("base", "lora-a", out=tmp_path / "one", stitch="refit")
    assert load_localized(tmp_path / "one").refitted
