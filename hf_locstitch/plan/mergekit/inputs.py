"""Which models a config of mergekit's merges, as the base and finetunes of a recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_locstitch.checkpoints.names import make_name
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.plan.mergekit.config import MergekitConfig, ModelRef, Slice, Source
from hf_locstitch.plan.mergekit.methods import MergekitMethod, Takes
from hf_locstitch.plan.token_models import WORDS
from hf_locstitch.runtime.human import counted


@dataclass
class Findings:
    """problems: what cannot be translated. notes: how the result differs from mergekit's. As clauses."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Inputs:
    """base, refs: of the recipe, refs in the order of its finetunes, with their names. sources: the finetunes in the
    config. part: the slice that they are in, if there is one."""

    base: str
    sources: tuple[Source, ...]
    refs: tuple[str, ...]
    names: tuple[str, ...]
    part: Slice | None

    @property
    def entries(self) -> list[dict[str, str] | str]:
        """`finetuned` of the recipe; names are given where they are not the default."""
        return [
            ref if name == _default_name(ref) else {"ref": ref, "name": name}
            for ref, name in zip(self.refs, self.names, strict=True)
        ]


def read_inputs(config: MergekitConfig, method: MergekitMethod, found: Findings) -> Inputs | None:
    """None if there are problems."""
    forms = {key: getattr(config, key) for key in ("models", "slices", "modules")}
    given = [key for key, value in forms.items() if value is not None]
    if len(given) != 1:
        found.problems.append(
            f"exactly one of models, slices and modules is needed, not {' and '.join(given) or 'none'}"
        )
    elif config.modules is not None:
        found.problems.append("modules gives each part of a model its own merge, which is one merge here; use models")
    elif config.slices is not None and len(config.slices) > 1:
        found.problems.append(
            f"its {len(config.slices)} slices put layers together anew, but here every layer keeps its place; use "
            "models, or one slice of all layers, and a list of values for what differs by layer"
        )
    if found.problems:
        return None
    part = config.slices[0] if config.slices else None
    if part is not None and part.residual_weight is not None:
        found.problems.append("residual_weight has no counterpart here; drop it")
    listed = part.sources if part is not None else config.models or ()
    base = config.base_model or (part.base_model if part is not None else None)
    if part is not None and part.base_model is not None and part.base_model != base:
        found.problems.append(f"base_model is {base}, and in the slice {part.base_model}; give one")
    found.problems += [f"{model} is listed {n} times" for model, n in Counter(s.model for s in listed).items() if n > 1]
    sources = _merged(config.merge_method, method.takes, listed, base, found, add_base=part is None)
    if found.problems or not sources:
        return None
    start = (base or sources[0].model).path
    refs = [_ref(source.model, start, found) for source in sources]
    return None if found.problems else Inputs(start, sources, tuple(refs), _names(refs), part)


def _merged(
    name: str, takes: Takes, listed: Sequence[Source], base: ModelRef | None, found: Findings, *, add_base: bool
) -> tuple[Source, ...]:
    """The finetunes of the recipe, in order. add_base: mergekit merges the base, too, where all models are merged and
    it is not listed; in slices it does not."""
    others = tuple(source for source in listed if source.model != base)
    own = next((source for source in listed if source.model == base), None)
    if takes in (Takes.OTHERS, Takes.FROM_BASE) and base is None:
        found.problems.append(f"{name} needs base_model")
        return ()
    if base is not None and base.adapter is not None:
        found.problems.append(
            f"base_model is {base}, an adapter over a model; merge the adapter first, and name the result"
        )
    if takes is Takes.PAIR and base is not None:
        found.problems.append(
            f"{name} with base_model interpolates task vectors, which no method here does; drop it, or use slerp"
        )
    count = 2 if takes is Takes.PAIR else 1
    if takes in (Takes.PAIR, Takes.FROM_BASE) and len(others) != count:
        beside = "" if takes is Takes.PAIR else " beside base_model"
        found.problems.append(f"{name} merges {counted(count, 'model')}{beside}, not {len(others)}")
    if not others:
        found.problems.append("there is no model to merge beside base_model")
    if takes is Takes.FROM_BASE and base is not None:
        return (own or Source(model=base), *others)
    if takes is Takes.ALL and base is not None:
        return (*listed, Source(model=base)) if own is None and add_base else tuple(listed)
    return others


def _ref(model: ModelRef, base: str, found: Findings) -> str:
    """A finetune's; an adapter goes by its own."""
    if model.adapter is None:
        return model.path
    if model.path != base:
        found.problems.append(
            f"{model} lays an adapter over {model.path}, but here adapters lie over the base, {base}; merge it first, "
            "and name the result"
        )
    return model.adapter


def _default_name(ref: str) -> str:
    return make_name(parse_ref(ref).name, "")


def _names(refs: Sequence[str]) -> tuple[str, ...]:
    """The last parts of the refs, or where these are not enough, all of them, or with a number."""
    short = [_default_name(ref) for ref in refs]
    seen = Counter(name.casefold() for name in short)
    names: list[str] = []
    for number, (ref, name) in enumerate(zip(refs, short, strict=True), start=1):
        if not name or seen[name.casefold()] > 1 or name.casefold() in WORDS:
            name = make_name(ref.replace("/", "-").replace("@", "-"), f"finetune-{number}")
        taken = {one.casefold() for one in names}
        names.append(f"{name}-{number}" if name.casefold() in taken or name.casefold() in WORDS else name)
    return tuple(names)
