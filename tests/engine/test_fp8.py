"""Merges with FP8 checkpoints among the inputs are those of the bfloat16 checkpoints that these stand for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from demo.skills import make_tokenizer
from helpers.adapters import save_lora
from helpers.data import write_texts
from helpers.families import build, family
from helpers.fp8 import dequantized, fp8_config, quantized, save_fp8
from helpers.models import finetune, load, random_state, same_bits, save
from helpers.ranks import merge_in_ranks
from helpers.refits import HOW, SMALL
from helpers.runs import Killed, files_of, merge_folders, quick_localize, quick_merge, quick_stitch
from helpers.streaming import PASSING, empty_cache, merged

from hf_locstitch import Magnitude, Saliency, load_mask, verify
from hf_locstitch.cli.main import main
from hf_locstitch.engine.shard_writer import ShardWriter
from hf_locstitch.errors import RecipeError
from hf_locstitch.localize.scan import Scan
from hf_locstitch.runtime.settings import Settings
from loopback_hub import LoopbackHub

SHAPES = {"embed.w": (30, 40)} | {f"layers.{i}.w": (35, 40) for i in range(4)} | {"layers.3.norm.w": (40,)}
NAMES = {"base": ["base", "plain-base"], "a": ["a", "plain-a"], "b": ["plain-b", "plain-b"]}


def apart(names: Sequence[str]) -> list[list[str]]:
    """In three files: scales lie before their weights, after them, and in a file without anything else."""
    weights, scales = [n for n in names if "scale" not in n], [n for n in names if "scale" in n]
    return [scales[:1] + weights[3:], weights[:3] + scales[1:2], scales[2:]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base, in three files, and a, in FP8; plain-base, plain-a and plain-b in bfloat16."""
    start = random_state(0, shapes=SHAPES)
    states = {"base": quantized(start), "a": quantized(finetune(start, 1)), "b": quantized(finetune(start, 2))}
    save_fp8(tmp_path / "base", states["base"], apart)
    save_fp8(tmp_path / "a", states["a"])
    for name, state in states.items():
        save(tmp_path / f"plain-{name}", dequantized(state))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def entries(which: int) -> list[dict[str, str]]:
    """A finetune in FP8 and one in bfloat16, or (1) both in bfloat16."""
    return [{"ref": NAMES[name][which], "name": name} for name in "ab"]


def same_masks(one: Path, other: Path) -> bool:
    names = sorted(path.stem for path in (one / "masks").glob("*"))
    both = [(load_mask(one, name), load_mask(other, name)) for name in names]
    return len(both) == 2 and all(torch.equal(a[tensor], b[tensor]) for a, b in both for tensor in a)


@pytest.mark.parametrize("method", ["locstitch", "average", "ties", "task-arithmetic"])
@pytest.mark.parametrize("base", ["base", "plain-base"])
def test_as_in_bfloat16(base: str, method: str, home: Path) -> None:
    """Of an FP8 and a bfloat16 finetune, over an FP8 base and a bfloat16 one; chunks end within rows and blocks."""
    how = Settings(chunk=97, workers=2)
    out = [
        merge_folders(home, entries(which), how, base=ref, method=method)
        for which, ref in enumerate([base, "plain-base"])
    ]
    assert same_bits(load(out[0]), load(out[1]))
    assert not same_bits(load(out[0]), load(home / "plain-base"))
    assert method != "locstitch" or same_masks(*out)
    assert "quantization_config" not in json.loads((out[0] / "config.json").read_text())
    report = verify(out[0], tensors="all") if method == "locstitch" else None
    assert report is None or report.ok, report.describe()


def test_other_tensors_and_config_from_an_fp8_finetune(home: Path) -> None:
    out = merge_folders(home, entries(0), base="plain-base", rest_from="a", files_from="a", include=["layers.0.*"])
    assert torch.equal(load(out)["layers.1.w"], load(home / "plain-a")["layers.1.w"])
    assert json.loads((out / "config.json").read_text()) == {"model_type": "toy"}


def test_verify_finds_a_value_that_no_blocks_stand_for(home: Path) -> None:
    out = merge_folders(home, entries(0), base="base")
    file = out / "model-00002-of-00003.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    report = verify(out, tensors="all")
    assert not report.ok and any(finding.part == "values" for finding in report.findings)


def test_localized_and_stitched(home: Path) -> None:
    how = Magnitude(density=0.1)
    for which in (0, 1):
        base = NAMES["base"][which]
        for name in "ab":
            folder = home / f"{name}{which}"
            quick_localize(base, NAMES[name][which], name=name, out=folder, localizer=how)
            assert verify(folder, tensors="all").ok
        quick_stitch(base, [home / f"a{which}", home / f"b{which}"], out=home / f"stitched{which}")
    assert same_bits(load(home / "stitched0"), load(home / "stitched1"))


@pytest.mark.parametrize(("owner", "method", "calls"), [(Scan, "_offer", 3), (ShardWriter, "_merge", 3)])
def test_resumed(owner: type, method: str, calls: int, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(out: str) -> None:
        quick_merge("base", ["a", "plain-b"], out=out)

    original, count = getattr(owner, method), iter(range(calls))

    def killed(*args: object) -> object:
        if next(count, None) is None:
            raise Killed
        return original(*args)

    run("whole")
    monkeypatch.setattr(owner, method, killed)
    with pytest.raises(Killed):
        run("out")
    monkeypatch.setattr(owner, method, original)
    assert len(list(home.glob(".out.*.partial"))) == 1
    run("out")
    assert files_of(home / "out") == files_of(home / "whole")


def test_several_processes(home: Path) -> None:
    for count in (1, 2):
        merge_in_ranks(count, home / f"out{count}", {"base": "./base", "finetuned": ["./a", "./plain-b"]})
    assert files_of(home / "out1") == files_of(home / "out2")


@pytest.mark.parametrize("method", ["locstitch", "average"])
def test_from_the_hub_as_it_arrives(method: str, home: Path, home_hub: LoopbackHub, hub_cache: Path) -> None:
    """Into the cache or not; scales that come before their weight, and after it, in another file too."""
    run, repos = uuid4().hex[:8], []
    for folder in ("base", "a", "plain-b"):
        repos.append(f"demo/{run}-{folder[-1]}ft")
        home_hub.add_repo(repos[-1], {path.name: path for path in (home / folder).iterdir()})
    ways = {"cached": Settings(chunk=97, workers=2), "passing": replace(PASSING, window=100)}
    for name, how in ways.items():
        merged(repos, home / name, how, method=method)
        empty_cache()
    quick_merge("plain-base", ["plain-a", "plain-b"], names=["a", "b"], out=home / "plain", method=method)
    assert files_of(home / "cached") == files_of(home / "passing")
    assert same_bits(load(home / "passing"), load(home / "plain"))


def test_what_the_plan_and_the_card_say(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["merge", "--base", "./base", "--ft", "./a", "./plain-b", "--out", "out", "--no-figures"]
    assert main([*asked, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "base       base (dequantized from FP8 blocks of 4×3)" in said
    assert main([*asked, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["dequantized"] == {"base": "FP8 blocks of 4×3", "a": "FP8 blocks of 4×3"}
    assert main([*asked, "--quiet"]) == 0
    card = (home / "out" / "README.md").read_text()
    assert "| dequantized | base from FP8 blocks of 4×3, a from FP8 blocks of 4×3 |" in card
    files = {path.name: path.stat().st_size for path in (home / "out").glob("*.safetensors")}
    assert told["shards"].keys() == files.keys()  # none for the file that held only scales
    assert sum(told["shards"].values()) == 2 * sum(map(len, map(torch.flatten, load(home / "plain-base").values())))
    stored = sum(path.stat().st_size for folder in ("base", "a", "plain-b") for path in (home / folder).glob("*.saf*"))
    assert stored <= told["bytes"]["read"] <= 2 * stored


@pytest.fixture
def llamas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base and two finetunes that read letters, in FP8 and (plain-) in bfloat16, and texts."""
    config = (family(build("llama", torch.bfloat16), tmp_path / "made")[0] / "config.json").read_text()
    for name in ("base", "ft0", "ft1"):
        stored = quantized(load(tmp_path / "made" / name))
        save(tmp_path / name, stored, fp8_config(**json.loads(config)))
        save(tmp_path / f"plain-{name}", dequantized(stored), config)
        for folder in (name, f"plain-{name}"):
            make_tokenizer().save_pretrained(tmp_path / folder)
    write_texts(tmp_path / "texts.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("options", [{}, {"data": ["texts.jsonl"] * 2, "stitch": SMALL}], ids=["without", "on"])
def test_refits(options: dict[str, Any], llamas: Path) -> None:
    """Without data, and on inputs."""
    for prefix in ("", "plain-"):
        refs, options = [f"{prefix}ft0", f"{prefix}ft1"], {"stitch": "refit", **options}
        quick_merge(f"{prefix}base", refs, names=["a", "b"], out=f"{prefix}out", localizer=HOW, **options)
    assert same_bits(load(llamas / "out"), load(llamas / "plain-out"))


def test_localizers_that_use_data_are_refused(llamas: Path) -> None:
    for base, ft in (("base", "plain-ft0"), ("plain-base", "ft0")):
        with pytest.raises(RecipeError, match=r"is stored in FP8 blocks of 4×3.*localizer magnitude"):
            quick_merge(base, [ft], out="out", localizer=Saliency(), data=["texts.jsonl"])
    assert not (llamas / "out").exists()


def test_an_adapter_over_an_fp8_base(llamas: Path) -> None:
    save_lora(llamas / "lora", llamas / "plain-base")
    for prefix in ("", "plain-"):
        quick_merge(f"{prefix}base", ["lora"], out=f"{prefix}out")
    assert same_bits(load(llamas / "out"), load(llamas / "plain-out"))
