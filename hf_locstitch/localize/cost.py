"""What localizing with data will cost, estimated from headers and configs before any weight is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hf_locstitch.localize.activation_memory import find_load, settled
from hf_locstitch.localize.job import Localizing
from hf_locstitch.localize.with_data import WithData
from hf_locstitch.runtime.devices import CPU
from hf_locstitch.runtime.dtypes import ITEM_BYTES
from hf_locstitch.runtime.human import human
from hf_locstitch.runtime.processes import launched

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LearningCost:
    """Bytes on the device, except `elsewhere` (memory or files of this machine). flops: of one pass over a set.

    examples: of the most expensive set, at most; micro_batch: as settled for it. numbers: kept per parameter.
    tokens: of a set, at most. memory: bytes of the device. activations: 0 where the config has no sizes.
    """

    device: str
    weights: int
    state: int
    gradients: int
    activations: int
    elsewhere: int
    numbers: int
    examples: int
    micro_batch: int
    memory: int
    tokens: int
    flops: int
    passes: int

    @property
    def peak(self) -> int:
        return self.weights + self.state + self.gradients + self.activations

    @property
    def fits(self) -> bool:
        return self.peak <= self.memory

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.peak, "fits": self.fits}

    def describe(self) -> str:
        parts = [
            f"{human(self.weights)} weights",
            f"{human(self.state)} scores",
            f"{human(self.gradients)} gradients",
            f"up to {human(self.activations)} activations" if self.activations else "activations of unknown size",
        ]
        verdict = f"of {human(self.memory)} on {self.device}"
        if not self.fits:
            verdict += ": it may not fit; set micro_batch: 1, checkpointing: true, or state_on: cpu"
        elsewhere = f", {human(self.elsewhere)} scores off the device" if self.elsewhere else ""
        whole = self.micro_batch == self.examples
        together = (
            f"all {self.examples} examples in one micro-batch" if whole else f"micro-batches of {self.micro_batch}"
        )
        return (
            f"localizing about {human(self.peak)} ({', '.join(parts)}{elsewhere}) {verdict}; "
            f"{self.numbers} {'number' if self.numbers == 1 else 'numbers'} per parameter, {together}, "
            f"{self.passes} {'pass' if self.passes == 1 else 'passes'} of at most {self.flops / 1e12:.3g} TFLOP each"
        )


def learning_cost(asked: WithData, localizing: Localizing) -> LearningCost:
    """Raises RecipeError if an objective must be specified, RequestError if there is no such device."""
    from hf_locstitch.tasks.loading import find_device  # imports torch

    device, processes, tensors = find_device(asked.device), launched(), localizing.mask_tensors
    loads = [
        find_load(asked, data, localizing.finetuned[name], localizing.base, tensors)
        for name, data in localizing.data.items()
    ]
    ways = [(settled(asked, load, processes), load) for load in loads]
    numbers = [way.numbers(load.examples, processes) for way, load in ways]
    held = [load.activated(way) + count * load.number for (way, load), count in zip(ways, numbers, strict=True)]
    largest = held.index(max(held))
    (config, most), kept = ways[largest], numbers[largest]
    item = max((ITEM_BYTES[info.dtype] for info in tensors), default=4)
    parameters = sum(info.numel for _, info in localizing.base.tensors.values())
    tokens = max(load.examples * load.tokens for load in loads)
    return LearningCost(
        device=str(device),
        weights=item * parameters,
        state=kept * most.number if asked.state_on == "device" else 0,
        # A gradient, and the float32 copies used to accumulate it.
        gradients=max((info.numel for info in tensors), default=0) * (item + 3 * 4),
        activations=most.activated(config),
        elsewhere=0 if asked.state_on == "device" else kept * most.number,
        numbers=kept,
        examples=most.examples,
        micro_batch=min(config.together, most.examples),
        memory=_memory(device),
        tokens=tokens,
        flops=(8 if asked.checkpointing else 6) * parameters * tokens,
        passes=sum(way.passes(count) for (way, _), count in zip(ways, numbers, strict=True)),
    )


def free_memory(device: str) -> int:
    """Bytes that a device has available now, reclaimable caches of this machine included."""
    import psutil

    if device != CPU and (found := _on_accelerator(device)) is not None:
        return found[0]
    return psutil.virtual_memory().available


def _memory(device: torch.device) -> int:
    import psutil

    found = None if device.type == CPU else _on_accelerator(str(device))
    return psutil.virtual_memory().total if found is None else found[1]


def _on_accelerator(device: str) -> tuple[int, int] | None:
    """Bytes free and in all; None of a device that shares the machine's memory, or does not tell."""
    import torch

    tell = getattr(torch.get_device_module(device), "mem_get_info", None)
    return None if tell is None else tell(torch.device(device))
