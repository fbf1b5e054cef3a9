"""ACE-Merging: matrices by regression, with the covariance of each task's inputs estimated from its update. Source: Xu
et al., ACE-Merging, CVPR 2026, arXiv 2603.02945, as github.com/unravel-xu/ACE-Merging computes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from hf_locstitch.stitch.matrix_method import MatrixMethod

if TYPE_CHECKING:
    from torch import Tensor

HETEROGENEOUS = 0.3  # above which tasks change a matrix so unequally that covariances are normalized
TINY = 1e-12


class Ace(MatrixMethod):
    """epsilon: added to the diagonal of every covariance. rank: share of the singular directions that refine matrices
    which tasks change unequally."""

    name: Literal["ace"] = "ace"
    title: ClassVar[str] = "ACE-Merging"
    paper: ClassVar[str] = "https://arxiv.org/abs/2603.02945"
    squares: ClassVar[float] = 6
    squares_of_each: ClassVar[float] = 1
    epsilon: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    rank: float = Field(default=0.3, gt=0, le=1, allow_inf_nan=False)

    def change(self, task_vectors: Sequence[Tensor]) -> Tensor:
        """(Σ τ C) (Σ C + c)⁻¹ of the centered τ, C = τᵀτ + epsilon · I; c: the mean row of Σ τᵀτ, in every row.

        Finetunes that left the matrix as it was take no part. Those that hardly changed it make the refinement run
        away: one that is longer than the task vectors together is left out."""
        import torch

        task_vectors = [vector for vector in task_vectors if vector.any()] or task_vectors[:1]
        energies = torch.stack([vector.square().sum() for vector in task_vectors])
        unequal = heterogeneity(energies) > HETEROGENEOUS
        covariances = []
        above, below = torch.zeros_like(task_vectors[0]), torch.zeros(())
        for vector in task_vectors:
            centered = vector - vector.mean(0, keepdim=True)
            covariance = centered.T @ centered
            size = covariance.trace() + TINY if unequal else 1.0
            covariance /= size
            regular = covariance + self.epsilon / size * torch.eye(len(covariance), dtype=covariance.dtype)
            above += centered @ regular
            below = below + regular
            covariances.append(covariance)
        prior = sum(covariances[1:], start=covariances[0]).mean(0, keepdim=True)
        prior = prior / (energies.mean() + TINY) if unequal else prior
        solved = torch.linalg.solve(below + prior, above, left=False)
        if not unequal:
            return solved
        mean = below / len(task_vectors)
        rest = solved.clone()
        for vector, covariance in zip(task_vectors, covariances, strict=True):
            rest += vector @ (covariance - mean)
        refinement = self._refinement(rest)
        return solved + refinement if refinement.norm() <= energies.sqrt().sum() else solved

    def _refinement(self, matrix: Tensor) -> Tensor:
        """The largest singular directions of a matrix, each of their mean size."""
        import torch

        left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
        kept = max(1, int(self.rank * len(sizes)))
        return sizes[:kept].mean() * left[:, :kept] @ right[:kept]


def heterogeneity(energies: Tensor) -> float:
    """How unequal the squared norms of task vectors [tasks] are: the variance of their logarithms over the squared mean
    of these."""
    logs = (energies + TINY).log()
    return (logs.var() / (logs.mean().square() + TINY)).item() if len(logs) > 1 else 0.0


COMPONENT = Ace
