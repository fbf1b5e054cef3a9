"""What localizing with data will take, told from headers and configs before any weight is read."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hf_locstitch.checkpoints.header import ITEM_BYTES
from hf_locstitch.data.classification import ImageClassification, SequenceClassification
from hf_locstitch.data.objectives import suggest
from hf_locstitch.localize.mask import Mask
from hf_locstitch.localize.with_data import WithData

if TYPE_CHECKING:
    import torch

    from hf_locstitch.data.sets import OpenSet
    from hf_locstitch.plan import MergePlan

STATE_BYTES = {"float32": 4, "bfloat16": 2}
# Bytes of activations a token, layer and hidden unit, in a 16-bit dtype: Korthikanti et al., "Reducing Activation
# Recomputation in Large Transformer Models", 2022 (34, and the layer's input alone, 2, where it is computed again).
ACTIVATION_BYTES, INPUT_BYTES = 34, 2
RATE_SIZE = 1024  # rows of the square matrices whose product is timed


@dataclass(frozen=True)
class LearningCost:
    """Bytes on the device, but for `elsewhere` (memory or files of this machine). flops: of one pass over a set.

    numbers: kept for an element. unsplit: the micro_batch that would keep one less, if any would, with
    unsplit_passes. tokens: of a set, at most. free: bytes that the device has now. activations: 0 where the config
    tells no sizes.
    """

    device: str
    weights: int
    state: int
    gradients: int
    activations: int
    elsewhere: int
    numbers: int
    unsplit: int | None
    unsplit_passes: int
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
    how = plan.localizer if plan.localizes else None
    if not isinstance(how, WithData):
        return None
    from hf_locstitch.localize.open_subject import find_device

    device = find_device(how)
    infos = [info for _, info in plan.base.tensors.values()]
    item = max((ITEM_BYTES[info.dtype] for info in plan.localized), default=4)
    largest = max((info.numel for info in plan.localized), default=0)
    sets = list(plan.data.values())
    length = max((getattr(found.asked.objective, "max_length", 512) for found in sets), default=512)
    examples = [
        found.asked.number * _classes(found, checkpoint.config)
        for found, checkpoint in zip(sets, plan.finetuned.values(), strict=True)
    ]
    most = max(examples, default=0)
    split = _split(how, most)
    could = split and not _split(how.model_copy(update={"micro_batch": most}), most)
    numbers = 2 if split else 1
    state = numbers * STATE_BYTES[how.state_dtype] * plan.n
    tokens = most * length
    parameters = sum(info.numel for info in infos)
    flops = (8 if how.checkpointing else 6) * parameters * tokens
    return LearningCost(
        device=str(device),
        weights=item * parameters,
        state=state if how.state_on == "device" else 0,
        gradients=largest * (item + 3 * 4),  # a gradient, and the float32 copies that it is added up with
        activations=_activations(plan.base.config, how, min(how.micro_batch, most) * length, item),
        elsewhere=0 if how.state_on == "device" else state,
        numbers=numbers,
        unsplit=most if could else None,
        unsplit_passes=len(plan.finetuned) * _passes(how, False),
        free=_free(device),
        tokens=tokens,
        flops=flops,
        passes=len(plan.finetuned) * _passes(how, split),
        seconds=flops / _rate(device, item),
    )


def _split(how: WithData, examples: int) -> bool:
    """Whether the gradients of so many examples must be added up before a mask can learn from them."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return isinstance(how, Mask) and not how.comes_whole(how.batches(examples), processes)


def _passes(how: WithData, split: bool) -> int:
    """Over the set of one finetune."""
    if isinstance(how, Mask):
        return how.epochs * (1 if split or not how.relative_lr else 2)
    return len(getattr(how, "at", (0,)))


def _classes(found: OpenSet, config: Mapping[str, Any]) -> int:
    """How many classes the examples are drawn from, each so many; 1 where there are no labels."""
    objective = found.asked.objective or suggest(config, found.label)
    names = getattr(objective, "classes", None) or getattr(objective, "label_words", None)
    classifies = isinstance(objective, SequenceClassification | ImageClassification)
    return len(names or (config.get("id2label") or (0, 1) if classifies else (0,)))


def _activations(config: Mapping[str, Any], how: WithData, tokens: int, item: int) -> int:
    sizes = {**config, **config.get("vision_config", {}), **config.get("text_config", {})}
    hidden, layers = sizes.get("hidden_size", sizes.get("n_embd")), sizes.get("num_hidden_layers", sizes.get("n_layer"))
    if not hidden or not layers:
        return 0
    kept = INPUT_BYTES * layers + ACTIVATION_BYTES if how.checkpointing else ACTIVATION_BYTES * layers
    logits = 2 * 4 * sizes.get("vocab_size", 0)  # of answers only, and their gradient; at most every token
    return tokens * (hidden * kept * item // 2 + logits)


def _free(device: torch.device) -> int:
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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
    saving = ""
    if cost.unsplit:
        saving = f"; micro_batch: {cost.unsplit} would halve the scores, with {cost.unsplit_passes} passes"
    return (
        f"localizing about {human(cost.peak)} ({', '.join(parts)}{elsewhere}) {verdict}; "
        f"{cost.passes} {'pass' if cost.passes == 1 else 'passes'} of at most {cost.flops / 1e12:.3g} TFLOP, "
        f"about {cost.seconds:.2g} s each at the speed of a plain product of matrices{saving}"
    )
