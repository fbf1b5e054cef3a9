"""The micro-batch that "auto" settles on: told from the plan alone, for the dry run and the run alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.data import ROWS, write_jsonl
from helpers.families import finetunes
from helpers.runs import quick_merge
from torch.autograd.graph import saved_tensors_hooks
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from hf_locstitch import Mask, Saliency, load_mask
from hf_locstitch.cli.main import main
from hf_locstitch.localize import search_with_data as module
from hf_locstitch.localize.activation_memory import Load, settled
from hf_locstitch.localize.cost import free_memory
from hf_locstitch.localize.learn import State
from hf_locstitch.localize.with_data import WithData
from hf_locstitch.tasks.activations import token_activations
from hf_locstitch.tasks.objectives.causal_lm import CausalLM
from hf_locstitch.tasks.objectives.text_zero_shot import TextZeroShot

CHEAP = Load(examples=64, tokens=4, activations=10, number=1000)  # 56 examples more are 560 bytes, a number 1000
DEAR = Load(examples=64, tokens=4, activations=20, number=1000)
SHARDED = Mask(sharded=True)

SETTLED: list[tuple[WithData, Load, int, int]] = [
    (Mask(), CHEAP, 1, 64),
    (Mask(), DEAR, 1, 8),
    (Mask(), Load(64, 4, 10, 561), 1, 64),
    (Mask(), Load(64, 4, 10, 560), 1, 8),
    (Mask(), Load(5, 4, 10, 1000), 1, 8),  # all of them, however many are asked for
    (Mask(), Load(64, 4, 0, 1000), 1, 8),  # of unknown size
    (Mask(state_on="cpu"), CHEAP, 1, 8),
    (Mask(state_on="disk"), CHEAP, 1, 8),
    (Mask(), CHEAP, 2, 8),  # each process sees its share only
    (SHARDED, CHEAP, 2, 32),
    (SHARDED, DEAR, 2, 32),  # 24 examples more are 480 bytes, half a number 500
    (SHARDED, Load(64, 4, 21, 1000), 2, 8),
    (SHARDED, Load(63, 4, 10, 1000), 4, 16),
    (Mask(preset="official", batch=16), CHEAP, 1, 8),
    (Mask(preset="official", batch=64), CHEAP, 1, 64),
    (Mask(preset="paper"), CHEAP, 1, 64),
    (Mask(micro_batch=3), CHEAP, 1, 3),
    (Mask(micro_batch=64), DEAR, 1, 64),
    (Saliency(), CHEAP, 1, 8),
    (Saliency(sharded=True), CHEAP, 16, 8),
]


@pytest.mark.parametrize(("how", "load", "processes", "due"), SETTLED)
def test_what_auto_settles_on(how: WithData, load: Load, processes: int, due: int) -> None:
    found = settled(how, load, processes)
    assert found.micro_batch == found.together == due
    assert found.model_copy(update={"micro_batch": how.micro_batch}) == how


CONFIGS: dict[str, Any] = {
    "llama": (LlamaModel, LlamaConfig, {"hidden_size": 64, "intermediate_size": 172}, "num_hidden_layers"),
    "gpt2": (GPT2Model, GPT2Config, {"n_embd": 64, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}, "n_layer"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_activations_of_a_layer_are_what_autograd_keeps(kind: str, dtype: torch.dtype) -> None:
    make, config_class, sizes, layers = CONFIGS[kind]
    kept, due = [], []
    for count in (1, 3):
        config = config_class(**sizes, vocab_size=32, num_attention_heads=4, **{layers: count})
        model = make(config).to(dtype).eval()
        weights = {parameter.data_ptr() for parameter in model.parameters()}
        seen: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor, weights: Any = weights, seen: Any = seen) -> torch.Tensor:
            if tensor.data_ptr() not in weights:
                seen[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            model(input_ids=torch.zeros((2, 32), dtype=torch.int64), use_cache=False)
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in seen.values()) / 64)
        due.append(token_activations(CausalLM(), config.to_dict(), False, dtype.itemsize))
    assert kept[1] - kept[0] == pytest.approx(due[1] - due[0], rel=0.1)


def test_what_examples_put_on_a_device() -> None:
    """By hand: 24 bytes for each of 10 units and 8 for each of the MLP's, in two layers, twice as much in float32."""
    sizes = {"hidden_size": 10, "num_hidden_layers": 2, "intermediate_size": 30, "vocab_size": 100}
    text = TextZeroShot(classes=("a", "b"))
    assert token_activations(text, sizes, False, 2) == 2 * 480
    assert token_activations(text, sizes, False, 4) == 4 * 480
    assert token_activations(text, sizes, True, 2) == 2 * 20 + 480  # inputs of layers, and one layer
    assert token_activations(CausalLM(), sizes, False, 2) == 2 * 480 + 800  # and logits
    assert token_activations(CausalLM(), {"text_config": sizes, "vocab_size": None}, False, 2) == 2 * 480 + 800
    experts = {**sizes, "moe_intermediate_size": 5, "num_experts_per_tok": 3}
    assert token_activations(text, experts, False, 2) == 2 * (240 + 120)
    assert token_activations(CausalLM(), {"d_model": 10, "vocab_size": 100}, False, 2) == 0


def examples(folder: Path, number: int) -> Any:
    file = write_jsonl(folder / f"{number}.jsonl", (number // len(ROWS)) * ROWS)
    return {"ref": str(file), "number": number, "objective": {"kind": "causal-lm", "max_length": 16}}


def planned(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    assert main([*arguments, "--dry-run", "--json"]) == 0
    return json.loads(capsys.readouterr().out)["localizing"]


@pytest.mark.parametrize(("number", "due", "kept"), [(10, 10, ["scores"]), (40, 8, ["scores", "gradient"])])
def test_dry_run_and_run_agree(
    number: int, due: int, kept: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Ten examples pass together and leave one number a parameter; of forty the activations would cost more."""
    base, first = finetunes(tmp_path, "mixtral", count=1)
    data = examples(tmp_path, number)
    how = {"method": "mask", "density": 0.1, "epochs": 2, "checkpointing": True}
    seen: list[str] = []

    class Seen(State):
        def __init__(self, parameters: Any, dtype: str, on: str, folder: Path, name: str) -> None:
            super().__init__(parameters, dtype, on, folder, name)
            seen.append(name.partition(".")[0])

    monkeypatch.setattr("hf_locstitch.localize.learn.State", Seen)
    masks = {}
    for asked in ("auto", due):
        fields = {
            "base": str(base),
            "finetuned": [str(first)],
            "data": [data],
            "localizer": {**how, "micro_batch": asked},
            "figures": False,
        }
        (tmp_path / f"{asked}.yaml").write_text(yaml.safe_dump(fields))
        arguments = ["merge", str(tmp_path / f"{asked}.yaml"), "--out", str(tmp_path / f"out-{asked}"), "--quiet"]
        cost = planned(arguments, capsys)
        assert (cost["examples"], cost["micro_batch"], cost["numbers"]) == (number, due, len(kept))
        assert cost["passes"] == 2 * (3 - len(kept))
        seen.clear()
        assert main(arguments) == 0
        assert seen == kept
        record = json.loads((tmp_path / f"out-{asked}" / "locstitch.json").read_text())
        assert record["localizer"]["micro_batch"] == asked
        masks[asked] = load_mask(tmp_path / f"out-{asked}", "ft")
    assert all(torch.equal(mask, masks[due][name]) for name, mask in masks["auto"].items())


def test_each_finetune_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a finetune that is localized alone passes as it would in a merge with others."""
    folders = finetunes(tmp_path, "mixtral")
    seen: list[int] = []
    score = module.score

    def scored(how: Any, *rest: Any) -> Any:
        seen.append(how.micro_batch)
        return score(how, *rest)

    monkeypatch.setattr(module, "score", scored)
    base, *finetuned = folders
    how = Mask(density=0.1, epochs=1, checkpointing=True)
    quick_merge(
        base, finetuned, out=tmp_path / "out", localizer=how, data=[examples(tmp_path, 40), examples(tmp_path, 10)]
    )
    assert seen == [8, 10]


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux tells it there")
def test_memory_that_is_free_counts_what_caches_would_give_back() -> None:
    told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert free_memory("cpu") == pytest.approx(int(told["MemAvailable"].split()[0]) * 1024, rel=0.2)


def test_too_little_memory_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the machine in the plan, which says the same every time; of what is free when the work begins."""
    base, first = finetunes(tmp_path, count=1)
    data = write_jsonl(tmp_path / "a.jsonl", ROWS)
    how = ["merge", "--base", base, "--ft", first, "--localizer", "saliency", "--data", data, "--no-figures"]
    how = [str(argument) for argument in how]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert planned(how, capsys) == planned(how, capsys) and planned(how, capsys)["fits"]

    class Little:
        total = available = 1000

    monkeypatch.setattr("psutil.virtual_memory", Little)
    assert not planned(how, capsys)["fits"]
    assert main([*how, "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert "1.0 kB is free on cpu: it may not fit" in caplog.text
