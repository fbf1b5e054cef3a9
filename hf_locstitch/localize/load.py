"""What one finetune's examples put on a device, told from headers, configs and the recipe; and what follows for the
micro-batch. The same whenever it is asked, on whatever machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from hf_locstitch.checkpoints.header import ITEM_BYTES
from hf_locstitch.checkpoints.sizes import LAYERS, MLP, WIDTH, find_patches, find_size
from hf_locstitch.data.causal_lm import CausalLM
from hf_locstitch.data.classification import ImageClassification, SequenceClassification
from hf_locstitch.data.masked_lm import MaskedLM
from hf_locstitch.data.objectives import AnyObjective, suggest
from hf_locstitch.data.zero_shot import ClipZeroShot
from hf_locstitch.localize.mask import Mask
from hf_locstitch.localize.with_data import MICRO_BATCH, WithData

if TYPE_CHECKING:
    from hf_locstitch.plan import MergePlan

How = TypeVar("How", bound=WithData)

STATE_BYTES = {"float32": 4, "bfloat16": 2}
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

    def numbers(self, how: WithData, processes: int) -> int:
        """Kept for a parameter: a second one where gradients must be added up before a mask can learn from them."""
        return 2 if isinstance(how, Mask) and not how.comes_whole(how.batches(self.examples), processes) else 1


def find_load(plan: MergePlan, how: WithData, name: str) -> Load:
    """Of the finetune of this name. Raises RecipeError where its objective needs to be told."""
    asked, checkpoint, config = plan.data[name].asked, plan.finetuned[name], plan.base.config
    objective = asked.objective or suggest(checkpoint.config, checkpoint.label)
    tokens = _tokens(objective, config)
    item = max((ITEM_BYTES[info.dtype] for info in plan.localized), default=4)
    return Load(
        examples=asked.number * _classes(objective, checkpoint.config),
        tokens=tokens,
        activations=tokens * token_activations(objective, config, how.checkpointing, item),
        number=STATE_BYTES[how.state_dtype] * plan.n,
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
        state = load.numbers(way, processes) * load.number / shares if way.state_on == "device" else 0
        return load.activated(way) + state

    return whole if isinstance(how, Mask) and load.activations and held(whole) < held(few) else few


def _classes(objective: AnyObjective, config: Mapping[str, Any]) -> int:
    """How many classes the examples are drawn from, each so many; 1 where there are no labels."""
    names = getattr(objective, "classes", None) or getattr(objective, "label_words", None)
    classifies = isinstance(objective, SequenceClassification | ImageClassification)
    return len(names or (config.get("id2label") or (0, 1) if classifies else (0,)))


def _tokens(objective: AnyObjective, config: Mapping[str, Any]) -> int:
    """Of an example, at most."""
    if isinstance(objective, ImageClassification | ClipZeroShot) and (patches := find_patches(config)):
        return patches
    return getattr(objective, "max_length", 512)


def token_activations(objective: AnyObjective, config: Mapping[str, Any], checkpointing: bool, item: int) -> int:
    """Bytes of activations that a token leaves for the backward pass, in a dtype of `item` bytes; 0 where the config
    tells no sizes.
    """
    width, layers = find_size(config, *WIDTH), find_size(config, *LAYERS)
    mlp = find_size(config, *MLP) or 4 * width
    layer = WIDTH_BYTES * width + MLP_BYTES * mlp * (find_size(config, "num_experts_per_tok") or 1)
    kept = INPUT_BYTES * width * layers + layer if checkpointing else layer * layers
    # Of answers only, and their gradient; at most every token.
    logits = 2 * 4 * find_size(config, "vocab_size") if isinstance(objective, CausalLM | MaskedLM) else 0
    return kept * item // 2 + logits if width and layers else 0
