"""A merge of one adapter at density 1 is what PEFT merges in float32, bit for bit, whatever kind of adapter it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.adapters import LLAMA, TARGETS, config_of, merged_by_peft, on_disk, save_adapter, save_base, save_lora
from helpers.models import State, load, same_bits
from helpers.runs import quick_merge
from safetensors.torch import load_file, save_file

from hf_locstitch import Magnitude, plan_merge
from hf_locstitch.errors import RequestError

MOE = {**{key: value for key, value in LLAMA.items() if not key.endswith("bias")}, "num_experts": 4,
       "num_experts_per_tok": 2, "moe_intermediate_size": 24}  # fmt: skip
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
EMBEDDING = "model.embed_tokens.weight"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

LORAS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "expression": {"target_modules": r".*\.layers\.1\..*(q|o)_proj"},
    "some-layers": {"layers_to_transform": [1]},
    "modules-to-save": {"modules_to_save": ["embed_tokens", "lm_head", "input_layernorm"]},
    "tokens": {"trainable_token_indices": [2, 7]},
    "bias-all": {"bias": "all"},
    "bias-lora-only": {"bias": "lora_only"},
    "lora-bias": {"lora_bias": True},
    "head": {"target_modules": ["lm_head"]},
}


def density_one(base: Path, adapter: Path, out: Path) -> State:
    quick_merge(base, adapter, out=out, localizer=Magnitude(density=1), include=["*"])
    return load(out)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("tied") / "base", **LLAMA, tie_word_embeddings=True)


def is_mergeable(base: Path, adapter: Path) -> bool:
    try:
        merged_by_peft(base, adapter)
    except Exception:  # of any type, such as NotImplementedError or AttributeError
        return False
    return True


def adapter_of(kind: str, base: Path, folder: Path) -> Path | None:
    """None if PEFT does not put such an adapter into layers: it is then refused by its kind alone."""
    try:
        return save_adapter(folder, base, config_of(kind))
    except TypeError:  # such a config has no target modules
        return None


@pytest.mark.parametrize("kind", [kind.value for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING])
def test_every_kind_that_peft_has(kind: str, llama: Path, tmp_path: Path) -> None:
    """What PEFT merges is merged alike, what it does not is refused. A new kind that needs options fails here."""
    adapter = adapter_of(kind, llama, tmp_path / "adapter")
    if adapter is None:
        adapter = save_lora(tmp_path / "adapter", llama)
        config = adapter / "adapter_config.json"
        config.write_text(config.read_text().replace('"LORA"', f'"{kind}"'))
    elif is_mergeable(llama, adapter):
        due = on_disk(merged_by_peft(llama, adapter), tmp_path / "due")
        assert not same_bits(due, load(llama))
        assert same_bits(density_one(llama, adapter, tmp_path / "out"), due)
        return
    with pytest.raises(RequestError, match=f"{kind} adapter, which cannot be merged"):
        density_one(llama, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_most_kinds_are_merged(llama: Path, tmp_path: Path) -> None:
    """So that the test above cannot pass by refusing all."""
    kinds = ("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "VERA", "OFT", "BOFT", "SHIRA", "LN_TUNING", "TRAINABLE_TOKENS")
    for kind in kinds:
        adapter = adapter_of(kind, llama, tmp_path / kind)
        assert adapter is not None and is_mergeable(llama, adapter), kind


@pytest.mark.parametrize("kind", LORAS)
def test_every_kind_of_lora(kind: str, llama: Path, tmp_path: Path) -> None:
    adapter = save_lora(tmp_path / "adapter", llama, **LORAS[kind])
    due = on_disk(merged_by_peft(llama, adapter), tmp_path / "due")
    assert not same_bits(due, load(llama))
    assert same_bits(density_one(llama, adapter, tmp_path / "out"), due)


TIED: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "both-dora": {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
    "both-pissa": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "init_lora_weights": "pissa"},
    "both-as-one": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "one-for-both": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "saved-as-one": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [2, 7]},
}


@pytest.mark.parametrize("kind", TIED)
def test_tied_embeddings_that_stay_tied(kind: str, tied_llama: Path, tmp_path: Path) -> None:
    """What embedding and head each get is added up in the one weight that they share."""
    adapter = save_lora(tmp_path / "adapter", tied_llama, **TIED[kind])
    due = on_disk(merged_by_peft(tied_llama, adapter), tmp_path / "due")
    assert due.keys() == load(tied_llama).keys()
    assert not torch.equal(due[EMBEDDING], load(tied_llama)[EMBEDDING])
    assert same_bits(density_one(tied_llama, adapter, tmp_path / "out"), due)


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_tied_embeddings_that_are_trained_apart(saved: list[str], tied_llama: Path, tmp_path: Path) -> None:
    """PEFT unties them, which needs a tensor that the base has not: it stays the base's, and the plan says why."""
    adapter = save_lora(tmp_path / "adapter", tied_llama, modules_to_save=saved)
    due = on_disk(merged_by_peft(tied_llama, adapter), tmp_path / "due")
    assert due.keys() == {*load(tied_llama), "lm_head.weight"}
    got = density_one(tied_llama, adapter, tmp_path / "out")
    assert same_bits(got, {**{name: due[name] for name in got}, EMBEDDING: load(tied_llama)[EMBEDDING]})
    warnings = plan_merge({"base": str(tied_llama), "finetuned": [str(adapter)]}).warnings
    assert any("embed_tokens and lm_head share it in the base" in said and "apart" in said for said in warnings)


@pytest.mark.parametrize("targets", [EXPERTS, EXPERTS[1:]])
def test_stacked_experts(targets: list[str], tmp_path: Path) -> None:
    """In memory they are one parameter, on disk a tensor each."""
    base = save_base(tmp_path / "base", kind="Qwen3Moe", **MOE)
    adapter = save_lora(tmp_path / "adapter", base, target_parameters=targets)
    due = on_disk(merged_by_peft(base, adapter), tmp_path / "due")
    assert any(not torch.equal(due[name], value) for name, value in load(base).items() if ".experts." in name)
    assert same_bits(density_one(base, adapter, tmp_path / "out"), due)


def test_transposed_layers(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", kind="GPT2", **GPT2)
    adapter = save_lora(tmp_path / "adapter", base, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    due = on_disk(merged_by_peft(base, adapter), tmp_path / "due")
    assert same_bits(density_one(base, adapter, tmp_path / "out"), due)


@pytest.mark.parametrize("kind", ["LORA", "IA3", "LOHA", "OFT", "FROD"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_bases(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The sum of the base and the task vector is rounded once, at the end."""
    base = save_base(tmp_path / "base", dtype)
    adapter = save_adapter(tmp_path / "adapter", base, config_of(kind))
    due = on_disk(merged_by_peft(base, adapter).to(dtype), tmp_path / "due")
    assert same_bits(density_one(base, adapter, tmp_path / "out"), due)


def test_wide_bases(tmp_path: Path) -> None:
    """Where the adapter changes nothing, float64 weights stay as they are."""
    base = save_base(tmp_path / "base", torch.float64)
    adapter = save_adapter(tmp_path / "adapter", base, config_of("SHIRA"))
    due, start = on_disk(merged_by_peft(base, adapter), tmp_path / "due"), load(base)
    got = density_one(base, adapter, tmp_path / "out")
    for name, value in start.items():
        assert torch.allclose(got[name], due[name].double(), atol=1e-6, rtol=0)
        assert torch.equal(got[name][due[name] == value.float()], value[due[name] == value.float()])


def test_narrow_adapters(llama: Path, tmp_path: Path) -> None:
    adapter = save_lora(tmp_path / "adapter", llama)
    file = adapter / "adapter_model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file)
    due = on_disk(merged_by_peft(llama, adapter), tmp_path / "due")
    assert same_bits(density_one(llama, adapter, tmp_path / "out"), due)


def test_another_head(llama: Path, tmp_path: Path) -> None:
    """A classifier trained with the adapter has no place in the base; the blocks are merged all the same."""
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=TARGETS)
    auto = "AutoModelForSequenceClassification"
    adapter = save_adapter(tmp_path / "adapter", llama, config, auto=auto)
    due = on_disk(merged_by_peft(llama, adapter, auto), tmp_path / "due")
    got = density_one(llama, adapter, tmp_path / "out")
    assert all(torch.equal(got[name], due[name]) for name in got if name in due)
    assert any(not torch.equal(got[name], value) for name, value in load(llama).items())


@pytest.mark.parametrize("kind", ["both", "saved-as-one"])
@pytest.mark.parametrize("settings", [{"embeddings": "localize"}, {"method": "task-arithmetic"}])
def test_trained_embeddings_are_merged_where_asked(
    kind: str, settings: dict[str, Any], tied_llama: Path, tmp_path: Path
) -> None:
    adapter = save_lora(tmp_path / "adapter", tied_llama, **TIED[kind])
    due = on_disk(merged_by_peft(tied_llama, adapter), tmp_path / "due")[EMBEDDING]
    localizer = {} if "method" in settings else {"localizer": Magnitude(density=1)}
    quick_merge(tied_llama, adapter, out=tmp_path / "out", **settings, **localizer)
    assert torch.allclose(load(tmp_path / "out")[EMBEDDING], due, rtol=0, atol=1e-7)
    request = {"base": str(tied_llama), "finetuned": [str(adapter)]}
    said = f"also changes {EMBEDDING}, which stays the base's: --embeddings localize merges it, too"
    assert any(said in warning for warning in plan_merge(request).warnings)
    assert not any("also changes" in warning for warning in plan_merge({**request, **settings}).warnings)
    assert not any("also changes" in warning for warning in plan_merge({**request, "embeddings": "base"}).warnings)
