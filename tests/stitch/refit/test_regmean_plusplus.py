"""RegMean++ against its closed form, in memory, block by block behind the merged model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from demo.skills import make_tokenizer
from helpers.data import write_texts
from helpers.families import build, family, masked_tokenizer
from helpers.models import State, load, same_bits
from helpers.refits import read_record
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from hf_locstitch.cli.main import main

ALPHA = 0.9


def prepare(kind: str, tmp: Path) -> tuple[list[Path], list[list[str]]]:
    """Folders of a family of which all tensors differ, and texts of unequal lengths."""
    folders = family(build(kind, torch.float32), tmp)
    for seed, folder in enumerate(folders[1:]):
        drawn = torch.Generator().manual_seed(seed)
        state = {name: value + 0.05 * torch.randn(value.shape, generator=drawn) for name, value in load(folder).items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    files = [write_texts(tmp / f"{seed}.jsonl", 6, seed=seed) for seed in range(2)]
    return folders, [[json.loads(line)["text"] for line in file.read_text().splitlines()] for file in files]


def merge(
    tmp: Path, out: str, method: str = "regmean-plusplus", order: tuple[int, int] = (0, 1), batch: int = 4
) -> Path:
    (tmp / "how.yaml").write_text(yaml.safe_dump({"method": {"name": method, "alpha": ALPHA, "batch": batch}}))
    folders = [str(tmp / f"ft{number}") for number in order]
    data = [str(tmp / f"{number}.jsonl") for number in order]
    asked = ["--base", str(tmp / "base"), "--ft", *folders, "--data", *data, "--out", str(tmp / out)]
    assert main(["merge", str(tmp / "how.yaml"), *asked, "--quiet", "--no-figures"]) == 0
    return tmp / out


def run(model: nn.Module, texts: list[str]) -> None:
    """One text at a time, so that nothing is padded."""
    with torch.no_grad():
        for text in texts:
            model(**make_tokenizer()(text, return_tensors="pt", return_token_type_ids=False))


def grams_of(model: nn.Module, names: list[str], texts: list[str]) -> dict[str, Tensor]:
    """Mean xxᵀ of what enters each of these linears; the last token of a text predicts nothing."""
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_pre_hook(
            lambda _, args, name=name: kept[name].append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for name in names
    ]
    run(model, texts)
    for handle in handles:
        handle.remove()
    x = {name: torch.cat([one[:-1] if name == "lm_head" else one for one in kept[name]]).double() for name in names}
    return {name: one.T @ one / len(one) for name, one in x.items()}


def reference(folders: list[Path], texts: list[list[str]]) -> State:
    """The mean; then block by block, all linears of one at once, (Σ G)⁻¹ Σ G W of the inputs that they have in each
    finetuned model's block behind the merged blocks before it; the head behind all of them."""
    states = [load(folder) for folder in folders[1:]]
    models = [transformers.AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders[1:]]
    linears = {name: one for name, one in models[0].named_modules() if isinstance(one, nn.Linear | Conv1D)}
    blocks = [name for name, one in models[0].named_modules() if isinstance(one, GradientCheckpointingLayer)]
    parts = [[name for name in linears if name.startswith(f"{block}.")] for block in blocks]
    parts.append([name for name in linears if f"{name}.weight" in states[0] and not any(name in one for one in parts)])
    merged = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}

    def lay(within: str) -> None:
        """The merged weights in all models, except in one block."""
        for model, state in zip(models, states, strict=True):
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(state[name] if name.startswith(within) else merged[name])

    for within, names in zip([*(f"{block}." for block in blocks), "nowhere"], parts, strict=True):
        lay(within)
        found = [grams_of(model, names, some) for model, some in zip(models, texts, strict=True)]
        for name in names:
            grams = [one[name] * ALPHA + torch.diag(one[name].diagonal()) * (1 - ALPHA) for one in found]
            turned, weight = isinstance(linears[name], Conv1D), f"{name}.weight"
            wide = [state[weight].double() if turned else state[weight].double().T for state in states]
            fitted = torch.linalg.inv(sum(grams)) @ sum(gram @ one for gram, one in zip(grams, wide, strict=True))
            merged[weight] = (fitted if turned else fitted.T).float()
    return merged


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_equals_the_closed_form(kind: str, tmp_path: Path) -> None:
    folders, texts = prepare(kind, tmp_path)
    merged, due = load(merge(tmp_path, "out")), reference(folders, texts)
    assert all(torch.allclose(merged[name], due[name], atol=3e-5) for name in merged)
    other = load(merge(tmp_path, "regmean", "regmean"))
    unlike = [name for name in merged if (merged[name] - other[name]).abs().max() > 1e-4]
    assert len(unlike) > 5  # in layers after the first


def test_the_order_of_models_does_not_matter_and_batches_hardly(tmp_path: Path) -> None:
    prepare("llama", tmp_path)
    one = load(merge(tmp_path, "one"))
    assert same_bits(one, load(merge(tmp_path, "flipped", order=(1, 0))))
    other = load(merge(tmp_path, "batches", batch=3))
    assert all(torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-4) for name in one)


def test_the_plan_the_record_and_the_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare("llama", tmp_path)
    out = merge(tmp_path, "out")
    record, card = read_record(out), (out / "README.md").read_text()
    assert record["method"] == "regmean-plusplus" and record["stitch"]["alpha"] == ALPHA
    assert "2508.03121" in card and "each of that model's blocks" in card
    flags = ["--base", str(tmp_path / "base"), "--ft", str(tmp_path / "ft0"), str(tmp_path / "ft1")]
    data = ["--data", str(tmp_path / "0.jsonl"), str(tmp_path / "1.jsonl")]
    assert main(["merge", *flags, "--method", "regmean-plusplus", *data, "--dry-run"]) == 0
    assert "RegMean++ on up to 256 inputs per finetune" in capsys.readouterr().out


def test_layers_that_are_used_several_times_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An Albert has one layer for all, whose first uses come before it is fitted."""
    for kind, warned in (("albert", True), ("bert", False)):
        folder = tmp_path / kind
        family(build(kind, torch.float32), folder, masked_tokenizer())
        data = [str(write_texts(folder / f"{number}.jsonl", seed=number)) for number in range(2)]
        asked = ["--base", str(folder / "base"), "--ft", str(folder / "ft0"), str(folder / "ft1"), "--data", *data]
        assert main(["merge", "--method", "regmean-plusplus", *asked, "--out", str(tmp_path / "out"), "--dry-run"]) == 0
        assert ("fits a layer at its last use" in capsys.readouterr().out) is warned, kind
