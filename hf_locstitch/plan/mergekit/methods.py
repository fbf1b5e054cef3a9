"""mergekit's methods and their parameters, with its defaults, and what becomes of each in a recipe. Source: mergekit
0.1.5, merge_methods/ and sparsify.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Takes(Enum):
    """Which models are the finetunes of the recipe."""

    OTHERS = "all models but the base"
    ALL = "all models, the base among them if there is one"
    FROM_BASE = "the base, then the one other"
    PAIR = "two models without a base"


@dataclass(frozen=True)
class Parameter:
    """to: where its value goes in the recipe, dotted; None if it changes no value. default: mergekit's; None if it has
    to be given. each: the field that has a value for each finetune, where they differ. only: the one value that can be
    translated, if there is but one, and why."""

    to: str | None
    default: Any = None
    each: str | None = None
    only: Any = None
    why: str = ""


@dataclass(frozen=True)
class MergekitMethod:
    """name: of the method here. shared: parameters that mergekit reads for all models at once; own: for each model.
    also: fields of the recipe that it has in any case, dotted. notes: how its values differ here. varied: in its
    place where parameters of a model differ between models or tensors that are one for all here."""

    name: str
    takes: Takes
    shared: Mapping[str, Parameter] = field(default_factory=dict)
    own: Mapping[str, Parameter] = field(default_factory=dict)
    also: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    varied: MergekitMethod | None = None


WEIGHT = Parameter("weights")
NO_EFFECT = Parameter(None, False)
NOT_RESCALED = Parameter(None, False, only=False, why="what is kept by size or rank is not rescaled here")
DRAWN = (
    "which entries are dropped is drawn by another generator, from `seed`: single values differ from any of mergekit's"
)
RESCALED = (
    "what is kept is divided by how likely that was, as in the paper; mergekit scales each tensor to the sum of "
    "|task vector| that it had"
)


def _sum_of_task_vectors(
    name: str,
    *,
    normalize: bool,
    rescale: Parameter = NOT_RESCALED,
    own: Mapping[str, Parameter] | None = None,
    also: Mapping[str, Any] | None = None,
    notes: tuple[str, ...] = (),
    varied: MergekitMethod | None = None,
) -> MergekitMethod:
    """One of those that mergekit calls generalized task arithmetic."""
    shared = {
        "normalize": Parameter("method.normalize", normalize),
        "lambda": Parameter("scale", 1.0),
        "rescale": rescale,
        "int8_mask": NO_EFFECT,
    }
    return MergekitMethod(name, Takes.OTHERS, shared, {"weight": WEIGHT, **(own or {})}, also or {}, notes, varied)


DENSITY = {"density": Parameter("method.density", 1.0, each="method.densities")}
RESCALE = Parameter("method.rescale", True)
GAMMA = {**DENSITY, "gamma": Parameter("method.gamma", 0.01)}
EPSILON = {**DENSITY, "epsilon": Parameter("method.epsilon", 0.15)}
RANDOM = (DRAWN, RESCALED)
TRIMMED = _sum_of_task_vectors(
    "breadcrumbs",
    normalize=True,
    own=DENSITY,
    also={"method.elect": True, "method.gamma": 0.0},
    notes=(
        "densities differ: `breadcrumbs` with gamma 0 and elected signs, which is ties in each tensor, has several",
    ),
)

TRANSLATED: Mapping[str, MergekitMethod] = {
    "linear": MergekitMethod(
        "average", Takes.ALL, {"normalize": Parameter("method.normalize", True)}, {"weight": WEIGHT}
    ),
    "slerp": MergekitMethod("slerp", Takes.FROM_BASE, {"t": Parameter("method.t")}),
    "nuslerp": MergekitMethod(
        "slerp",
        Takes.PAIR,
        {
            "nuslerp_flatten": Parameter(None, True, only=True, why="each tensor is one vector here"),
            "nuslerp_row_wise": NO_EFFECT,
        },
        {"weight": Parameter("method.t")},
        notes=("tensors whose |cosine| is above 0.9995 are interpolated along a line, as slerp does in both programs",),
    ),
    "task_arithmetic": _sum_of_task_vectors("task-arithmetic", normalize=False, rescale=NO_EFFECT),
    "ties": _sum_of_task_vectors(
        "ties",
        normalize=True,
        own={"density": Parameter("localizer.density", 1.0)},
        also={"localizer.method": "magnitude", "localizer.scope": "tensor"},
        varied=TRIMMED,
    ),
    "dare_linear": _sum_of_task_vectors("dare-linear", normalize=False, rescale=RESCALE, own=DENSITY, notes=RANDOM),
    "dare_ties": _sum_of_task_vectors("dare-ties", normalize=False, rescale=RESCALE, own=DENSITY, notes=RANDOM),
    "della": _sum_of_task_vectors(
        "della", normalize=True, rescale=RESCALE, own=EPSILON, also={"method.elect": True}, notes=RANDOM
    ),
    "della_linear": _sum_of_task_vectors(
        "della", normalize=False, rescale=RESCALE, own=EPSILON, also={"method.elect": False}, notes=RANDOM
    ),
    "breadcrumbs": _sum_of_task_vectors(
        "breadcrumbs", normalize=False, own=GAMMA, also={"method.elect": False}
    ),
    "breadcrumbs_ties": _sum_of_task_vectors(
        "breadcrumbs", normalize=False, own=GAMMA, also={"method.elect": True}
    ),
    "model_stock": MergekitMethod(
        "model-stock", Takes.OTHERS, {"filter_wise": Parameter("method.filter_wise", False)}
    ),
    "sce": MergekitMethod(
        "sce",
        Takes.OTHERS,
        {"select_topk": Parameter("method.density", 1.0), "int8_mask": NO_EFFECT},
        notes=(
            "finetunes are weighted by the mean square of their changes in every tensor, as in the paper; mergekit "
            "weighs them alike in tensors where these add up to less than 1e-6",
        ),
    ),
    "karcher": MergekitMethod(
        "karcher",
        Takes.ALL,
        {"max_iter": Parameter("method.max_iter", 10), "tol": Parameter("method.tol", 1e-5)},
    ),
}  # fmt: skip

# Why a method is not translated, and what to use in its place.
REFUSED: Mapping[str, str] = {
    "passthrough": "it copies layers into a model of another depth, which merges nothing; use mergekit for that: "
    "mergekit-yaml CONFIG.yml DIR",
    "multislerp": "no method here is the same; karcher is near to it",
    "nearswap": "no method here is the same; use mergekit for that (mergekit-yaml CONFIG.yml DIR), or "
    "merge_method: ties",
    "arcee_fusion": "no method here is the same; locstitch and ties keep what changed most, too",
    "ram": "no method here is the same; locstitch averages where masks overlap, too",
    "ramplus_tl": "no method here is the same; locstitch averages where masks overlap, too",
}

KNOWN = frozenset(
    name for method in TRANSLATED.values() for name in (*method.shared, *method.own)
)  # parameters of some method
