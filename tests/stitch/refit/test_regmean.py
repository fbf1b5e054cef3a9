"""RegMean against its closed form, in memory on the loaded models."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from demo.skills import make_tokenizer
from helpers.architectures import make_model
from helpers.data import write_texts
from helpers.families import build, family, masked_tokenizer
from helpers.models import State, load, same_bits
from helpers.refits import read_record
from helpers.runs import Killed
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_locstitch.cli.main import main
from hf_locstitch.stitch.fitted_values import FittedWriter
from hf_locstitch.stitch.refit.regression_mean import regression_mean, shrink


def test_a_linear_toy_by_hand() -> None:
    """One output, two inputs: (G1 + G2)⁻¹ (G1 W1 + G2 W2), first as it stands, then with off-diagonals halved."""
    one, other = torch.tensor([[2.0, 1.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    weights = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    # G1 W1 + G2 W2 = [2, 1] + [0, 3] = [2, 4]; the sum of the G is [[3, 1], [1, 4]], whose determinant is 11.
    found = regression_mean([one, other], weights.__getitem__, 1.0)
    assert torch.allclose(found, torch.tensor([[4 / 11, 10 / 11]]).double(), atol=1e-5)
    assert torch.equal(shrink(one, 0.5), torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double())
    # Now [2, 3.5] and [[3, 0.5], [0.5, 4]], whose determinant is 11.75.
    found = regression_mean([one, other], weights.__getitem__, 0.5)
    assert torch.allclose(found, torch.tensor([[6.25 / 11.75, 9.5 / 11.75]]).double(), atol=1e-5)


def test_linear_models_are_merged_as_a_regression_on_all_their_data() -> None:
    """As many examples of each: least squares on the models' own predictions."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(50, 6, generator=generator).double() for _ in range(3)]
    weights = [torch.randn(4, 6, generator=generator).double() for _ in range(3)]
    found = regression_mean([x.T @ x / len(x) for x in inputs], weights.__getitem__, 1.0)
    answers = torch.cat([x @ weight.T for x, weight in zip(inputs, weights, strict=True)])
    due = torch.linalg.lstsq(torch.cat(inputs), answers).solution.T
    assert torch.allclose(found, due, atol=1e-5)


def test_what_the_inputs_leave_open_is_the_mean() -> None:
    x = torch.tensor([[1.0, 0.0, 0.0]])
    weights = [torch.tensor([[1.0, 5.0, 2.0]]), torch.tensor([[3.0, 7.0, 4.0]])]
    found = regression_mean([3 * x.T @ x, x.T @ x], weights.__getitem__, 1.0)
    assert torch.allclose(found, torch.tensor([[1.5, 6.0, 3.0]]).double(), atol=1e-5)
    assert torch.equal(
        regression_mean([0 * x.T @ x] * 2, weights.__getitem__, 1.0).float(), torch.tensor([[2.0, 6, 3]])
    )


@contextmanager
def watching(model: Any, kept: dict[str, list[Tensor]]) -> Iterator[None]:
    """Collect what enters each linear, by the name of its weight."""

    def note(name: str) -> Callable[..., None]:
        return lambda _, args: kept.setdefault(f"{name}.weight", []).append(args[0].reshape(-1, args[0].shape[-1]))

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    handles = [module.register_forward_pre_hook(note(name)) for name, module in linears.items()]
    yield
    for handle in handles:
        handle.remove()


def reference(folders: list[Path], texts: list[list[str]], alpha: float) -> State:
    """The mean, and in linears (Σ G)⁻¹ Σ G W, one text at a time, so that nothing is padded."""
    states = [load(folder) for folder in folders[1:]]
    merged = {name: torch.stack([state[name].double() for state in states]).mean(0) for name in states[0]}
    grams: dict[str, list[Tensor]] = {}
    transposed = set()
    for folder, own in zip(folders[1:], texts, strict=True):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        kept: dict[str, list[Tensor]] = {}
        with torch.no_grad(), watching(model, kept):
            for text in own:
                model(**make_tokenizer()(text, return_tensors="pt", return_token_type_ids=False))
        transposed |= {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
        for name, parts in kept.items():
            # The last token of a text predicts nothing.
            x = torch.cat([part[:-1] for part in parts] if name == "lm_head.weight" else parts).double()
            grams.setdefault(name, []).append(x.T @ x / len(x))
    for name in grams.keys() & merged.keys():
        wide = [gram * alpha + torch.diag(gram.diagonal()) * (1 - alpha) for gram in grams[name]]
        weights = [state[name].double() if name in transposed else state[name].double().T for state in states]
        found = torch.linalg.inv(sum(wide)) @ sum(gram @ weight for gram, weight in zip(wide, weights, strict=True))
        merged[name] = found if name in transposed else found.T
    return merged


def command(tmp: Path, **stitch: Any) -> list[str]:
    (tmp / "how.yaml").write_text(yaml.safe_dump({"stitch": {"method": "regmean", **stitch}}) if stitch else "{}")
    data = [str(tmp / f"{seed}.jsonl") for seed in range(2)]
    folders = [str(tmp / name) for name in ("base", "ft0", "ft1")]
    return ["merge", str(tmp / "how.yaml"), "--base", folders[0], "--ft", *folders[1:], "--method", "regmean",
            "--data", *data, "--quiet"]  # fmt: skip


def prepare(kind: str, tmp: Path, dtype: torch.dtype = torch.float32) -> tuple[list[Path], list[list[str]]]:
    """Folders of a family whose embeddings and heads differ, too, and texts of unequal lengths."""
    model = build(kind, dtype)
    folders = family(model, tmp)
    for seed, folder in enumerate(folders[1:]):
        generator = torch.Generator().manual_seed(seed)
        state = {
            name: (tensor + 0.05 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
            for name, tensor in load(folder).items()
        }
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    files = [write_texts(tmp / f"{seed}.jsonl", 40, seed=seed) for seed in range(2)]
    return folders, [[json.loads(line)["text"] for line in file.read_text().splitlines()] for file in files]


@pytest.mark.parametrize(("kind", "alpha"), [("llama", 0.9), ("llama-tied", 0.9), ("gpt2", 0.1), ("falcon", 0.9)])
def test_equals_the_closed_form(kind: str, alpha: float, tmp_path: Path) -> None:
    folders, texts = prepare(kind, tmp_path)
    assert main([*command(tmp_path, alpha=alpha, batch=7), "--out", str(tmp_path / "out")]) == 0
    due, merged = reference(folders, texts, alpha), load(tmp_path / "out")
    fitted = set(read_record(tmp_path / "out")["stitch"]["refitted"])
    assert ("lm_head.weight" in fitted) == (kind == "llama") and len(fitted) > 7
    average = {name: torch.stack([load(folder)[name] for folder in folders[1:]]).mean(0) for name in merged}
    for name, values in merged.items():
        assert torch.allclose(values, due[name].float(), atol=1e-5), name
        assert (name in fitted) == ((values - average[name]).abs().max().item() > 1e-4), name


def test_batches_and_the_order_of_models_do_not_matter(tmp_path: Path) -> None:
    prepare("llama", tmp_path, torch.bfloat16)
    asked = command(tmp_path, batch=40)
    assert main([*asked, "--out", str(tmp_path / "one")]) == 0
    flipped = list(asked)
    for flag in ("--ft", "--data"):
        at = asked.index(flag)
        flipped[at + 1 : at + 3] = asked[at + 1 : at + 3][::-1]
    assert main([*flipped, "--out", str(tmp_path / "flipped")]) == 0
    assert same_bits(load(tmp_path / "one"), load(tmp_path / "flipped"))
    assert main([*command(tmp_path, batch=3), "--out", str(tmp_path / "batch")]) == 0
    one, other = load(tmp_path / "one"), load(tmp_path / "batch")
    assert all(torch.allclose(one[name].float(), other[name].float(), rtol=1e-2, atol=1e-4) for name in one)


def test_a_scale_goes_from_the_base_to_the_merge(tmp_path: Path) -> None:
    folders, _ = prepare("llama", tmp_path)
    for scale in ("1", "0.5"):
        assert main([*command(tmp_path), "--scale", scale, "--out", str(tmp_path / scale)]) == 0
    base, whole, half = load(folders[0]), load(tmp_path / "1"), load(tmp_path / "0.5")
    assert all(torch.allclose(half[name], (base[name] + whole[name]) / 2, atol=1e-6) for name in base)


def test_a_module_called_twice_is_fitted_to_all_its_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders, texts = prepare("llama", tmp_path)

    forward = transformers.models.llama.modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(
        transformers.models.llama.modeling_llama.LlamaMLP,
        "forward",
        lambda self, x: forward(self, x + forward(self, x)),
    )
    assert main([*command(tmp_path, alpha=0.9), "--out", str(tmp_path / "out")]) == 0
    due, merged = reference(folders, texts, 0.9), load(tmp_path / "out")
    assert all(torch.allclose(values, due[name].float(), atol=1e-5) for name, values in merged.items())


def test_the_page_the_record_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare("llama", tmp_path)
    assert main([*command(tmp_path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "RegMean on up to 256 inputs per finetune" in said and "fitting    at most about" in said
    assert main([*command(tmp_path), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stitch"]["alpha"] == 0.9
    out = tmp_path / "out"
    assert main([*command(tmp_path), "--out", str(out)]) == 0
    record, card = read_record(out), (out / "README.md").read_text()
    assert record["method"] == "regmean" and record["masks"] == {} and record["stitch"]["counts"]["ft0"]["fitted"] == 40
    assert list(record["stitch"]["kept_plain"]) == ["model.embed_tokens.weight"]
    assert "2212.09849" in card and "## Fitted values" in card and "0.jsonl" in card and str(tmp_path) not in card
    assert len(record["stitch"]["data"]["ft0"]["sha256"]) == 64
    inputs = ["--base", str(tmp_path / "base"), "--ft", str(tmp_path / "ft0"), str(tmp_path / "ft1")]
    assert main(["verify", str(out), *inputs]) == 0
    assert "recomputed for method locstitch only; this merge was made by regmean" in capsys.readouterr().err


def test_the_pinned_recipe_makes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare("llama", tmp_path)
    assert main([*command(tmp_path, alpha=0.5), "--out", str(tmp_path / "out")]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["merge", "out/locstitch.yaml", "--out", "again", "--quiet"]) == 0
    assert same_bits(load(tmp_path / "out"), load(tmp_path / "again"))


def test_a_killed_merge_takes_up_what_was_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare("llama", tmp_path)
    finish = FittedWriter.finish

    def cut(self: FittedWriter, heading: str, **notes: Any) -> None:
        finish(self, heading, **notes)
        raise Killed

    monkeypatch.setattr(FittedWriter, "finish", cut)
    with pytest.raises(Killed):
        main([*command(tmp_path), "--out", str(tmp_path / "out")])
    monkeypatch.setattr(FittedWriter, "finish", lambda *_, **__: pytest.fail("fitted again"))
    assert main([*command(tmp_path), "--out", str(tmp_path / "out")]) == 0
    monkeypatch.undo()
    assert main([*command(tmp_path), "--out", str(tmp_path / "whole")]) == 0
    assert same_bits(load(tmp_path / "out"), load(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--stitch", "refit"], "stitch: refit needs method locstitch, not regmean"),
        (["--density", "0.1"], "takes no localizer"),
        (["--no-cache"], "cannot be combined with --no-cache"),
        (["--allow-non-finite"], "allow_non_finite cannot be combined with RegMean"),
        (["--data", "0.jsonl"], "RegMean needs one --data entry of unlabelled inputs per finetune: expected 2"),
        (["--include", "*norm*"], "nothing for RegMean to fit"),
    ],
)
def test_refused_before_anything_is_written(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare("llama", tmp_path)
    assert main([*command(tmp_path), *flags, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_typo_is_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command(tmp_path, alhpa=0.1), "--out", str(tmp_path / "out")]) == 2
    assert "did you mean 'alpha'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["mixtral", "T5ForConditionalGeneration", "bert-classes", "albert"])
def test_what_no_linear_multiplies_with_keeps_the_mean(kind: str, tmp_path: Path) -> None:
    """Stacked experts, embeddings and tables of positions; all other matrices are fitted."""
    model = make_model(kind) if kind.startswith("T5") else build(kind, torch.float32)
    folders = family(model, tmp_path, masked_tokenizer())
    for seed in range(2):
        write_texts(tmp_path / f"{seed}.jsonl", seed=seed)
    assert main([*command(tmp_path, batch=5), "--out", str(tmp_path / "out")]) == 0
    record, merged = read_record(tmp_path / "out")["stitch"], load(tmp_path / "out")
    mean = {name: (load(folders[1])[name] + load(folders[2])[name]) / 2 for name in merged}
    for name in merged.keys() - set(record["refitted"]):
        assert torch.allclose(merged[name], mean[name], atol=1e-6), name
    kept = [name for name in record["kept_plain"] if ".experts." not in name]
    assert all("embed" in name or "relative_attention_bias" in name or "shared" in name for name in kept), kept
    assert any(".experts." in name for name in record["kept_plain"]) == (kind == "mixtral")
    blocks = [name for name in record["refitted"] if name in merged and not torch.equal(merged[name], mean[name])]
    assert len(blocks) > 5
