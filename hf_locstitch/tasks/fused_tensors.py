"""What transformers puts together while it loads a checkpoint: experts stacked, gate and up projections joined.

Only what keeps every part's bytes together: stacks along the first dimension, and joins of the rows of each.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from hf_locstitch.checkpoints.rearranged import Part
from hf_locstitch.tasks.parameter_names import Group

STACK, JOIN = ("MergeModulelist", 0), "Concatenate"


def parts(model_types: Iterable[str], names: Collection[str]) -> dict[str, Part]:
    """What each tensor on disk is, or is a part of, in memory. Names that no conversion changes are wholes."""
    found = {name: Part(name) for name in names}
    for model_type in model_types:
        found |= _parts(model_type, [name for name, part in found.items() if part == Part(name)])
    return found


def _parts(model_type: str, names: Sequence[str]) -> dict[str, Part]:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_converters, apply_renamings

    mapping = get_checkpoint_conversion_mapping(model_type) or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter) and _keeps_bytes_together(entry)]
    found = {}
    for name in names:
        renamed = apply_renamings(name, renamings)
        whole, pattern = apply_converters(renamed, converters)
        entry = next((one for one in converters if pattern in one.source_patterns), None)
        found[name] = Part(whole, _order(entry, pattern, renamed)) if entry and pattern else Part(whole)
    return found


def experts_on_disk(model: Any, groups: Iterable[Group]) -> dict[Group, list[list[str]]]:
    """Of the stacks whose experts lie one by one on disk: the tensors of each expert, whose rows one after another are
    the expert's."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_converters, apply_renamings

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def place(name: str) -> tuple[int, int] | None:
        renamed = apply_renamings(name, renamings)
        pattern = apply_converters(renamed, converters)[1]
        entry = next((one for one in converters if pattern in one.source_patterns), None)
        return _order(entry, pattern, renamed) if pattern and entry and _stacks(entry) else None

    found: dict[Group, list[list[str]]] = {}
    for group in groups:
        if group.direct or len(group.parameters) > 1:
            continue
        places = {place(name): name for name in group.disk}
        experts, matrices = (len({own[side] for own in places if own}) for side in range(2))
        every = [(expert, matrix) for expert in range(experts) for matrix in range(matrices)]
        if len(places) == len(group.disk) and places.keys() == set(every):  # none is missing
            names = [places[own] for own in every]
            found[group] = [names[first : first + matrices] for first in range(0, len(names), matrices)]
    return found


def _stacks(converter: Any) -> bool:
    return _keeps_bytes_together(converter) and type(converter.operations[0]).__name__ == STACK[0]


def _keeps_bytes_together(converter: Any) -> bool:
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
    return len(converter.target_patterns) == 1 and steps in ([STACK], [STACK, (JOIN, 1)], [(JOIN, 0)])


def _order(converter: Any, pattern: str, name: str) -> tuple[int, int]:
    """Of a part: by expert and then by projection where experts are stacked, else by projection first."""
    projection = converter.source_patterns.index(pattern)
    number = re.search(re.escape(pattern.replace("\\", "")).replace(r"\*", r"(\d+)"), name)
    expert = int(number[1]) if number and number.groups() else 0
    return (expert, projection) if _stacks(converter) else (projection, expert)
