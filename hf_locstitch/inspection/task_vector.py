"""What a finetune changed, as tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hf_locstitch.adapters.opening import laid_over
from hf_locstitch.checkpoints.opening import open_checkpoint
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.errors import RequestError
from hf_locstitch.inspection.verification.inputs import fetch_tensors

if TYPE_CHECKING:
    import torch

Ref = str | Path


def task_vector(base: Ref, finetuned: Ref, tensor: str) -> torch.Tensor:
    """What a finetune changed in one tensor.

    Only the files that hold the tensor are downloaded; of an adapter its own two, and the base.

    Args:
        base: The pretrained model: a folder, org/name or org/name@revision.
        finetuned: The finetuned model, or an adapter over the base, likewise.
        tensor: The tensor's name on disk in the base.

    Returns:
        finetuned − base, float32, in the tensor's shape.

    Raises:
        RequestError: If one of the two lacks the tensor, or has it in another shape.

    Example:
        >>> task_vector("org/base", "org/math", "model.layers.0.mlp.up_proj.weight").norm()
    """
    start, tuned = (open_checkpoint(parse_ref(str(ref))) for ref in (base, finetuned))
    tuned = laid_over(start, {"finetuned": tuned})["finetuned"]
    if lacking := [one.label for one in (start, tuned) if tensor not in one.tensors]:
        raise RequestError(f"{lacking[0]} has no tensor {tensor!r}. Use a name that the base has on disk.")
    shapes = [list(one.info(tensor).shape) for one in (start, tuned)]
    if shapes[0] != shapes[1]:
        raise RequestError(f"{tensor} is {shapes[1]} in {tuned.label} but {shapes[0]} in the base {start.label}.")
    values = [fetch_tensors(one, [tensor]).flat(tensor, 0, start.info(tensor).numel).float() for one in (tuned, start)]
    return (values[0] - values[1]).view(shapes[0])
