"""How alike the task vectors of a merge are, from a sample: what tells of a wrong base or a finetune given twice.

Finetunes of one base move in nearly orthogonal directions. Measured from another model B than their own base θ, all of
their task vectors share the step θ − B, so that every two of them have a cosine near 1/2 or above.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations

import numpy as np
import numpy.typing as npt

from hf_locstitch.checkpoints.sample import Sample
from hf_locstitch.runtime.dtypes import Values

ALIKE = 0.4  # finetunes of one base were seen up to 0.2; of a base that is another finetune, about 0.5 to 0.7
SAME = 0.999

Floats = npt.NDArray[np.float64]


def widened(values: Values) -> Floats:
    """In float64; what is not finite is NaN, of which numpy does not warn in sums."""
    with np.errstate(invalid="ignore"):
        wide = values.astype(np.float64)
    return np.where(np.isfinite(wide), wide, np.nan)


def inner(one: Floats, other: Floats) -> Floats:
    """Inner products over the last dimension, in this thread: for `@`, BLAS wakes one on every core, and they spin."""
    return np.einsum("...k,...k->...", one, other)


def cosines(
    base: Sample, finetuned: Mapping[str, Sample], stood_for: Mapping[str, int]
) -> dict[tuple[str, str], float]:
    """The cosine between the task vectors of every two finetunes; 0 where one of them is zero.

    stood_for: elements of the whole models that each tensor's values stand for.
    """
    gram = np.zeros((len(finetuned), len(finetuned)))
    for tensor, values in base.items():
        start = widened(values)
        vectors = np.stack([widened(sample[tensor]) - start for sample in finetuned.values()])
        vectors[:, ~np.isfinite(vectors).all(0)] = 0
        gram += inner(vectors[:, None], vectors) * (stood_for[tensor] / len(start))
    norms = np.sqrt(gram.diagonal())
    scale = np.outer(norms, norms)
    found = np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)
    return {(one, other): float(found[i, j]) for (i, one), (j, other) in combinations(enumerate(finetuned), 2)}


def likeness_warnings(found: Mapping[tuple[str, str], float]) -> Iterator[str]:
    """What such cosines tell. found: as `cosines` returns it."""
    same = [pair for pair, cosine in found.items() if cosine >= SAME]
    for one, other in same:
        yield (
            f"the task vectors of {one} and {other} point in the same direction (cosine {found[one, other]:.3f}): if "
            "this is one finetune given twice, it outvotes the others."
        )
    others = {pair: cosine for pair, cosine in found.items() if pair not in same}
    if others and min(others.values()) >= ALIKE:
        (one, other), least = min(others.items(), key=lambda item: item[1])
        yield (
            f"all task vectors point in similar directions (cosines of {least:.2f}, {one} and {other}, and above), "
            "where finetunes of one base have hardly any in common: the base may be swapped with a finetune, or not be "
            "the model that they were made from."
        )
