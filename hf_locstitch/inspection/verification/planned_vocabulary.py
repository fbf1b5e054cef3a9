"""Where the rows of embeddings and heads come from, planned once more from the inputs' tokenizers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_locstitch.artifacts.manifest import FILE, Manifest
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.inspection.verification.report import Finding
from hf_locstitch.plan.checking import chosen_tensors
from hf_locstitch.plan.recipe import Recipe
from hf_locstitch.plan.vocabulary import VocabularyPlan, plan_vocabulary

EXAMPLES = 3  # of what differs
LONGEST = 100  # characters of one


def plan_again(recipe: Recipe, inputs: Mapping[str, Checkpoint], order: Sequence[str]) -> VocabularyPlan | None:
    """order: of the finetunes in sums. Raises RequestError."""
    finetuned = {name: checkpoint for name, checkpoint in inputs.items() if name != "base"}
    chosen = chosen_tensors(recipe, inputs["base"])
    vocabulary, _ = plan_vocabulary(recipe, inputs["base"], finetuned, chosen, order)
    return vocabulary


def check_vocabulary(record: Manifest, due: VocabularyPlan | None) -> Iterator[Finding]:
    """What the manifest records is what was planned: a finding for each of its keys that differs."""
    if record.vocabulary is None or due is None:
        if record.vocabulary is not None or due is not None:
            planned = "absent" if due is None else due.describe()
            recorded = "absent" if record.vocabulary is None else f"{len(record.vocabulary)} keys"
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
