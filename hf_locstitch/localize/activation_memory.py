"""What one finetune's examples put on a device, told from headers, configs and the recipe; and what follows for the
micro-batch. The same whenever it is asked, on whatever machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.sizes import LAYERS, MLP, WIDTH, find_size
from hf_locstitch.localize.with_data import MICRO_BATCH, WithData
from hf_locstitch.runtime.dtypes import ITEM_BYTES, ON_DISK
from hf_locstitch.tasks.objective import Objective
from hf_locstitch.tasks.objectives import suggest
from hf_locstitch.tasks.sets import OpenSet

How = TypeVar("How", bound=WithData)

# Bytes of activations a token and layer, in a 16-bit dtype, for each unit of its width and of its MLP: what autograd
# keeps of a Llama's or GPT-2's layer in transformers (of a BERT's 3/5, of a Gemma 2's 8/5). Where a layer is computed
# again, its input alone.
WIDTH_BYTES, MLP_BYTES, INPUT_BYTES = 24, 8, 2


@dataclass(frozen=True)
class Load:
    """examples: of the set, at most. tokens: of an example, at most. activations: bytes of an example, 0 where the
    config tells no sizes. number: bytes of one number for every localizable parameter.
    """

    examples: int
    tokens: int
    activations: int
    number: int

    def activated(self, how: WithData) -> int:
        """Bytes of activations of a micro-batch."""
        return min(how.together, self.examples) * self.activations


def find_load(
    how: WithData, data: OpenSet, finetuned: Checkpoint, base: Checkpoint, tensors: Sequence[TensorInfo]
) -> Load:
    """Of one finetune. tensors: the localizable ones. Raises RecipeError where its objective needs to be told."""
    asked, config = data.asked, base.config
    objective = asked.objective or suggest(finetuned.config, finetuned.label)
    tokens = objective.tokens(config)
    item = max((ITEM_BYTES[info.dtype] for info in tensors), default=4)
    return Load(
        examples=asked.number * objective.class_count(finetuned.config),
        tokens=tokens,
        activations=tokens * token_activations(objective, config, how.checkpointing, item),
        number=ITEM_BYTES[ON_DISK[how.state_dtype]] * sum(info.numel for info in tensors),
    )


def settled(how: How, load: Load, processes: int) -> How:
    """`how` with a number for its micro-batch: the whole set, or each process's share of it where parameters are shared
    out, if a device then holds less of activations and numbers than with MICRO_BATCH examples.
    """
    if how.micro_batch != "auto":
        return how
    shares = processes if how.sharded else 1
    few = how.model_copy(update={"micro_batch": MICRO_BATCH})
    whole = how.model_copy(update={"micro_batch": -(-load.examples // shares)})

    def held(way: WithData) -> float:
        state = way.numbers(load.examples, processes) * load.number / shares if way.state_on == "device" else 0
        return load.activated(way) + state

    spares = whole.numbers(load.examples, processes) < few.numbers(load.examples, processes)
    return whole if spares and load.activations and held(whole) < held(few) else few


def token_activations(objective: Objective, config: Mapping[str, Any], checkpointing: bool, item: int) -> int:
    """Bytes of activations that a token leaves for the backward pass, in a dtype of `item` bytes; 0 where the config
    tells no sizes.
    """
    width, layers = find_size(config, *WIDTH), find_size(config, *LAYERS)
    mlp = find_size(config, *MLP) or 4 * width
    layer = WIDTH_BYTES * width + MLP_BYTES * mlp * (find_size(config, "num_experts_per_tok") or 1)
    kept = INPUT_BYTES * width * layers + layer if checkpointing else layer * layers
    # Of answers only, and their gradient; at most every token.
    logits = 2 * 4 * find_size(config, "vocab_size") if objective.gives_words else 0
    return kept * item // 2 + logits if width and layers else 0
