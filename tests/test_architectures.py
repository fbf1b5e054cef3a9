"""Every kind of transformers model merges without a table of architectures, and loads from the Hub afterwards."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest
import torch
import transformers
from models import State, load, same_bits
from reference import reference_masks, reference_stitch

from hf_locstitch import Magnitude, merge_from_hub
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.localizable import localizable
from loopback_hub import LoopbackHub

TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 40}  # fmt: skip
VISION = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4}  # fmt: skip
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
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


def make(kind: str) -> transformers.PreTrainedModel:
    config_class, options = MODELS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**options)
    return getattr(transformers, kind.split("-")[0])(config).eval()


def family(kind: str, root: Path) -> list[Path]:
    """A base and two finetunes of it, saved as transformers saves them."""
    model = make(kind)
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


@pytest.mark.parametrize("kind", MODELS)
def test_merges_and_loads(kind: str, tmp_path: Path, home_hub: LoopbackHub) -> None:
    folders = family(kind, tmp_path)
    repo = f"demo/{uuid4().hex[:12]}"
    out = tmp_path / "out"
    merge_from_hub(folders[0], folders[1:], out=out, push_to=repo, localizer=Magnitude(density=0.2))

    base, *finetuned = [load(folder) for folder in folders]
    names = blocks(base)
    assert 0.3 * sum(t.numel() for t in base.values()) < sum(base[n].numel() for n in names)
    masks = [reference_masks(base, state, names, "0.2") for state in finetuned]
    expected = reference_stitch(base, finetuned, masks)
    assert same_bits(load(out), expected)

    loader = getattr(transformers, kind.split("-")[0])
    merged, report = loader.from_pretrained(repo, output_loading_info=True)
    assert not any(report.values()), report
    assert sum(p.numel() for p in merged.parameters()) == sum(p.numel() for p in make(kind).parameters())
    local = loader.from_pretrained(out)
    assert all(torch.equal(value, local.state_dict()[name]) for name, value in merged.state_dict().items())
    for parameter in merged.parameters():
        assert torch.isfinite(parameter).all()


def test_auto_class_loads_from_the_hub(tmp_path: Path, home_hub: LoopbackHub) -> None:
    folders = family("LlamaForCausalLM", tmp_path)
    repo = f"demo/{uuid4().hex[:12]}"
    merge_from_hub(folders[0], folders[1:], push_to=repo)
    model = transformers.AutoModelForCausalLM.from_pretrained(repo)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 64)


def test_what_is_localized() -> None:
    """Blocks with their norms and biases; neither embeddings, heads, final norms nor buffers."""
    shapes = {
        "model.layers.0.self_attn.q_proj.weight": (4, 4),
        "h.11.ln_1.bias": (4,),
        "encoder.block.0.layer.0.SelfAttention.q.weight": (4, 4),
        "vision_model.encoder.layers.3.mlp.fc1.bias": (4,),
        "visual.transformer.resblocks.7.attn.in_proj_weight": (4, 4),
        "model.layers.0.mlp.experts.3.w1.weight": (4, 4),
        "bert.encoder.layer.0.attention.self.query.bias": (4,),
    }
    others = {
        "model.embed_tokens.weight": (4, 4),
        "model.norm.weight": (4,),
        "lm_head.weight": (4, 4),
        "classifier.dense.weight": (4, 4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": (4,),
        "h.0.attn.bias": (1, 1, 8, 8),
        "h.0.attn.masked_bias": (),
        "layers.weight": (4,),
    }
    infos = [TensorInfo(name, "BF16", shape, 0, 0) for name, shape in {**shapes, **others}.items()]
    assert localizable(infos, (), ()) == list(shapes)
    assert localizable(infos, ("*norm*",), ()) == ["model.norm.weight"]
    assert localizable(infos, (), ("*bias", "h.*")) == [n for n in shapes if not n.endswith("bias")]
    integers = [TensorInfo(name, "I64", shape, 0, 0) for name, shape in shapes.items()]
    assert localizable(integers, ("*",), ()) == []
