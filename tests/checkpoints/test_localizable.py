"""Which tensors are localized unless something else is said."""

from __future__ import annotations

import pytest
import transformers
from accelerate import init_empty_weights

from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.localizable import localizable, missed_blocks, reach


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


# Model classes whose blocks have names of their own, and the share of what lies inside that is localized at least.
SURVEYED: dict[str, tuple[str, dict[str, object], float]] = {
    "AlbertModel": ("AlbertConfig", {"num_hidden_layers": 2}, 0.9),
    "BridgeTowerModel": ("BridgeTowerConfig", {}, 0.9),
    "FlaubertModel": ("FlaubertConfig", {"n_layers": 2}, 0.99),
    "XLMModel": ("XLMConfig", {"n_layers": 2}, 0.99),
    "LxmertModel": ("LxmertConfig", {"l_layers": 1, "x_layers": 1, "r_layers": 1}, 0.9),
    "PerceiverModel": ("PerceiverConfig", {"num_self_attends_per_block": 2}, 0.75),
    "PatchTSMixerModel": ("PatchTSMixerConfig", {}, 0.9),
    "FastSpeech2ConformerModel": ("FastSpeech2ConformerConfig", {}, 0.75),
    "LlamaModel": ("LlamaConfig", {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}, 0.99),
    "GPT2Model": ("GPT2Config", {"n_layer": 2}, 0.99),
    "T5Model": ("T5Config", {"num_layers": 2}, 0.99),
    "MixtralModel": ("MixtralConfig", {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}, 0.99),
    "BertModel": ("BertConfig", {"num_hidden_layers": 2}, 0.99),
    "ViTModel": ("ViTConfig", {"num_hidden_layers": 2}, 0.99),
    "CLIPModel": ("CLIPConfig", {}, 0.98),
    "WhisperModel": ("WhisperConfig", {"encoder_layers": 1, "decoder_layers": 1}, 0.85),
    "SwinModel": ("SwinConfig", {}, 0.98),
    "MambaModel": ("MambaConfig", {"num_hidden_layers": 2}, 0.99),
    "XLNetModel": ("XLNetConfig", {"n_layer": 2}, 0.99),
    "Wav2Vec2Model": ("Wav2Vec2Config", {"num_hidden_layers": 4}, 0.8),
}


@pytest.mark.parametrize("name", SURVEYED)
def test_blocks_are_found_under_the_names_that_architectures_give_them(name: str) -> None:
    config_class, fields, least = SURVEYED[name]
    config = getattr(transformers, config_class)(**fields)
    with init_empty_weights():
        model = getattr(transformers, name)._from_config(config)
    infos = [TensorInfo(key, "F32", tuple(value.shape), 0, 0) for key, value in model.state_dict().items()]
    found = reach(infos, localizable(infos, (), ()))
    assert found.of_inner >= least, found
    assert not missed_blocks(found, name)


DIFFUSERS = [
    "transformer_blocks.0.attn.to_q.weight",
    "single_transformer_blocks.7.proj_out.weight",
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_k.weight",
    "up_blocks.2.resnets.0.conv1.weight",
]


@pytest.mark.parametrize("name", DIFFUSERS)
def test_blocks_of_diffusion_models(name: str) -> None:
    info = TensorInfo(name, "F32", (4, 4), 0, 0)
    assert localizable([info], (), ()) == [name]


def test_convolutions_that_features_are_made_with_are_no_blocks() -> None:
    names = ["feature_extractor.conv_layers.0.conv.weight", "wavenet.in_layers.0.weight"]
    assert localizable([TensorInfo(name, "F32", (4, 4), 0, 0) for name in names], (), ()) == []


def test_blocks_of_unknown_names_are_warned_of() -> None:
    shapes = {
        "model.embed.weight": 1000,
        "net.layers.0.w": 100,
        "net.towers.0.w": 300,
        "net.towers.1.w": 300,
        "x.w": 50,
    }
    infos = [TensorInfo(name, "F32", (numel,), 0, 0) for name, numel in shapes.items()]
    found = reach(infos, localizable(infos, (), ()))
    assert (found.share, found.of_inner) == (100 / 1750, 100 / 750)
    (said,) = missed_blocks(found, "org/base")
    assert "13 % of what org/base has" in said and "net.towers.* (80 %), x* (7 %)" in said and "--include" in said
