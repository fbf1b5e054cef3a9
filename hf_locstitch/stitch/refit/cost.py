"""What a refit will cost, estimated from headers, configs and the recipe before any weight is read."""

from __future__ import annotations

import math

from hf_locstitch.checkpoints.config import architectures
from hf_locstitch.checkpoints.localizable import BLOCKS
from hf_locstitch.checkpoints.sizes import WIDTH, find_patches, find_size
from hf_locstitch.runtime.dtypes import ITEM_BYTES
from hf_locstitch.runtime.processes import launched
from hf_locstitch.stitch.fit_cost import FitCost
from hf_locstitch.stitch.fitting import Fittable
from hf_locstitch.stitch.refit.settings import (
    JUDGED,
    InputSettings,
    LayerByLayerSettings,
    RefitSettings,
    RegMeanSettings,
)

FLOAT = 4  # bytes; all of a refit is float32
WIDENINGS = 3  # a layer's outputs, merged and finetuned, and what is computed from them, at once
OUTPUTS = 2  # logits, and what is computed from them
DOUBLES = 6  # float64 numbers, counted as float32, of each element of the system and of its right-hand side
MOMENTS = 4  # besides each worker's Gram matrix: one task's, the sum over tasks, the system, and the solver's


def refit_cost(config: RefitSettings, plan: Fittable) -> FitCost | None:
    """None where nothing is refitted."""
    matrices = [info.shape for info in plan.mask_tensors if len(info.shape) == 2]
    if not matrices:
        return None
    tasks = len(plan.finetuned)
    inputs = input_counts(plan, config)
    tokens = _tokens(plan, config)
    widest, largest = max(max(shape) for shape in matrices), max(math.prod(shape) for shape in matrices)
    stacked = _stacked(plan)
    elements = sum(math.prod(shape) for shape in matrices)
    solve = sum(math.prod(shape) * min(shape) * config.steps for shape in matrices)
    lambdas = sum(not math.isinf(value) for value in config.lambdas)
    forward = 2 * elements * tokens
    grams = 2 * tokens * sum(shape[1] * sum(shape) for shape in matrices)
    share = min(1.0, tasks * plan.k / plan.n) if plan.n else 0.0
    item = max(ITEM_BYTES[info.dtype] for info in plan.mask_tensors)
    values = math.ceil(2 * item * share * plan.n)
    batches = sum(math.ceil(part / config.batch) for count in inputs.values() for part in config.counts(count))
    states, aside = _states(plan, config, batches, widest, models=2)
    return FitCost(
        weights=FLOAT * ((3 + tasks) * stacked if stacked else 6 * largest),
        moments=FLOAT * (MOMENTS + plan.settings.workers) * (widest**2 + largest),
        states=states,
        aside=aside,
        outputs=2 * _outputs(plan, config),
        values=values,
        states_on=config.states_on,
        inputs=sum(inputs.values()),
        tokens=tokens,
        flops=float(lambdas * (3 * forward + grams + 2 * solve) + 2 * forward),
        processes=launched(),
    )


def _states(plan: Fittable, config: LayerByLayerSettings, batches: int, widest: int, models: int) -> tuple[int, int]:
    """Bytes of hidden states in each process, on the device and elsewhere. batches: of all finetunes. widest: of the
    linear layers. models: how many an input passes through."""
    hidden = find_size(plan.base.config, *WIDTH) or widest
    token = FLOAT * models * (3 * hidden + WIDENINGS * widest)
    lengths = [input_length(plan, config, name) for name in plan.finetuned]
    own = min(1.0, (math.ceil(batches / launched()) + (launched() > 1)) / max(batches, 1))  # batches are not split
    whole = math.ceil(own * _tokens(plan, config) * token)
    if config.states_on == "device" or (config.states_on == "cpu" and not _on_cuda(config)):
        return whole, 0
    return min(whole, plan.settings.workers * config.batch * max(lengths) * token), whole


def _on_cuda(config: LayerByLayerSettings) -> bool:
    from hf_locstitch.tasks.loading import find_device  # imports torch

    return find_device(config.device, float64=True).type != "cpu"


def regmean_cost(config: RegMeanSettings, plan: Fittable) -> FitCost | None:
    """Inputs pass only through one model each, once, except a batch used for tracing; through the blocks of the merged
    model after those of the finetuned, if layers get the merged model's inputs."""
    shapes = {info.name: info.shape for info in plan.mask_tensors if len(info.shape) == 2}
    if not shapes:
        return None
    # Input widths of linear layers; the rows of an embedding are words, not inputs.
    widths = {name: max(shape) if BLOCKS.search(name) else min(shape) for name, shape in shapes.items()}
    tasks, widest = len(plan.finetuned), max(widths.values())
    inputs, tokens = input_counts(plan, config), _tokens(plan, config)
    largest, elements = (each(map(math.prod, shapes.values())) for each in (max, sum))
    products = sum(math.prod(shape) + widths[name] ** 2 for name, shape in shapes.items())
    batches = sum(math.ceil(count / config.batch) for count in inputs.values())
    states, aside = _states(plan, config, batches, widest, models=2 if config.merged_inputs else 1)
    blocks: dict[str, int] = {}  # elements of the matrices of each
    for name, shape in shapes.items():
        if found := BLOCKS.search(name):
            blocks[name[: found.end()]] = blocks.get(name[: found.end()], 0) + math.prod(shape)
    return FitCost(
        weights=FLOAT * (10 * largest + max(blocks.values(), default=0) if config.merged_inputs else 6 * largest),
        moments=FLOAT * ((tasks + MOMENTS + plan.settings.workers) * widest**2 + DOUBLES * (widest**2 + largest)),
        states=states,
        aside=aside,
        outputs=_outputs(plan, config),
        values=FLOAT * elements,
        states_on=config.states_on,
        inputs=sum(inputs.values()),
        tokens=tokens,
        flops=float(
            2 * tokens * (products + (elements if config.merged_inputs else 0)) + sum(w**3 for w in widths.values())
        ),
        processes=launched(),
    )


def input_counts(plan: Fittable, config: InputSettings) -> dict[str, int]:
    """Of each finetune, at most."""
    return {name: config.most_inputs(plan.fit_data[name]) for name in plan.finetuned}


def _tokens(plan: Fittable, config: InputSettings) -> int:
    """Of all inputs, at most."""
    return sum(count * input_length(plan, config, name) for name, count in input_counts(plan, config).items())


def input_length(plan: Fittable, config: InputSettings, name: str) -> int:
    """Maximum tokens of one input of a finetune; for an image, its patches."""
    objective = plan.fit_data[name].asked.objective
    if patches := find_patches(plan.finetuned[name].config):
        return patches
    return min(config.tokens, int(getattr(objective, "max_length", config.tokens)))


def _outputs(plan: Fittable, config: LayerByLayerSettings) -> int:
    """Bytes of a language model's outputs for batches that finish together. Other models have small outputs."""
    model_config = plan.base.config
    if not any("LM" in name for name in architectures(model_config)):
        return 0
    largest = max(input_length(plan, config, name) for name in plan.finetuned) * find_size(model_config, "vocab_size")
    return FLOAT * OUTPUTS * plan.settings.workers * min(config.batch * largest, max(largest, JUDGED))


def _stacked(plan: Fittable) -> int:
    """Elements of the experts of one layer, where checkpoints hold experts, stacked or one by one."""
    layers: dict[str, int] = {}
    for info in plan.mask_tensors:
        before, found, _ = info.name.partition(".experts.")
        if found and len(info.shape) > 1:
            layers[before] = layers.get(before, 0) + info.numel
    return max(layers.values(), default=0)
