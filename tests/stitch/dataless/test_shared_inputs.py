"""Which linear layers read the same input, in models of many kinds."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from helpers.families import MODELS

from hf_locstitch.checkpoints.localizable import BLOCKS
from hf_locstitch.stitch.dataless.shared_inputs import SharedInput, shared_inputs
from hf_locstitch.stitch.refit.weights import hollow

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
SEEN: dict[str, Any] = {**SMALL, "intermediate_size": 64, "image_size": 16, "patch_size": 4}
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "phi": ("PhiForCausalLM", "PhiConfig", {**SMALL, "intermediate_size": 64}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {
        "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 60}),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "num_mel_bins": 8,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_source_positions": 50,
        "vocab_size": 60, "decoder_start_token_id": 0, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}),
    "llava": ("LlavaForConditionalGeneration", "LlavaConfig", {
        "text_config": {**SMALL, "model_type": "llama", "intermediate_size": 64},
        "vision_config": {**SEEN, "model_type": "clip_vision_model"}}),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {
        **SMALL, "intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4,
        "num_experts_per_tok": 2}),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 60}),
}  # fmt: skip


def seen(kind: str) -> tuple[list[SharedInput], set[str]]:
    """What is found, and the matrices in blocks that are not."""
    name, config_class, fields = {**MODELS, **OTHERS}[kind]
    with init_empty_weights(include_buffers=False):
        config = getattr(transformers, config_class)(**fields)
        model = getattr(transformers, name)._from_config(config, dtype=torch.float32, experts_implementation="eager")
    model.tie_weights()
    model._weight_conversions = []
    parts = hollow(model.eval(), list(model.state_dict()), torch.device("cpu"))
    wanted = {name for name, part in parts.items() if part.dim > 1 and re.search(BLOCKS.pattern, name)}
    found = shared_inputs(model, wanted.__contains__)
    return found, wanted - {linear.weight.parameter for shared in found for linear in shared.linears}


def names(shared: SharedInput) -> list[str]:
    return [linear.weight.parameter.removesuffix(".weight").split(".")[-1] for linear in shared.linears]


TOGETHER = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "roberta-mlm": [["query", "key", "value"], ["dense"], ["dense"], ["dense"]],
    "vit": [["projection"], ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["fc1"], ["fc2"]],
    "phi": [["q_proj", "k_proj", "v_proj", "fc1"], ["dense"], ["fc2"]],
    "t5": [["q", "k", "v"], ["o"], ["wi"], ["wo"]],
    "mamba": [["in_proj"], ["x_proj"], ["out_proj"]],
}


@pytest.mark.parametrize("kind", TOGETHER)
def test_layers_that_share_an_input(kind: str) -> None:
    found, _ = seen(kind)
    assert [names(shared) for shared in found[: len(TOGETHER[kind])]] == TOGETHER[kind]


LEFT = {
    "t5": {"relative_attention_bias"},
    "gpt-oss": {"gate_up_proj_bias", "down_proj_bias"},  # stacked vectors
    "mamba": {"A_log", "conv1d", "dt_proj"},
    "deepseek-v3": {"gate"},  # made float32 on its way to the product
}


@pytest.mark.parametrize("kind", [*MODELS, *OTHERS])
def test_no_linear_layer_is_missed(kind: str) -> None:
    _, missed = seen(kind)
    assert {name.removesuffix(".weight").split(".")[-1] for name in missed} == LEFT.get(kind, set())


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_every_expert_has_an_input_of_its_own(kind: str) -> None:
    found, _ = seen(kind)
    experts = [shared.linears for shared in found if shared.linears[0].weight.index is not None]
    assert all(len(linears) == 1 for linears in experts)
    assert len(experts) == 2 * 2 * 4  # layers, matrices, experts


def test_cross_attention_reads_one_input_in_all_layers() -> None:
    found, _ = seen("t5")
    both = [shared for shared in found if "EncDecAttention.k" in shared.linears[0].weight.parameter]
    assert [names(shared) for shared in both] == [["k", "v", "k", "v"]]


def test_a_model_that_cannot_run_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_locstitch.stitch.dataless.shared_inputs.made_up_inputs", lambda _: iter([{}]))
    found, missed = seen("llama")
    assert not found and len(missed) == 14
