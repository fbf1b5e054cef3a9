"""The arithmetic of a refit: masked least squares for one linear layer, all output rows at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 512  # output rows solved together


@dataclass
class Moments:
    """Sums over one task's tokens for a linear layer, in float32.

    gram: XᵀX [inputs, inputs]; cross: RᵀX [outputs, inputs]; tokens: how many.
    """

    gram: Tensor
    cross: Tensor
    tokens: int = 0

    def add(self, gram: Tensor, cross: Tensor, tokens: int) -> None:
        self.gram += gram
        self.cross += cross
        self.tokens += tokens


def with_ones(x: Tensor) -> Tensor:
    """[tokens, inputs] -> [tokens, inputs + 1]: a bias is the weight of a column of ones."""
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)


def system(gram: Tensor, lambda_: float, ridge: float) -> Tensor:
    """S + lambda_ · diag S + ridge · mean(diag S) · I. gram: S [inputs, inputs]."""
    diagonal, matrix = gram.diagonal(), gram.clone()
    matrix.diagonal().add_(lambda_ * diagonal + ridge * diagonal.mean())
    return matrix


def solve_masked(matrix: Tensor, cross: Tensor, mask: Tensor, steps: int) -> Tensor:
    """δ with (δ · matrix) ∘ mask = cross ∘ mask and δ = δ ∘ mask, by conjugate gradients from 0.

    matrix: symmetric, positive definite [inputs, inputs]; cross: [outputs, inputs]; mask: bool [outputs, inputs].
    Rows are independent systems; the diagonal preconditions all of them. Returns [outputs, inputs].
    """
    return torch.cat(
        [_solve_rows(matrix, rows, kept, steps) for rows, kept in zip(cross.split(ROWS), mask.split(ROWS), strict=True)]
    )


def _solve_rows(matrix: Tensor, cross: Tensor, mask: Tensor, steps: int) -> Tensor:
    """With preallocated tensors: new ones at every step would cost as much as the products."""
    kept = mask.to(matrix.dtype)
    inverse = 1 / matrix.diagonal()
    solution = torch.zeros_like(cross)
    residual = cross * kept
    scaled = residual * inverse
    direction = scaled.clone()
    image, product = torch.empty_like(cross), torch.empty_like(cross)
    power = torch.mul(residual, scaled, out=product).sum(1, keepdim=True)
    for _ in range(steps):
        torch.mm(direction, matrix, out=image).mul_(kept)
        step = _ratio(power, torch.mul(direction, image, out=product).sum(1, keepdim=True))
        solution.add_(torch.mul(direction, step, out=product))
        residual.sub_(image.mul_(step))
        torch.mul(residual, inverse, out=scaled)
        before, power = power, torch.mul(residual, scaled, out=product).sum(1, keepdim=True)
        direction.mul_(_ratio(power, before)).add_(scaled)
    return solution


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """The quotient; 0 where a row is already solved, or empty."""
    return torch.where(below > 0, above / below.clamp(min=torch.finfo(below.dtype).tiny), torch.zeros_like(above))
