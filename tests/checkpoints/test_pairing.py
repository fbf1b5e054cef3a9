"""Tensors under other names than the base's are paired: prefixes, wrappers, old names of norms, towers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from demo.skills import make_tokenizer
from helpers.data import write_texts
from helpers.families import build, family
from helpers.models import load, random_state, same_bits, save
from helpers.runs import quick_merge
from safetensors.torch import save_file

from hf_locstitch import plan_merge, verify
from hf_locstitch.checkpoints.opening import open_checkpoint
from hf_locstitch.checkpoints.pairing import own_names
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.errors import MismatchError

SHAPES = {
    "model.embed_tokens.weight": (11, 6), "model.layers.0.attn.q.weight": (6, 6), "model.layers.0.ln.weight": (6,),
    "model.layers.1.attn.q.weight": (6, 6), "model.layers.1.ln.weight": (6,), "model.norm.weight": (6,),
    "lm_head.weight": (11, 6),
}  # fmt: skip


def names(base: list[str], other: list[str], tmp_path: Path, shape: tuple[int, ...] = (4, 4)) -> dict[str, str]:
    folders = [
        save(tmp_path / side, random_state(0, shapes=dict.fromkeys(listed, shape)))
        for side, listed in (("base", base), ("other", other))
    ]
    return own_names(*(open_checkpoint(parse_ref(str(folder))) for folder in folders))


CASES: list[tuple[list[str], list[str], dict[str, str]]] = [
    (["h.0.w", "wte.w"], ["transformer.h.0.w", "transformer.wte.w", "lm_head.w"],
     {"h.0.w": "transformer.h.0.w", "wte.w": "transformer.wte.w"}),
    (["bert.encoder.layer.0.w"], ["encoder.layer.0.w"], {"bert.encoder.layer.0.w": "encoder.layer.0.w"}),
    (["model.layers.0.w"], ["_orig_mod.model.layers.0.w"], {"model.layers.0.w": "_orig_mod.model.layers.0.w"}),
    (["model.layers.0.w"], ["base_model.model.model.layers.0.w"],
     {"model.layers.0.w": "base_model.model.model.layers.0.w"}),
    (["layer.0.LayerNorm.weight", "layer.0.LayerNorm.bias"], ["layer.0.LayerNorm.gamma", "layer.0.LayerNorm.beta"],
     {"layer.0.LayerNorm.weight": "layer.0.LayerNorm.gamma", "layer.0.LayerNorm.bias": "layer.0.LayerNorm.beta"}),
    (["layer.0.LayerNorm.gamma", "layer.0.LayerNorm.beta"], ["layer.0.LayerNorm.weight", "layer.0.LayerNorm.bias"],
     {"layer.0.LayerNorm.gamma": "layer.0.LayerNorm.weight", "layer.0.LayerNorm.beta": "layer.0.LayerNorm.bias"}),
    (["bert.layer.0.LayerNorm.gamma", "bert.layer.0.w", "bert.e.LayerNorm.beta"],
     ["layer.0.LayerNorm.weight", "layer.0.w", "e.LayerNorm.bias"],
     {"bert.layer.0.LayerNorm.gamma": "layer.0.LayerNorm.weight", "bert.layer.0.w": "layer.0.w",
      "bert.e.LayerNorm.beta": "e.LayerNorm.bias"}),
    (["model.encoder.layers.0.w", "model.decoder.layers.0.w"], ["encoder.layers.0.w", "decoder.layers.0.w"],
     {"model.encoder.layers.0.w": "encoder.layers.0.w", "model.decoder.layers.0.w": "decoder.layers.0.w"}),
    (["model.language_model.layers.0.w", "model.language_model.embed.w", "model.visual.blocks.0.w"],
     ["model.layers.0.w", "model.embed.w"],
     {"model.language_model.layers.0.w": "model.layers.0.w", "model.language_model.embed.w": "model.embed.w"}),
    (["a.layers.0.w", "b.layers.0.w"], ["layers.0.w"], {}),  # it could be either
    (["model.layers.0.w"], ["model.layers.0.w", "extra.layers.0.w"], {}),
]  # fmt: skip


@pytest.mark.parametrize(("base", "other", "due"), CASES)
def test_names(base: list[str], other: list[str], due: dict[str, str], tmp_path: Path) -> None:
    assert names(base, other, tmp_path) == due


def test_another_shape_is_another_tensor(tmp_path: Path) -> None:
    base = save(tmp_path / "base", random_state(0, shapes={"h.0.w": (4, 4), "h.0.v": (3,)}))
    other = save(tmp_path / "other", random_state(0, shapes={"m.h.0.w": (4, 5), "m.h.0.v": (3,)}))
    opened = [open_checkpoint(parse_ref(str(folder))) for folder in (base, other)]
    assert own_names(*opened) == {"h.0.v": "m.h.0.v"}
    with pytest.raises(MismatchError, match=r"m\.h\.0\.w"):
        plan_merge({"base": str(base), "finetuned": [str(other)]})


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "wrapped.inner."])
def test_the_merge_is_that_of_the_same_names(prefix: str, tmp_path: Path) -> None:
    base, states = save(tmp_path / "base", random_state(0, shapes=SHAPES)), []
    for seed in (1, 2):
        states.append(random_state(seed, shapes=SHAPES))
        save(tmp_path / f"ft{seed}", states[-1])
        save(tmp_path / f"own{seed}", {f"{prefix}{name}": value for name, value in states[-1].items()})
    how: dict[str, Any] = {"localizer": {"density": 0.3}, "rest_from": "ft1", "names": ["ft1", "ft2"]}
    quick_merge(base, [tmp_path / "ft1", tmp_path / "ft2"], out=tmp_path / "due", **how)
    result = quick_merge(base, [tmp_path / "own1", tmp_path / "own2"], out=tmp_path / "out", **how)
    assert same_bits(load(tmp_path / "out"), load(tmp_path / "due"))
    said = f"ft1 names 7 tensors otherwise than the base, such as {prefix}"
    assert any(warning.startswith(said) for warning in result.manifest.warnings)
    report = verify(tmp_path / "out", base=base, finetuned=[tmp_path / "own1", tmp_path / "own2"], tensors="all")
    assert report.ok and report.checked.tensors == 7, report.describe()


def test_a_base_without_a_head_under_finetunes_that_have_one(tmp_path: Path) -> None:
    """Localized with data and refitted: transformers loads both."""
    size = {"vocab_size": len(make_tokenizer()), "n_embd": 32, "n_layer": 2, "n_head": 4}
    torch.manual_seed(0)
    base = transformers.GPT2Model(transformers.GPT2Config(**size))
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    for seed in (1, 2):
        tuned = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size))
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in tuned.transformer.named_parameters():
                parameter.copy_(base.get_parameter(name) + 0.02 * torch.randn_like(parameter))
        tuned.save_pretrained(tmp_path / f"ft{seed}")
        make_tokenizer().save_pretrained(tmp_path / f"ft{seed}")
    finetuned = [tmp_path / "ft1", tmp_path / "ft2"]
    data = [str(write_texts(tmp_path / f"{seed}.jsonl", 8, seed=seed)) for seed in (1, 2)]
    asked: list[dict[str, Any]] = [
        {"localizer": {"density": 0.1}},
        {"localizer": {"method": "joint"}, "stitch": "refit"},
        {"stitch": {"inputs": 8, "held_out": 0, "lambdas": [0.1]}, "data": data},
    ]
    for number, fields in enumerate(asked):
        quick_merge(tmp_path / "base", finetuned, out=tmp_path / f"out{number}", **fields)
        merged = load(tmp_path / f"out{number}")
        assert merged.keys() == load(tmp_path / "base").keys()
        assert not same_bits(merged, load(tmp_path / "base"))
        transformers.GPT2Model.from_pretrained(tmp_path / f"out{number}")


@pytest.mark.parametrize("asked", [{}, {"localizer": {"method": "joint"}, "stitch": "refit"}])
def test_a_base_with_old_names_of_norms(asked: dict[str, Any], tmp_path: Path) -> None:
    folders = family(build("bert", torch.float32), tmp_path)
    quick_merge(folders[0], folders[1:], out=tmp_path / "due", **asked)
    old = {name: _old(name) for name in load(folders[0])}
    save_file({old[name]: value for name, value in load(folders[0]).items()}, folders[0] / "model.safetensors")
    quick_merge(folders[0], folders[1:], out=tmp_path / "out", **asked)
    due = {old[name]: value for name, value in load(tmp_path / "due").items()}
    assert any(name.endswith("LayerNorm.gamma") for name in due) and same_bits(load(tmp_path / "out"), due)


def _old(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 40}  # fmt: skip
ROPE = {"rope_type": "default", "type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}


def vision_language(folder: Path) -> Any:
    """A Qwen2-VL, whose language model is of the type qwen2_vl_text."""
    torch.manual_seed(0)
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": ROPE}, vision_config=vision)
    model = transformers.Qwen2VLForConditionalGeneration(config)
    model.save_pretrained(folder)
    return model


def test_a_text_model_that_a_vision_language_model_was_made_from(tmp_path: Path) -> None:
    """Qwen2 beside Qwen2-VL: another type of model, whose tensors fit all the same."""
    whole = vision_language(tmp_path / "base")
    text = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT))
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    with torch.no_grad():
        for parameter in text.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    text.save_pretrained(tmp_path / "ft")
    request: dict[str, Any] = {"base": str(tmp_path / "base"), "finetuned": [str(tmp_path / "ft")]}
    with pytest.raises(MismatchError) as refusal:
        plan_merge(request)
    assert "--exclude" in str(refusal.value) and "qwen2" not in str(refusal.value)
    how: dict[str, Any] = {"localizer": {"density": 1}, "exclude": ["*visual*"]}
    said = plan_merge({**request, **how}).warnings
    assert "ft is a qwen2 model, the base a qwen2_vl model: ft is taken for one of its language model." in said
    quick_merge(tmp_path / "base", tmp_path / "ft", out=tmp_path / "out", **how)
    merged = transformers.Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "out")
    layers, due = merged.model.language_model.layers.state_dict(), text.model.layers.state_dict()
    assert all(torch.equal(layers[name], due[name]) for name in due)
    visual, start = merged.model.visual.state_dict(), whole.model.visual.state_dict()
    assert all(torch.equal(visual[name], start[name]) for name in start)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen"])
def test_a_text_model_of_another_kind_is_refused(kind: str, tmp_path: Path) -> None:
    vision_language(tmp_path / "base")
    save(tmp_path / "ft", load(tmp_path / "base"), json.dumps({"model_type": kind}))
    with pytest.raises(MismatchError, match=f"is a {kind} model"):
        plan_merge({"base": str(tmp_path / "base"), "finetuned": [str(tmp_path / "ft")]})
