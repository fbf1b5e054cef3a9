"""Where the rows of embeddings and heads come from, planned once more from the inputs' tokenizers."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from hf_locstitch.artifacts.manifest import FILE, Manifest
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.inspection.verification.report import Finding
from hf_locstitch.plan.checking import chosen_tensors
from hf_locstitch.plan.recipe import Recipe
from hf_locstitch.plan.vocabulary import VocabularyPlan, plan_vocabulary
from hf_locstitch.runtime.human import counted

EXAMPLES = 3  # of what differs
LONGEST = 100  # characters of one


def plan_again(
    recipe: Recipe, base: Checkpoint, finetuned: Mapping[str, Checkpoint], localized: Collection[str]
) -> VocabularyPlan | None:
    """finetuned: those that bring tokens, in the order of summation. localized: tensors of the merge. Raises
    RequestError."""
    if not finetuned:
        return None
    chosen = sorted(localized) if recipe.localized else chosen_tensors(recipe, base)
    return plan_vocabulary(recipe, base, finetuned, chosen, list(finetuned))[0]


def check_vocabulary(record: Manifest, due: VocabularyPlan | None) -> Iterator[Finding]:
    """What the manifest records is what was planned: a finding for each of its keys that differs."""
    if record.vocabulary is None or due is None:
        if record.vocabulary is not None or due is not None:
            planned = "absent" if due is None else due.describe()
            recorded = "absent" if record.vocabulary is None else counted(len(record.vocabulary), "key")
            yield Finding("recipe", FILE, "vocabulary", recorded, planned)
        return
    planned = due.as_json()
    for key in sorted(record.vocabulary.keys() | planned.keys()):
        recorded = record.vocabulary.get(key, "absent"), planned.get(key, "absent")
        if recorded[0] != recorded[1]:
            yield Finding("recipe", FILE, f"vocabulary.{key}", told(*recorded), told(*reversed(recorded)))


def told(value: Any, other: Any) -> str:
    """A JSON value, in a line: of a list how many there are, and a few that another list lacks."""
    if not isinstance(value, list) or not isinstance(other, list):
        return _cut(value)
    known = {json.dumps(one, sort_keys=True) for one in other}
    only = [one for one in value if json.dumps(one, sort_keys=True) not in known]
    if not only:
        return f"{len(value):,} entries" + (", in another order" if len(value) == len(other) else "")
    examples = ", ".join([*map(_cut, only[:EXAMPLES]), *(["…"] if len(only) > EXAMPLES else [])])
    return f"{len(value):,} entries ({len(only):,} of them only here: {examples})"


def _cut(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
