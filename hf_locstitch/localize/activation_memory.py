"""The device memory that one finetune's examples need, from headers, configs and the recipe, and the micro-batch that
follows from it. The same every time, on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.localize.with_data import MICRO_BATCH, WithData
from hf_locstitch.runtime.dtypes import ITEM_BYTES, ON_DISK
from hf_locstitch.tasks.activations import token_activations
from hf_locstitch.tasks.choosing_objectives import suggest
from hf_locstitch.tasks.sets import OpenSet

Config = TypeVar("Config", bound=WithData)


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
