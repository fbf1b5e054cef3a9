"""How much memory the activations of a forward and backward pass take, from a model's config alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_locstitch.checkpoints.sizes import LAYERS, MLP, WIDTH, find_size
from hf_locstitch.tasks.objective import Objective

# Bytes of activations per token and layer, in a 16-bit dtype, for each unit of its width and of its MLP: what autograd
# keeps for a Llama or GPT-2 layer in transformers (for BERT 3/5 of it, for Gemma 2 8/5). Where a layer is recomputed,
# only its input.
WIDTH_BYTES, MLP_BYTES, INPUT_BYTES = 24, 8, 2


def token_activations(objective: Objective, config: Mapping[str, Any], checkpointing: bool, item: int) -> int:
    """Bytes of activations that a token keeps for the backward pass, in a dtype of `item` bytes; 0 where the config
    has no sizes.
    """
    width, layers = find_size(config, *WIDTH), find_size(config, *LAYERS)
    mlp = find_size(config, *MLP) or 4 * width
    layer = WIDTH_BYTES * width + MLP_BYTES * mlp * (find_size(config, "num_experts_per_tok") or 1)
    kept = INPUT_BYTES * width * layers + layer if checkpointing else layer * layers
    # Logits of answer tokens only, and their gradient; at most of every token.
    logits = 2 * 4 * find_size(config, "vocab_size") if objective.gives_words else 0
    return kept * item // 2 + logits if width and layers else 0
