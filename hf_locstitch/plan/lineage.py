"""What hashes and a small sample of weights tell of finetunes: of another base, given twice, the base itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TypeVar

from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.header import TensorInfo
from hf_locstitch.checkpoints.likeness import cosines, likeness_warnings
from hf_locstitch.checkpoints.lineage import STRANGE, Lineage, length_warning, lineage, lineage_warnings
from hf_locstitch.checkpoints.sample import Sample, read_samples, sample_pieces, stood_for
from hf_locstitch.plan.plans import LocalizePlan, MergePlan, Plan

AnyPlan = TypeVar("AnyPlan", MergePlan, LocalizePlan)
CLOSELY = 1 << 13  # tensors to look at, and
CLOSE = 1 << 22  # elements of them, before a finetune counts as the base itself


@dataclass(frozen=True)
class Look:
    """lineage: of each finetune that could be sampled."""

    lineage: Mapping[str, Lineage] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def with_lineage(plan: AnyPlan) -> AnyPlan:
    """The plan with what could be told before the work begins."""
    try:
        found = look(plan)
    except Exception as error:  # what only people look at ends no merge
        fault = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        found = Look(warnings=(f"the finetunes were not compared with the base and one another ({fault}).",))
    return replace(plan, lineage=found.lineage, warnings=(*plan.warnings, *found.warnings))


def look(plan: Plan, fetch: bool = True) -> Look:
    """What a sample tells of the plan's inputs. fetch: whether the Hub is asked for it.

    Matrices whose rows are matched by tokens are left out: the files have them in other places.
    """
    inputs, tensors = plan.inputs, plan.mask_tensors
    if plan.aligned is not None:
        inputs = plan.aligned.own
        tensors = [info for info in tensors if info.name not in plan.aligned.matrices]
    pieces = sample_pieces(tensors)
    samples, stand = read_samples(inputs, pieces, fetch), stood_for(tensors, pieces)
    base = samples.pop("base", {})
    found = {name: lineage(base, sample, stand) for name, sample in samples.items()} if base else {}
    twice = {pair for pair in combinations(inputs, 2) if same_weights(*(inputs[name] for name in pair))}
    warned, others = twice, {name: one for name, one in found.items() if ("base", name) not in twice}
    if plan.recipe.method.of_models:
        warned, others = {pair for pair in twice if "base" not in pair}, {}
    idle = [name for name, one in others.items() if _is_base(inputs, name, one, tensors)]
    broken = [name for name, one in found.items() if not one.sampled and any(map(len, samples[name].values()))]
    warnings = [*same_warnings(warned), *(f"{name} {NOTHING}" for name in idle)]
    warnings += [f"{name} {BROKEN}" for name in broken]
    for name, one in found.items():
        warnings += lineage_warnings(name, one)
    kin = {name: one for name, one in found.items() if _is_kin(one)}
    warnings += length_warning(kin)
    warnings += _likeness(base, {name: samples[name] for name in kin}, stand, twice)
    return Look(found, tuple(warnings))


BROKEN = (
    "has NaN or infinity where a sample of its weights was read, or the base has: it is damaged, and is refused once "
    "its weights are read."
)
NOTHING = "does not differ from the base in any weight of a sample: its task vector is zero."


def _is_base(inputs: Mapping[str, Checkpoint], name: str, found: Lineage, tensors: Sequence[TensorInfo]) -> bool:
    """Whether a finetune that does not differ in its sample does not in a larger one either, if there is one here."""
    if found.unchanged < 1:
        return False
    pieces = sample_pieces(tensors, CLOSELY, CLOSE, vectors=True)
    closer = read_samples({one: inputs[one] for one in ("base", name)}, pieces, fetch=False)
    return len(closer) == 2 and lineage(closer["base"], closer[name], stood_for(tensors, pieces)).unchanged == 1


def _is_kin(found: Lineage) -> bool:
    return found.correlation is None or found.correlation >= STRANGE


def _likeness(
    base: Sample, finetuned: Mapping[str, Sample], stand: Mapping[str, int], twice: set[tuple[str, str]]
) -> Iterator[str]:
    """Of pairs that are not known to be the same."""
    if len(finetuned) < 2:
        return iter(())
    cosine = cosines(base, finetuned, stand)
    return likeness_warnings({pair: value for pair, value in cosine.items() if pair not in twice})


def same_weights(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints have the same files of weights, by where they are or by hashes that repos state."""
    hashes = _promised(one)
    return one.source.identity == other.source.identity or (bool(hashes) and hashes == _promised(other))


def _promised(checkpoint: Checkpoint) -> list[str]:
    """The hashes of all files of weights, ascending; none if some are not known."""
    hashes = [checkpoint.source.files[file].promised for file in checkpoint.files if file in checkpoint.source.files]
    return sorted(digest for digest in hashes if digest) if all(hashes) else []


def same_warnings(twice: set[tuple[str, str]]) -> Iterator[str]:
    """twice: pairs of inputs with the same weights."""
    for one, other in sorted(twice):
        if one == "base":
            yield f"{other} has the very weights of the base: its task vector is zero."
        else:
            yield f"{one} and {other} are the same weights: a finetune that is given twice outvotes the others."
