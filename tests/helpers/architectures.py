"""Tiny models of every kind that transformers has, a base and finetunes of it, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from helpers.models import State
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.localizable import localizable

TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 40}  # fmt: skip
VISION = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4}  # fmt: skip
T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
MOE = {**TEXT, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}

MODELS = {
    "LlamaForCausalLM": ("LlamaConfig", {**TEXT, "num_key_value_heads": 2}),
    "LlamaForCausalLM-tied": ("LlamaConfig", {**TEXT, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "GPT2LMHeadModel": ("GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}),
    "RobertaForMaskedLM": ("RobertaConfig", TEXT),
    "BertModel": ("BertConfig", TEXT),
    "T5ForConditionalGeneration": ("T5Config", T5),
    "ViTForImageClassification": ("ViTConfig", VISION),
    "CLIPModel": ("CLIPConfig", {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16}),
    "MixtralForCausalLM": ("MixtralConfig", MOE),
    "Qwen3MoeForCausalLM": (
        "Qwen3MoeConfig",
        {**TEXT, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
}


def make_model(kind: str) -> transformers.PreTrainedModel:
    config_class, options = MODELS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**options)
    return getattr(transformers, kind.split("-")[0])(config).eval()


def save_family(kind: str, root: Path) -> list[Path]:
    """A base and two finetunes of it, saved as transformers saves them."""
    model = make_model(kind)
    model.save_pretrained(root / "base")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for i in range(2):
        torch.manual_seed(10 + i)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(start[name] + 0.05 * torch.randn_like(parameter))
        model.save_pretrained(root / f"ft{i}")
    return [root / "base", root / "ft0", root / "ft1"]


def blocks(state: State) -> list[str]:
    infos = [TensorInfo(name, "F32", tuple(tensor.shape), 0, 0) for name, tensor in state.items()]
    return localizable(infos, (), ())
