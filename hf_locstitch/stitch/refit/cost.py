"""What a refit will take, told from headers, configs and the recipe before any weight is read."""

from __future__ import annotations

import math

from hf_locstitch.checkpoints.config import architectures
from hf_locstitch.checkpoints.localizable import BLOCKS
from hf_locstitch.checkpoints.sizes import WIDTH, find_patches, find_size
from hf_locstitch.runtime.dtypes import ITEM_BYTES
from hf_locstitch.runtime.processes import launched
from hf_locstitch.stitch.fit_cost import FitCost
from hf_locstitch.stitch.fitting import Fittable
from hf_locstitch.stitch.refit.settings import JUDGED, InputSettings, RefitSettings, RegMeanSettings

FLOAT = 4  # bytes; all of a refit is float32
WIDENINGS = 3  # a linear's outputs, the merged and the finetuned ones, and what is made of them, at once
OUTPUTS = 2  # logits, and what is made of them
DOUBLES = 6  # float64 numbers, counted as float32, of each element of the system and of its right-hand side
MOMENTS = 4  # beside each worker's Gram matrix: a task's, the sum over tasks, the system, and what solves it


def refit_cost(how: RefitSettings, plan: Fittable) -> FitCost | None:
    """None where nothing is refitted."""
    matrices = [info.shape for info in plan.mask_tensors if len(info.shape) == 2]
    if not matrices:
        return None
    tasks = len(plan.finetuned)
    inputs = tasks * how.inputs
    tokens = sum(how.inputs * _length(plan, how, name) for name in plan.finetuned)
    widest, largest = max(max(shape) for shape in matrices), max(math.prod(shape) for shape in matrices)
    stacked = _stacked(plan)
    elements = sum(math.prod(shape) for shape in matrices)
    solve = sum(math.prod(shape) * min(shape) * how.steps for shape in matrices)
    lambdas = sum(not math.isinf(value) for value in how.lambdas)
    forward = 2 * elements * tokens
    grams = 2 * tokens * sum(shape[1] * sum(shape) for shape in matrices)
    share = min(1.0, tasks * plan.k / plan.n) if plan.n else 0.0
    item = max(ITEM_BYTES[info.dtype] for info in plan.mask_tensors)
    values = math.ceil(2 * item * share * plan.n)
    batches = sum(math.ceil(count / how.batch) for count in how.counts(how.inputs)) * tasks
    states, aside = _states(plan, how, batches, widest, models=2)
    return FitCost(
        weights=FLOAT * ((3 + tasks) * stacked if stacked else 6 * largest),
        moments=FLOAT * (MOMENTS + plan.settings.workers) * (widest**2 + largest),
        states=states,
        aside=aside,
        outputs=2 * _outputs(plan, how),
        values=values,
        states_on=how.states_on,
        inputs=inputs,
        tokens=tokens,
        flops=float(lambdas * (3 * forward + grams + 2 * solve) + 2 * forward),
        processes=launched(),
    )


def _states(plan: Fittable, how: InputSettings, batches: int, widest: int, models: int) -> tuple[int, int]:
    """Bytes of hidden states in each process, on the device and elsewhere. batches: of all finetunes. widest: of the
    linears. models: that an input passes through."""
    hidden = find_size(plan.base.config, *WIDTH) or widest
    token = FLOAT * models * (3 * hidden + WIDENINGS * widest)
    lengths = [_length(plan, how, name) for name in plan.finetuned]
    own = min(1.0, (math.ceil(batches / launched()) + (launched() > 1)) / batches)  # cut at whole batches
    whole = math.ceil(own * sum(how.inputs * length for length in lengths) * token)
    if how.states_on == "device" or (how.states_on == "cpu" and not _on_cuda(how)):
        return whole, 0
    return min(whole, plan.settings.workers * how.batch * max(lengths) * token), whole


def _on_cuda(how: InputSettings) -> bool:
    from hf_locstitch.tasks.loading import find_device  # imports torch

    return find_device(how.device).type == "cuda"


def regmean_cost(how: RegMeanSettings, plan: Fittable) -> FitCost | None:
    """Only the finetuned models pass through, once, but for a batch that is followed before."""
    shapes = {info.name: info.shape for info in plan.mask_tensors if len(info.shape) == 2}
    if not shapes:
        return None
    # Inputs of a linear; an embedding has as many rows as there are words, and those are no inputs.
    widths = {name: max(shape) if BLOCKS.search(name) else min(shape) for name, shape in shapes.items()}
    tasks, widest = len(plan.finetuned), max(widths.values())
    tokens = sum(how.inputs * _length(plan, how, name) for name in plan.finetuned)
    largest, elements = (each(map(math.prod, shapes.values())) for each in (max, sum))
    products = sum(math.prod(shape) + widths[name] ** 2 for name, shape in shapes.items())
    batches = tasks * math.ceil(how.inputs / how.batch)
    states, aside = _states(plan, how, batches, widest, models=1)
    return FitCost(
        weights=FLOAT * 6 * largest,
        moments=FLOAT * ((tasks + MOMENTS + plan.settings.workers) * widest**2 + DOUBLES * (widest**2 + largest)),
        states=states,
        aside=aside,
        outputs=_outputs(plan, how),
        values=FLOAT * elements,
        states_on=how.states_on,
        inputs=tasks * how.inputs,
        tokens=tokens,
        flops=float(2 * tokens * products + sum(width**3 for width in widths.values())),
        processes=launched(),
    )


def _length(plan: Fittable, how: InputSettings, name: str) -> int:
    """Tokens of one input of a finetune, at most; of an image, its patches."""
    objective = plan.fit_data[name].asked.objective
    if patches := find_patches(plan.finetuned[name].config):
        return patches
    return min(how.tokens, int(getattr(objective, "max_length", how.tokens)))


def _outputs(plan: Fittable, how: InputSettings) -> int:
    """Bytes of what a language model gives for the batches that end at once: tokens times words. Others give little."""
    config = plan.base.config
    if not any("LM" in name for name in architectures(config)):
        return 0
    one = max(_length(plan, how, name) for name in plan.finetuned) * find_size(config, "vocab_size")
    return FLOAT * OUTPUTS * plan.settings.workers * min(how.batch * one, max(one, JUDGED))


def _stacked(plan: Fittable) -> int:
    """Elements of the experts of one layer, where checkpoints hold experts, stacked or one by one."""
    layers: dict[str, int] = {}
    for info in plan.mask_tensors:
        before, found, _ = info.name.partition(".experts.")
        if found and len(info.shape) > 1:
            layers[before] = layers.get(before, 0) + info.numel
    return max(layers.values(), default=0)
