"""Mixtures of experts whose experts lie one by one on one side, and as a stack on the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from demo.skills import make_tokenizer
from helpers.data import write_texts
from helpers.families import build
from helpers.models import load, same_bits, save, save_sharded
from helpers.runs import quick_merge

from hf_locstitch import plan_merge, verify
from hf_locstitch.errors import MismatchError
from loopback_hub import LoopbackHub

Save = Callable[[Any, Path], Path]


def stacked(model: Any, folder: Path) -> Path:
    """As it is in memory, in two shards."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    save_sharded(folder, state, lambda names: [names[::2], names[1::2]])
    model.config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def one_by_one(model: Any, folder: Path) -> Path:
    """As transformers saves it, in many shards."""
    model.save_pretrained(folder, max_shard_size="10KB")
    make_tokenizer().save_pretrained(folder)
    return folder


def family(kind: str, of_base: Save, tmp: Path) -> tuple[Path, list[Path], list[Path]]:
    """A base, two finetunes of it that are saved in the same way, and those saved in the two ways."""
    model, alike, mixed = build(kind, torch.bfloat16), [], []
    base = of_base(model, tmp / "base")
    for number, way in enumerate((one_by_one, stacked)):
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        alike.append(of_base(model, tmp / "alike" / f"ft{number}"))
        mixed.append(way(model, tmp / "mixed" / f"ft{number}"))
    return base, alike, mixed


PLAIN: dict[str, Any] = {"localizer": {"density": 0.2}}
SOLVED: dict[str, Any] = {"localizer": "joint", "stitch": "refit"}


@pytest.mark.parametrize(
    ("kind", "of_base", "how"),
    [
        ("mixtral", one_by_one, PLAIN),
        ("mixtral", stacked, PLAIN),
        ("qwen3-moe", one_by_one, PLAIN),
        ("qwen3-moe", stacked, SOLVED),
    ],
)
def test_the_merge_is_that_of_one_layout(kind: str, of_base: Save, how: dict[str, Any], tmp_path: Path) -> None:
    base, alike, mixed = family(kind, of_base, tmp_path)
    quick_merge(base, alike, out=tmp_path / "due", **how)
    result = quick_merge(base, mixed, out=tmp_path / "out", **how)
    assert same_bits(load(tmp_path / "out"), load(tmp_path / "due"))
    assert any("cut otherwise than in the base" in warning for warning in result.manifest.warnings)
    report = verify(tmp_path / "out", base=base, finetuned=mixed, tensors="all")
    assert report.ok, report.describe()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
@pytest.mark.parametrize("of_base", [one_by_one, stacked])
def test_under_a_prefix(of_base: Save, prefix: str, tmp_path: Path) -> None:
    """Stripped to see which experts they are, as it is of all other tensors."""
    base, alike, mixed = family("mixtral", of_base, tmp_path)
    wrapped = [
        save(
            tmp_path / f"wrapped{number}",
            {f"{prefix}{name}": value for name, value in load(folder).items()},
            (base / "config.json").read_text(),
        )
        for number, folder in enumerate(mixed)
    ]
    quick_merge(base, alike, out=tmp_path / "due", names=["ft0", "ft1"], **PLAIN)
    quick_merge(base, wrapped, out=tmp_path / "out", names=["ft0", "ft1"], **PLAIN)
    assert same_bits(load(tmp_path / "out"), load(tmp_path / "due"))
    assert verify(tmp_path / "out", base=base, finetuned=wrapped, tensors="all").ok


def test_streamed_from_the_hub(tmp_path: Path, home_hub: LoopbackHub) -> None:
    base, alike, mixed = family("mixtral", one_by_one, tmp_path)
    for folder in (base, *mixed):
        home_hub.add_repo(f"org/{folder.name}", {file.name: file for file in folder.iterdir()})
    quick_merge(base, alike, out=tmp_path / "due", **PLAIN)
    quick_merge("org/base", ["org/ft0", "org/ft1"], out=tmp_path / "out", cache=False, **PLAIN)
    assert same_bits(load(tmp_path / "out"), load(tmp_path / "due"))


def test_experts_that_are_not_all_there(tmp_path: Path) -> None:
    base, _, (_, other) = family("qwen3-moe", one_by_one, tmp_path)
    state = load(other)
    state["model.layers.1.mlp.experts.down_proj"] = state["model.layers.1.mlp.experts.down_proj"][:3].clone()
    ft = save(tmp_path / "few", state, (base / "config.json").read_text())
    with pytest.raises(MismatchError, match=r"lacks model\.layers\.1\.mlp\.experts\.0\.down_proj\.weight"):
        plan_merge({"base": str(base), "finetuned": [str(ft)]})


def test_localized_with_data_and_refitted(tmp_path: Path) -> None:
    """transformers loads each as it is."""
    base, alike, mixed = family("qwen3-moe", one_by_one, tmp_path)
    data = [write_texts(tmp_path / f"{seed}.jsonl", 8, seed=seed) for seed in range(2)]
    refit = {"inputs": 8, "held_out": 0, "lambdas": [0.1]}
    how: dict[str, Any] = {"localizer": {"method": "saliency", "density": 0.2}, "data": data, "stitch": refit}
    quick_merge(base, alike, out=tmp_path / "due", **how)
    quick_merge(base, mixed, out=tmp_path / "out", **how)
    assert same_bits(load(tmp_path / "out"), load(tmp_path / "due"))
