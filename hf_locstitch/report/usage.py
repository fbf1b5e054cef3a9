"""How a model is used, judging by its config and the files beside its weights: which classes of transformers load it,
and which example of them its card shows. No model is opened or run."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_locstitch.checkpoints.config import architecture, part
from hf_locstitch.checkpoints.side_files import PROCESSORS, TEMPLATES, TOKENIZER, matching
from hf_locstitch.tasks.objectives.seq2seq import Seq2Seq

# Endings of architectures that one automatic class loads, whatever the family.
HEADS: Mapping[str, str] = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForSemanticSegmentation": "AutoModelForSemanticSegmentation",
    "ForAudioClassification": "AutoModelForAudioClassification",
    "ForCTC": "AutoModelForCTC",
}
SOUND = ("feat_extract_activation", "feature_projection_input_dim")  # keys of configs whose sequences are sounds
HEADED = re.compile(r"[A-Z]\w*(For|With)[A-Z]\w*")  # a class with a head, such as WhisperForConditionalGeneration
# The classes that a card shows an example of, each with the one that prepares its inputs.
SHOWN: Mapping[str, str] = {
    "AutoModelForCausalLM": "AutoTokenizer",
    "AutoModelForSeq2SeqLM": "AutoTokenizer",
    "AutoModelForMaskedLM": "AutoTokenizer",
    "AutoModelForSequenceClassification": "AutoTokenizer",
    "AutoModelForImageClassification": "AutoImageProcessor",
    "AutoModelForImageTextToText": "AutoProcessor",
    "AutoModelForCTC": "AutoProcessor",
    "WhisperForConditionalGeneration": "AutoProcessor",
    "AutoModelForAudioClassification": "AutoFeatureExtractor",
}
HEARING = ("AutoModelForCTC", "WhisperForConditionalGeneration", "AutoModelForAudioClassification")


@dataclass(frozen=True)
class Usage:
    """model_class: the class of transformers that loads the model. processor: the one that prepares its inputs; None
    where no example is shown, or the files for it are missing. chat: there is a chat template."""

    model_class: str
    processor: str | None
    chat: bool

    @property
    def generates(self) -> bool:
        """Whether it is a causal language model, which vLLM serves and llama.cpp converts."""
        return self.model_class == "AutoModelForCausalLM"

    @property
    def hears(self) -> bool:
        """Whether its inputs are sounds."""
        return self.model_class in HEARING


def usage_in(folder: Path, config: Mapping[str, Any]) -> Usage:
    """Of the model in a folder, whose config is given."""
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return usage(config, files, any(matching(file, TEMPLATES) for file in files) or _template_in_config(folder))


def usage(config: Mapping[str, Any], files: Collection[str], chat: bool = False) -> Usage:
    """files: by their paths in the repo."""
    named = model_class(config)
    processor = SHOWN.get(named)
    tokenizer, prepared = any(matching(file, TOKENIZER) for file in files), any(file in files for file in PROCESSORS)
    there = {
        "AutoTokenizer": tokenizer,
        "AutoImageProcessor": prepared,
        "AutoFeatureExtractor": prepared,
        "AutoProcessor": prepared and tokenizer,
    }
    asked = chat or named != "AutoModelForImageTextToText"  # where the image goes, only its template says
    return Usage(named, processor if processor and there[processor] and asked else None, chat)


def model_class(config: Mapping[str, Any]) -> str:
    """The class of transformers that loads it: an automatic one, or the architecture's own where none is certain."""
    named = architecture(config)
    for ending, automatic in HEADS.items():
        if named.endswith(ending) and "With" not in named:
            sounds = ending == "ForSequenceClassification" and any(key in config for key in SOUND)
            return "AutoModelForAudioClassification" if sounds else automatic
    if Seq2Seq.suits(config):
        return Seq2Seq.auto_class
    if named.endswith("ForConditionalGeneration") and part(config, "vision_config"):
        return "AutoModelForImageTextToText"
    return named if HEADED.fullmatch(named) else "AutoModel"


def _template_in_config(folder: Path) -> bool:
    try:
        return "chat_template" in json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError, TypeError):  # none, or what a stranger took for one
        return False
