"""A PEFT adapter as a checkpoint: laid over its base, it has the base's tensors with other values in some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.runtime.dtypes import ITEM_BYTES

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterCheckpoint(Checkpoint):
    """settings: of adapter_config.json. config: its base's.

    Before it is laid over a base it has no tensors. base: what it is laid over. auto_class: the class of transformers
    that it was trained on. layers: names on disk of the tensors that it changes, those together that are computed
    together. left: what it holds that the base has no tensor for, in words.
    """

    settings: Mapping[str, Any]
    base: Checkpoint | None = None
    auto_class: str = ""
    layers: tuple[tuple[str, ...], ...] = ()
    left: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        return (ADAPTER_CONFIG, *super().files)

    @property
    def layout(self) -> Checkpoint:
        return self.base or self

    @property
    def kind(self) -> str:
        """As PEFT names it, such as LORA."""
        return str(self.settings.get("peft_type"))

    @property
    def base_name(self) -> str | None:
        """What its config names as its base: a repo, or a folder of the machine that it was trained on."""
        name = self.settings.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def base_revision(self) -> str | None:
        """Of that repo, if the config pins one."""
        revision = self.settings.get("revision")
        return revision if isinstance(revision, str) and revision else None

    @property
    def largest_layer(self) -> int:
        """Bytes of the largest layer that is computed at once."""
        return max((sum(self.info(name).nbytes for name in layer) for layer in self.layers), default=0)

    def laid_over(
        self, base: Checkpoint, auto_class: str, layers: Sequence[Sequence[str]], left: Sequence[str]
    ) -> AdapterCheckpoint:
        """With the base's tensors: float32 where the adapter changes them, and as in the base everywhere else."""
        changed = {name for layer in layers for name in layer}
        (shard,) = self.shards
        infos = [_computed(info) if name in changed else info for name, (_, info) in base.tensors.items()]
        return replace(
            self,
            config=base.config,
            tensors={info.name: (shard, info) for info in infos},
            base=base,
            auto_class=auto_class,
            layers=tuple(map(tuple, layers)),
            left=tuple(left),
        )


def _computed(info: TensorInfo) -> TensorInfo:
    """What is computed from a tensor of the base: in float32, or wider if the base is."""
    dtype = "F64" if info.dtype == "F64" else "F32"
    return replace(info, dtype=dtype, stop=info.start + info.numel * ITEM_BYTES[dtype])
