"""Which tensors are localized unless something else is said."""

from __future__ import annotations

from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.localizable import localizable


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
