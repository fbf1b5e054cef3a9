"""Which linear layers read the same input, in models of many kinds."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from helpers.families import MODELS
from helpers.many_models import MANY

from hf_locstitch.checkpoints.localizable import BLOCKS
from hf_locstitch.stitch.dataless.shared_inputs import Seen, SharedInput, shared_inputs
from hf_locstitch.stitch.refit.weights import hollow


def build(kind: str) -> tuple[Any, set[str]]:
    """A model without weights, and its matrices in blocks."""
    name, config_class, fields = {**MODELS, **MANY}[kind]
    with init_empty_weights(include_buffers=False):
        config = getattr(transformers, config_class)(**fields)
        model = getattr(transformers, name)._from_config(config, dtype=torch.float32, experts_implementation="eager")
    model.tie_weights()
    model._weight_conversions = []
    parts = hollow(model.eval(), list(model.state_dict()), torch.device("cpu"))
    wanted = {name for name, part in parts.items() if part.dim > 1 and re.search(BLOCKS.pattern, name)}
    return model, wanted


def seen(kind: str) -> tuple[list[SharedInput], set[str]]:
    """What is found, and the matrices in blocks that are not."""
    model, wanted = build(kind)
    found = shared_inputs(model, wanted.__contains__).inputs
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
    "resnet": [["convolution"], ["convolution"], ["convolution"], ["convolution"], ["convolution"]],
    "patchtst": [["input_embedding"], ["q_proj", "k_proj", "v_proj"], ["out_proj"]],
    "segformer": [["proj"], ["q_proj"], ["sequence_reduction"], ["k_proj", "v_proj"], ["o_proj"], ["fc1"], ["fc2"]],
    "deepseek-v3": [["q_a_proj", "kv_a_proj_with_mqa"], ["q_b_proj"], ["kv_b_proj"], ["o_proj"]],
}


@pytest.mark.parametrize("kind", TOGETHER)
def test_layers_that_share_an_input(kind: str) -> None:
    found, _ = seen(kind)
    assert [names(shared) for shared in found[: len(TOGETHER[kind])]] == TOGETHER[kind]


TABLE = {"relative_attention_bias"}
LEFT = {
    "t5": TABLE,
    "switch": TABLE,
    "swin": {"relative_position_bias_table"},
    "clap": {"relative_position_bias_table"},
    "gpt-oss": {"gate_up_proj_bias", "down_proj_bias"},  # stacked vectors
    "mamba": {"A_log", "conv1d"},  # each channel by itself
    "mamba2": {"conv1d"},
    "jamba": {"A_log", "conv1d"},
    "qwen3-next": {"conv1d"},
    "rwkv": {"time_mix_key", "time_mix_value", "time_mix_receptance"},  # vectors
    "convnext": {"dwconv"},
    "segformer": {"dwconv"},
    "regnet": {"convolution"},  # in groups
    "wav2vec2-bert": {"depthwise_conv", "distance_embedding"},
    "xlnet": {"q", "k", "v", "o", "r", "r_r_bias", "r_s_bias", "r_w_bias", "seg_embed"},  # not as matrices
}


@pytest.mark.parametrize("kind", [*MODELS, *MANY])
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


def alone(monkeypatch: pytest.MonkeyPatch, kind: str) -> tuple[Seen, set[str]]:
    """Of a model that no input runs."""
    monkeypatch.setattr("hf_locstitch.stitch.dataless.shared_inputs.made_up_inputs", lambda _: iter([{}]))
    model, wanted = build(kind)
    return shared_inputs(model, wanted.__contains__), wanted


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_linear_layers_of_a_model_that_cannot_run_are_known_by_their_class(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, wanted = alone(monkeypatch, kind)
    assert all(len(shared.linears) == 1 for shared in found.inputs)
    assert {shared.linears[0].weight.parameter for shared in found.inputs} == wanted == found.not_run.keys()
    (why,) = set(found.not_run.values())
    assert why.startswith("ValueError: You ")
    complete, _ = seen(kind)
    known = {linear for shared in complete for linear in shared.linears}
    assert {shared.linears[0] for shared in found.inputs} <= known  # the same biases, turned in the same way


def test_what_is_no_linear_layer_by_its_class_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found, wanted = alone(monkeypatch, "mixtral")
    assert {name for name in wanted if "experts" in name} <= found.not_run.keys()
    assert not any("experts" in linear.weight.parameter for shared in found.inputs for linear in shared.linears)


@pytest.mark.parametrize("kind", MANY)
def test_which_models_run(kind: str) -> None:
    model, wanted = build(kind)
    failed = shared_inputs(model, wanted.__contains__).not_run
    assert bool(failed) == (kind in {"speecht5"})  # speech out of text asks for several things at once


def test_inputs_of_different_runs_are_different() -> None:
    """The first run's tensors are gone when the second takes their addresses."""
    found, _ = seen("qwen2.5-vl")
    for shared in found:
        assert len({"visual" in linear.weight.parameter for linear in shared.linears}) == 1
