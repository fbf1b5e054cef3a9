"""The device memory that one finetune's examples need, from headers, configs and the recipe, and the micro-batch that
follows from it. The same every time, on every machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.sizes import LAYERS, MLP, WIDTH, find_size
from hf_locstitch.localize.with_data import MICRO_BATCH, WithData
from hf_locstitch.runtime.dtypes import ITEM_BYTES, ON_DISK
from hf_locstitch.tasks.choosing_objectives import suggest
from hf_locstitch.tasks.objective import Objective
from hf_locstitch.tasks.sets import OpenSet

Config = TypeVar("Config", bound=WithData)

# Bytes of activations per token and layer, in a 16-bit dtype, for each unit of its width and of its MLP: what autograd
# keeps for a Llama or GPT-2 layer in transformers (for BERT 3/5 of it, for Gemma 2 8/5). Where a layer is recomputed,
# only its input.
WIDTH_BYTES, MLP_BYTES, INPUT_BYTES = 24, 8, 2


@dataclass(frozen=True)
class Load:
    """Upper bounds. examples: in the set. tokens: per example. activations: bytes per example, 0 where the config
    has no sizes. number: bytes of one number for every localizable parameter.
    """

    examples: int
    tokens: int
    activations: int
    number: int

    def activated(self, config: WithData) -> int:
        """Bytes of activations for a micro-batch."""
        return min(config.together, self.examples) * self.activations


def find_load(
    config: WithData, data: OpenSet, finetuned: Checkpoint, base: Checkpoint, tensors: Sequence[TensorInfo]
) -> Load:
    """The load of one finetune. tensors: the localizable ones. Raises RecipeError if it needs an explicit objective."""
    asked, base_config = data.asked, base.config
    objective = asked.objective or suggest(finetuned.config, finetuned.label)
    tokens = objective.tokens(base_config)
    item = max((ITEM_BYTES[info.dtype] for info in tensors), default=4)
    count = asked.number * objective.class_count(finetuned.config)
    return Load(
        examples=min(count, asked.limit or count),
        tokens=tokens,
        activations=tokens * token_activations(objective, base_config, config.checkpointing, item),
        number=ITEM_BYTES[ON_DISK[config.state_dtype]] * sum(info.numel for info in tensors),
    )


def settled(config: Config, load: Load, processes: int) -> Config:
    """The config with its micro-batch settled: the whole set (each process's share where parameters are sharded) if
    activations and numbers then take less of a device than with MICRO_BATCH examples, else MICRO_BATCH.
    """
    if config.micro_batch != "auto":
        return config
    shares = processes if config.sharded else 1
    few = config.model_copy(update={"micro_batch": MICRO_BATCH})
    whole = config.model_copy(update={"micro_batch": -(-load.examples // shares)})

    def held(candidate: WithData) -> float:
        state = (
            candidate.numbers(load.examples, processes) * load.number / shares if candidate.state_on == "device" else 0
        )
        return load.activated(candidate) + state

    spares = whole.numbers(load.examples, processes) < few.numbers(load.examples, processes)
    return whole if spares and load.activations and held(whole) < held(few) else few


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
