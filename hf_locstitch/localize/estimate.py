"""What localizing with data will take, told from headers and configs before any weight is read."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hf_locstitch.checkpoints.header import ITEM_BYTES
from hf_locstitch.localize.load import find_load, settled
from hf_locstitch.localize.mask import Mask
from hf_locstitch.localize.with_data import WithData
from hf_locstitch.processes import launched

if TYPE_CHECKING:
    import torch

    from hf_locstitch.plan import MergePlan

RATE_SIZE = 1024  # rows of the square matrices whose product is timed


@dataclass(frozen=True)
class LearningCost:
    """Bytes on the device, but for `elsewhere` (memory or files of this machine). flops: of one pass over a set.

    examples: of the set that takes most, at most; micro_batch: as settled for it. numbers: kept for a parameter.
    tokens: of a set, at most. free: bytes that the device has now. activations: 0 where the config tells no sizes.
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
    free: int
    tokens: int
    flops: int
    passes: int
    seconds: float

    @property
    def peak(self) -> int:
        return self.weights + self.state + self.gradients + self.activations

    @property
    def fits(self) -> bool:
        return self.peak <= self.free

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.peak, "fits": self.fits}


def learning_cost(plan: MergePlan) -> LearningCost | None:
    """None for a localizer that looks at no data. Times a product of matrices on the device."""
    asked = plan.localizer if plan.localizes else None
    if not isinstance(asked, WithData):
        return None
    from hf_locstitch.localize.open_subject import find_device

    device = find_device(asked)
    processes = launched()
    loads = [find_load(plan, asked, name) for name in plan.data]
    ways = [(settled(asked, load, processes), load) for load in loads]
    how, most = max(ways, key=lambda way: way[1].activated(way[0]) + way[1].numbers(way[0], processes) * way[1].number)
    item = max((ITEM_BYTES[info.dtype] for info in plan.localized), default=4)
    parameters = sum(info.numel for _, info in plan.base.tensors.values())
    numbers = most.numbers(how, processes)
    state = numbers * most.number
    tokens = max(load.examples * load.tokens for load in loads)
    flops = (8 if asked.checkpointing else 6) * parameters * tokens
    return LearningCost(
        device=str(device),
        weights=item * parameters,
        state=state if asked.state_on == "device" else 0,
        # A gradient, and the float32 copies that it is added up with.
        gradients=max((info.numel for info in plan.localized), default=0) * (item + 3 * 4),
        activations=most.activated(how),
        elsewhere=0 if asked.state_on == "device" else state,
        numbers=numbers,
        examples=most.examples,
        micro_batch=min(how.together, most.examples),
        free=_free(device),
        tokens=tokens,
        flops=flops,
        passes=sum(_passes(way, load.numbers(way, processes)) for way, load in ways),
        seconds=flops / _rate(device, item),
    )


def _passes(how: WithData, numbers: int) -> int:
    """Over the set of one finetune."""
    if isinstance(how, Mask):
        return how.epochs * (2 if numbers == 1 and how.relative_lr else 1)
    return len(getattr(how, "at", (0,)))


def _free(device: torch.device) -> int:
    import psutil
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available  # what the page cache would give back counts


def _rate(device: torch.device, item: int) -> float:
    """Floating-point operations a second, of the best of three products of matrices."""
    import torch

    dtype = {8: torch.float64, 4: torch.float32}.get(item, torch.bfloat16)
    matrix = torch.ones(RATE_SIZE, RATE_SIZE, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        (matrix @ matrix).sum().item()  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * RATE_SIZE**3 / best


def describe(cost: LearningCost) -> str:
    """For a person, one line."""
    from hf_locstitch.cost import human

    parts = [
        f"{human(cost.weights)} weights",
        f"{human(cost.state)} scores",
        f"{human(cost.gradients)} gradients",
        f"up to {human(cost.activations)} activations" if cost.activations else "activations of unknown size",
    ]
    verdict = f"of {human(cost.free)} free on {cost.device}"
    if not cost.fits:
        verdict += ": it may not fit; set micro_batch: 1, checkpointing: true, or state_on: cpu"
    elsewhere = f", {human(cost.elsewhere)} scores elsewhere" if cost.elsewhere else ""
    whole = cost.micro_batch == cost.examples
    together = f"all {cost.examples} examples in one micro-batch" if whole else f"micro-batches of {cost.micro_batch}"
    return (
        f"localizing about {human(cost.peak)} ({', '.join(parts)}{elsewhere}) {verdict}; "
        f"{cost.numbers} {'number' if cost.numbers == 1 else 'numbers'} a parameter, {together}, "
        f"{cost.passes} {'pass' if cost.passes == 1 else 'passes'} of at most {cost.flops / 1e12:.3g} TFLOP, "
        f"about {cost.seconds:.2g} s each at the speed of a plain product of matrices"
    )
