"""Tiny models of the architectures whose embeddings and heads have names of their own, with a tokenizer's rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from helpers.vocabularies import tokenizer

TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
        "max_position_embeddings": 64}  # fmt: skip
BART = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}  # fmt: skip
XLM = {"emb_dim": 8, "n_layers": 1, "n_heads": 2, "pad_index": 0}
GPT = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 64}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "AlbertForMaskedLM": {**TEXT, "embedding_size": 8},
    "BartForConditionalGeneration": BART,
    "BertForMaskedLM": TEXT,
    "BertForPreTraining": TEXT,
    "BigBirdPegasusForConditionalGeneration": BART,
    "BlenderbotForConditionalGeneration": BART,
    "BlenderbotSmallForConditionalGeneration": BART,
    "BloomForCausalLM": {"hidden_size": 8, "n_layer": 1, "n_head": 2},
    "CTRLLMHeadModel": {**GPT, "dff": 8},
    "DebertaV2ForMaskedLM": TEXT,
    "DistilBertForMaskedLM": {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8, "max_position_embeddings": 64},
    "ElectraForMaskedLM": {**TEXT, "embedding_size": 8},
    "FlaubertWithLMHeadModel": XLM,
    "GPT2LMHeadModel": GPT,
    "GPTJForCausalLM": {**GPT, "rotary_dim": 4},
    "GPTNeoXForCausalLM": TEXT,
    "LEDForConditionalGeneration": {
        **BART,
        "max_encoder_position_embeddings": 64,
        "max_decoder_position_embeddings": 64,
        "attention_window": 4,
    },
    "M2M100ForConditionalGeneration": BART,
    "MBartForConditionalGeneration": BART,
    "MPNetForMaskedLM": {**TEXT, "pad_token_id": 0},
    "MarianMTModel": {**BART, "decoder_vocab_size": 24},
    "MvpForConditionalGeneration": BART,
    "OPTForCausalLM": {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 8,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 8,
    },
    "PLBartForConditionalGeneration": BART,
    "PegasusForConditionalGeneration": BART,
    "PhiForCausalLM": TEXT,
    "RoFormerForMaskedLM": {**TEXT, "embedding_size": 8},
    "RobertaForMaskedLM": {**TEXT, "pad_token_id": 0},
    "T5ForConditionalGeneration": {
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 8,
        "num_layers": 1,
        "num_heads": 2,
        "decoder_start_token_id": 0,
    },
    "WhisperForConditionalGeneration": {
        **BART,
        "max_source_positions": 16,
        "max_target_positions": 16,
        "num_mel_bins": 8,
    },
    "XLMWithLMHeadModel": XLM,
    "XLNetLMHeadModel": {"d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 8},
}


def build(name: str, rows: int, seed: int = 0, **fields: Any) -> Any:
    """A model with so many rows, its buffers of weights random, too."""
    model_class = getattr(transformers, name)
    own = {**ARCHITECTURES.get(name, {}), **fields, "vocab_size": rows}
    if "decoder_vocab_size" in own:
        own["decoder_vocab_size"] = rows
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(model_class.config_class(**own))
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("logits_bias"):
                buffer.copy_(torch.randn_like(buffer))
    return model


def save_pair(folder: Path, name: str, **fields: Any) -> tuple[Path, Path]:
    """A base with 24 tokens, and a finetune with three more."""
    for seed, (side, words) in enumerate(
        (("base", tokenizer()), ("ft", tokenizer(special=["<|a|>", "<|b|>"], plain=["sum"])))
    ):
        build(name, len(words), seed, **fields).save_pretrained(folder / side)
        words.save_pretrained(folder / side)
    return folder / "base", folder / "ft"
