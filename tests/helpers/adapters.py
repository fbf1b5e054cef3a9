"""Tiny bases, and adapters for them of every kind that PEFT has, with random weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from helpers.models import State

LLAMA = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 40, "attention_bias": True, "mlp_bias": True}  # fmt: skip
TARGETS = ["q_proj", "v_proj"]
# What a kind needs beside target modules; a kind that is not listed gets PEFT's defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 10},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4, "r": 0},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [3, 5]},
    "VBLORA": {"num_vectors": 16, "vector_length": 8, "r": 2},
    "WAVEFT": {"n_frequency": 20},
    "XLORA": {},
}


def save_base(folder: Path, dtype: torch.dtype = torch.float32, kind: str = "Llama", **options: Any) -> Path:
    """A causal language model with biases."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(options or LLAMA))
    architecture = {"GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM")
    model = getattr(transformers, architecture)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # biases are zeros, norms ones
    model.to(dtype).save_pretrained(folder)
    return folder


def config_of(kind: str) -> peft.PeftConfig:
    """The config of an adapter of this kind for `save_base`. Skips the test where the installed PEFT lacks it."""
    if kind not in peft.PeftType.__members__:
        pytest.skip(f"PEFT {peft.__version__} has no {kind}")
    options = {"target_modules": TARGETS, **OPTIONS.get(kind, {})}
    return peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](task_type="CAUSAL_LM", **options)


def save_adapter(
    folder: Path, base: Path, config: peft.PeftConfig, seed: int = 0, auto: str = "AutoModelForCausalLM"
) -> Path:
    """A trained adapter: random steps from where PEFT starts it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = peft.get_peft_model(load_base(base, auto), config)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder)
    return folder


def save_lora(folder: Path, base: Path, seed: int = 0, **options: Any) -> Path:
    options = {"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    return save_adapter(folder, base, peft.LoraConfig(**options), seed)


def load_base(base: Path, auto: str = "AutoModelForCausalLM") -> Any:
    """In memory of its own: products of weights that lie in a file at odd places are rounded otherwise."""
    model = getattr(transformers, auto).from_pretrained(base, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def merged_by_peft(base: Path, adapter: Path, auto: str = "AutoModelForCausalLM") -> Any:
    """The whole model in float32, as PEFT merges it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = peft.PeftModel.from_pretrained(load_base(base, auto), str(adapter))
        return model.merge_and_unload()


def on_disk(model: Any, folder: Path) -> State:
    """The tensors that a model is saved as."""
    model.save_pretrained(folder)
    state: State = {}
    for file in folder.glob("*.safetensors"):
        state |= load_file(file)
    return state
