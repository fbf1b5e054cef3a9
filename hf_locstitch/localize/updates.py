"""The arithmetic of localizing with data: pure functions, tensors of one shape in, one tensor of that shape out.

S: one real number per element, whose sigmoid σ(S) is the share of the task vector τ that is grafted onto the base.
g: the gradient of the task's loss with respect to the weights. Source: arXiv 2408.13656, section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def interpolate(base: Tensor, finetuned: Tensor, share: Tensor | float) -> Tensor:
    """base + share·(finetuned − base), in float32 (float64 if the inputs are), cast to the base's dtype.

    base, finetuned, share: [*shape], or a number for all.
    """
    wide = torch.promote_types(base.dtype, torch.float32)
    origin = base.to(wide)
    return (finetuned.to(wide) - origin).mul_(share).add_(origin).to(base.dtype)


def score_gradient(gradient: Tensor, task_vector: Tensor, scores: Tensor, penalty: float) -> Tensor:
    """∂/∂S of loss(base + σ(S)·τ) + penalty·‖σ(S)‖₁, which is (g·τ + penalty)·σ'(S)."""
    share = torch.sigmoid(scores)
    return (gradient * task_vector + penalty) * (share * (1 - share))


def softened(change: Tensor, most: float) -> Tensor:
    """change / (1 + |change| / most): identity for small changes, never more than `most`, monotonic."""
    return change / (1 + change.abs() / most) if most else change


def official_step(scores: Tensor, gradient: Tensor, task_vector: Tensor, lr: float, penalty: float) -> Tensor:
    """S after one step as the authors' published code takes it, for comparison with that code only.

    Its regulariser is added where S > 0 and subtracted elsewhere, without the learning rate: it pushes the shares
    towards 0 and 1 but does not make them sparse. gradient: summed over batches.
    """
    share = torch.sigmoid(scores)
    slope = share * (1 - share)
    return scores - lr * gradient * task_vector * slope + penalty * torch.where(scores > 0, slope, -slope)


def saliency(gradient: Tensor, task_vector: Tensor) -> Tensor:
    """|g·τ|: to first order, how much the loss changes when the element's task vector is added or removed."""
    return (gradient * task_vector).abs_()


def add_rounding(total: Tensor, addend: Tensor, generator: torch.Generator) -> None:
    """total += addend in place; a bfloat16 total is rounded up or down at random, so that small addends count.

    The mean of the rounded sum is the sum itself. total, addend: [*shape]; generator: on the total's device.
    """
    if total.dtype != torch.bfloat16:
        total.add_(addend)
        return
    bits = (total.float() + addend.float()).view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, device=bits.device, dtype=torch.int32)
    total.copy_(bits.add_(noise).bitwise_and_(-(1 << 16)).view(torch.float32))
