"""Whether a model was finetuned from a base, judging by a sample of both: pure arithmetic, and what to say of it.

Finetuning leaves weights correlated with the base's: near 1 as a rule, and still at 0.35 after training so long and at
rates so high that ‖τ‖ is 2.6 of ‖θ‖. Weights of models that were trained apart are uncorrelated (within 0.01), so that
‖τ‖ is about √2 of ‖θ‖. What is said of rounding follows from where values lie between numbers of the narrower dtype:
the error of rounding is evenly spread there, while small changes by training are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median

import ml_dtypes
import numpy as np

from hf_locstitch.checkpoints.likeness import Floats, inner, widened
from hf_locstitch.checkpoints.sample import Sample
from hf_locstitch.runtime.dtypes import DTYPE, Values

STRANGE = 0.1  # a lower correlation is not that of a finetune; tests/checkpoints/test_lineage.py has both sides
ROUNDED = 0.4  # of ‖τ‖; a larger part that is rounding is worth a warning, and can be told from training
LONG = 5  # times the others' length: at seven times, merges were seen to lose the others (docs/quality.md, Hard cases)
EVEN = 0.05  # below, the mean of cos 2πu is that of values u spread evenly between the numbers of a dtype


@dataclass(frozen=True)
class Rounding:
    """What of a task vector is rounding. share: ‖rounding‖ / ‖τ‖. side: the model that was rounded. to, others: its
    dtype and the other model's."""

    share: float
    side: str
    to: str
    others: str


@dataclass(frozen=True)
class Lineage:
    """One finetune beside its base, in a sample of their weights.

    Attributes:
        sampled: Weights in the sample that are finite numbers in both.
        unchanged: Share of the weights that are the base's, as the sample has it; 0 if there are none.
        distance: ‖τ‖ / ‖θ‖, of the task vector τ and the base θ, likewise.
        correlation: Between both models' weights, the mean over tensors; None where a tensor's do not vary.
        rounding: None where nothing was rounded that training did not change by more.
    """

    sampled: int
    unchanged: float
    distance: float
    correlation: float | None
    rounding: Rounding | None = None

    def describe(self) -> str:
        """For people, one line."""
        if not self.sampled:
            return "no weight of a sample is a finite number in both models"
        told = "" if self.correlation is None else f", correlation {self.correlation:.3f}"
        return f"‖τ‖ is {self.distance:.2g} of ‖θ‖, {100 * self.unchanged:.3g} % of the weights unchanged{told}"


def lineage(base: Sample, finetuned: Sample, stood_for: Mapping[str, int]) -> Lineage:
    """base, finetuned: values at the same places, tensor -> [sampled]. What is not finite is left out.

    stood_for: elements of the whole models that each tensor's values stand for.
    """
    pairs = {tensor: _finite(base[tensor], finetuned[tensor]) for tensor in base}
    correlations = [found for pair in pairs.values() if (found := _correlation(*pair)) is not None]
    filled = {tensor: pair for tensor, pair in pairs.items() if len(pair[0])}
    counts = np.array([stood_for[tensor] for tensor in filled], np.float64)
    lengths = np.array([len(start) for start, _ in filled.values()], np.int64)
    means = np.array([_means(*pair) for pair in filled.values()]).reshape(-1, 3)
    unchanged, square, base_square = (counts[:, None] * means).sum(0)
    norm = math.sqrt((lengths * means[:, 1]).sum())  # of the sample's own task vector
    return Lineage(
        sampled=int(lengths.sum()),
        unchanged=float(unchanged / counts.sum()) if filled else 0.0,
        distance=math.sqrt(square / base_square) if base_square else 0.0,
        correlation=float(np.mean(correlations)) if correlations else None,
        rounding=_rounding(base, finetuned, norm) if norm else None,
    )


def _means(base: Floats, finetuned: Floats) -> tuple[float, float, float]:
    """Of what is unchanged, of τ² and of θ²."""
    tau = finetuned - base
    return float(np.mean(tau == 0)), float(inner(tau, tau)) / len(tau), float(inner(base, base)) / len(tau)


def _finite(base: Values, finetuned: Values) -> tuple[Floats, Floats]:
    one, other = widened(base), widened(finetuned)
    fine = np.isfinite(one) & np.isfinite(other)
    return one[fine], other[fine]


def _correlation(one: Floats, other: Floats) -> float | None:
    """None where one of the two does not vary."""
    if len(one) < 2:
        return None
    one, other = one - one.mean(), other - other.mean()
    scale = _norm(one) * _norm(other)
    return float(inner(one, other)) / scale if scale else None


def _norm(values: Floats) -> float:
    return math.sqrt(inner(values, values))


def _rounding(base: Sample, finetuned: Sample, norm: float) -> Rounding | None:
    """norm: of the task vector. An error that is spread evenly over a spacing has a twelfth of its square as variance.

    None where the differences are not spread evenly: then nothing was rounded, or little in comparison.
    """
    mixed = [tensor for tensor in base if _digits(base[tensor]) != _digits(finetuned[tensor])]
    if not mixed:
        return None
    first = mixed[0]
    of_base = _digits(base[first]) < _digits(finetuned[first])
    narrow, wide = (base, finetuned) if of_base else (finetuned, base)
    parts = [_spacing(narrow[tensor], wide[tensor]) for tensor in mixed]
    spacing, away = (np.concatenate(column) for column in zip(*parts, strict=True))
    weight = spacing**2  # by which each counts in the norm
    if not len(away) or abs(float(inner(np.cos(2 * np.pi * away), weight))) > EVEN * float(weight.sum()):
        return None
    share = min(1.0, _norm(spacing) / math.sqrt(12) / norm)
    return Rounding(share, "base" if of_base else "finetune", *(_name(one[first]) for one in (narrow, wide)))


def _spacing(narrow: Values, wide: Values) -> tuple[Floats, Floats]:
    """How far apart the narrow dtype's numbers are at each value, and how many times that the wide one lies away.

    Of zeros, and of what is not finite, nothing is said.
    """
    near, other = _finite(narrow, wide)
    some = near != 0
    spacing = np.ldexp(1.0, np.frexp(near[some])[1] - _digits(narrow))
    return spacing, (other[some] - near[some]) / spacing


def _digits(values: Values) -> int:
    """Binary digits of numbers of its dtype, the implicit one included."""
    return int(ml_dtypes.finfo(values.dtype).nmant) + 1


def _name(values: Values) -> str:
    return next(name for name, dtype in DTYPE.items() if dtype == values.dtype)


def length_warning(found: Mapping[str, Lineage]) -> Iterator[str]:
    """A sentence where one task vector is much longer than those of the other finetunes."""
    if len(found) < 2:
        return
    longest = max(found, key=lambda name: found[name].distance)
    others = median(one.distance for name, one in found.items() if name != longest)
    if others and (times := found[longest].distance / others) >= LONG:
        yield (
            f"the task vector of {longest} is {times:.0f} times as long as those of the others: it outvotes them where "
            "they meet. Merge them without it, or fit the values to inputs of each (--stitch refit --data)."
        )


def lineage_warnings(name: str, found: Lineage) -> Iterator[str]:
    """What is doubtful about one finetune."""
    rounding = found.rounding
    if found.correlation is not None and found.correlation < STRANGE:
        yield (
            f"{name} looks as if it was not finetuned from this base: ‖τ‖ is {found.distance:.2g} of ‖θ‖, and its "
            f"weights have a correlation of {found.correlation:.2f} with the base's, where those of finetunes are near "
            "1. Use the base that it was made from."
        )
    elif rounding is not None and rounding.share > ROUNDED:
        yield (
            f"about {100 * rounding.share:.0f} % of the task vector of {name} is the {rounding.side}'s rounding to "
            f"{rounding.to}, not training: the other model is in {rounding.others}. Use the {rounding.side} in "
            f"{rounding.others}, if there is one."
        )
