"""The objectives by name, and which one a model's architecture suggests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from hf_locstitch.data.causal_lm import CausalLM
from hf_locstitch.data.classification import ImageClassification, SequenceClassification
from hf_locstitch.data.features import Features
from hf_locstitch.data.masked_lm import MaskedLM
from hf_locstitch.data.zero_shot import ClipZeroShot, TextZeroShot
from hf_locstitch.errors import RecipeError

AnyObjective = Annotated[
    CausalLM | MaskedLM | SequenceClassification | ImageClassification | ClipZeroShot | TextZeroShot | Features,
    Field(discriminator="kind"),
]

SUGGESTED = {
    "ForCausalLM": CausalLM,
    "LMHeadModel": CausalLM,
    "ForSequenceClassification": SequenceClassification,
    "ForImageClassification": ImageClassification,
}


def suggest(config: Mapping[str, Any], label: str) -> AnyObjective:
    """For a finetune with this config.json. Raises RecipeError where the objective needs to be told."""
    architecture = str((config.get("architectures") or ["none named"])[0])
    for ending, objective in SUGGESTED.items():
        if architecture.endswith(ending):
            return objective()
    raise RecipeError(
        f"{label} is a {architecture}: what its data asks of it must be said. Give its data an objective in the "
        "recipe: {kind: masked-lm, label_words: [...]}, {kind: clip-zero-shot, classes: [...]} or "
        "{kind: text-zero-shot, classes: [...]}."
    )
