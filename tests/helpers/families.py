"""Tiny transformers models that read the demo's characters, or pictures: a base and finetunes of it, saved with a
tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from demo.skills import make_tokenizer

from helpers.architectures import MOE, TEXT, VISION
from hf_locstitch.checkpoints.localizable import BLOCKS

VOCABULARY = len(make_tokenizer())
TOKENS = {**TEXT, "vocab_size": VOCABULARY, "pad_token_id": 0}
LLAMA = {**TOKENS, "num_key_value_heads": 2}
EXPERTS = {**MOE, "vocab_size": VOCABULARY, "pad_token_id": 0}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", EXPERTS),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **TOKENS,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
    ),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**TOKENS, "bias": False}),
    "falcon-bias": ("FalconForCausalLM", "FalconConfig", {**TOKENS, "bias": True, "parallel_attn": False}),
    "albert": ("AlbertModel", "AlbertConfig", {**TOKENS, "embedding_size": 16, "num_hidden_layers": 3}),
    "roberta-mlm": ("RobertaForMaskedLM", "RobertaConfig", TOKENS),
    "bert-classes": ("BertForSequenceClassification", "BertConfig", {**TOKENS, "num_labels": 3}),
    "bert": ("BertModel", "BertConfig", TOKENS),
    "vit": ("ViTForImageClassification", "ViTConfig", {**VISION, "num_labels": 3}),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": {**TOKENS, "eos_token_id": 2}, "vision_config": VISION, "projection_dim": 16},
    ),
}


def masked_tokenizer() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.mask_token = "?"
    return tokenizer


def build(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    name, config_class, fields = MODELS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**fields, **options})
    return getattr(transformers, name)(config).to(dtype).eval()


def pair(kind: str, root: Path, dtype: torch.dtype = torch.float64, step: float = 0.05) -> tuple[Path, Path]:
    """A base and a finetune of all its parameters, saved as transformers saves them."""
    model = build(kind, dtype)
    model.save_pretrained(root / "base")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(step * torch.randn_like(parameter))
    model.save_pretrained(root / "ft")
    for folder in (root / "base", root / "ft"):
        make_tokenizer().save_pretrained(folder)
    return root / "base", root / "ft"


def noisy(model: Any, folder: Path, seed: int | None, scale: float = 0.3, tokenizer: Any = None) -> Path:
    """A model with weights that are large enough to tell inputs apart, saved. seed: None goes on with torch's state."""
    if seed is not None:
        torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder


def finetunes(root: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, count: int = 2) -> list[Path]:
    """A base, and finetunes of it that differ."""
    base, first = pair(kind, root, dtype)
    folders = [base, first]
    for number in range(1, count):
        model = build(kind, dtype)
        torch.manual_seed(10 + number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        folder = root / f"ft{number}"
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        folders.append(folder)
    return folders


def family(model: Any, root: Path, tokenizer: Any = None) -> list[Path]:
    """A base and two finetunes of its blocks, saved with a tokenizer."""
    start = {name: parameter.clone() for name, parameter in model.named_parameters()}
    folders = [root / "base", root / "ft0", root / "ft1"]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                step = 0.02 * torch.randn_like(parameter) if seed and BLOCKS.search(name) else 0.0
                parameter.copy_(start[name] + step)
        model.save_pretrained(folder)
        (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folders


def with_sinks(root: Path) -> tuple[Path, Path]:
    """A gpt-oss, whose attention has parameters beside the modules in it, and a finetune of it."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**LLAMA, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    model = transformers.GptOssForCausalLM(config)
    model.save_pretrained(root / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(root / "ft")
    return root / "base", root / "ft"
