"""The memory of methods that take whole tensors: how many tensors may be merged at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.errors import RecipeError
from hf_locstitch.plan.plans import Plan
from hf_locstitch.runtime.human import counted, human
from hf_locstitch.runtime.settings import IMPORTS_BYTES
from hf_locstitch.stitch.method import TensorMethod

TORCH_BYTES = 210_000_000  # of torch and its linear algebra; measured

AnyPlan = TypeVar("AnyPlan", bound=Plan)


def whole_tensors_memory(plan: Plan) -> int:
    """Bytes at most, with the libraries; 0 for methods that take chunks."""
    sizes = _sizes(plan)
    return _libraries(plan) + sum(size for size, _ in sizes[: plan.settings.workers]) if sizes else 0


def awaited(plan: Plan, checkpoint: Checkpoint) -> int:
    """Bytes of an input that lie on the disk until they are whole tensors, where it is streamed."""
    sizes = sorted((checkpoint.info(name).nbytes for _, name in _sizes(plan)), reverse=True)
    return sum(sizes[: plan.settings.workers])


def within_limit(plan: AnyPlan) -> AnyPlan:
    """The plan, with as many threads as the memory that is allowed holds tensors. Raises RecipeError."""
    sizes, limit = _sizes(plan), plan.settings.limit
    if not sizes or limit is None:
        return plan
    room = limit - _libraries(plan)
    fitting = [count for count in range(1, plan.settings.workers + 1) if sum(s for s, _ in sizes[:count]) <= room]
    if not fitting:
        size, tensor = sizes[0]
        least = size + _libraries(plan)
        raise RecipeError(
            f"--max-memory {human(limit)} is too little: {plan.recipe.method.name} takes whole tensors, and {tensor} "
            f"of {counted(len(plan.finetuned), 'finetune')} needs {human(least)}. Allow that much, leave the tensor "
            "out with --exclude, or use a method that works in chunks, such as locstitch or ties."
        )
    return replace(plan, settings=replace(plan.settings, workers=fitting[-1]))


def _sizes(plan: Plan) -> list[tuple[int, str]]:
    """Bytes that each merged tensor takes while it is merged, and its name, the largest first."""
    method, models = plan.recipe.method, len(plan.finetuned)
    if not isinstance(method, TensorMethod):
        return []
    return sorted(((method.memory(info.shape, models), info.name) for info in plan.mask_tensors), reverse=True)


def _libraries(plan: Plan) -> int:
    method = plan.recipe.method
    return IMPORTS_BYTES + (TORCH_BYTES if isinstance(method, TensorMethod) and method.linear_algebra else 0)
