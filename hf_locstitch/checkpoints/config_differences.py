"""Where config, tokenizer and chat template of a finetune are not the base's: warnings, as the output has one's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hf_locstitch.checkpoints.checkpoint import Checkpoint, read_json
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.errors import CheckpointError

# Of training, saving and labels, or told by the tensors' shapes: they do not change what the merged weights mean.
IGNORED = re.compile(
    r"(^|\.)(_.*|architectures|auto_map|.*version|torch_dtype|dtype|use_cache|gradient_checkpointing|.*dropout.*|.*pdrop|"
    r"drop_path_rate|initializer.*|init_std|.*_init|output_.*|return_dict|id2label|label2id|num_labels|problem_type|"
    r"finetuning_task|task_specific_params|vocab_size|router_aux_loss_coef|.*loss.*|keys_to_ignore.*|pretraining_tp|"
    r"attn_implementation|max_window_layers|name_or_path)(\.|$)"
)
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
Value = str | int | float | bool | None


def config_differences(base: Checkpoint, name: str, finetuned: Checkpoint, kept: str) -> list[str]:
    """One line for each setting that both configs have and that differs. kept: whose config the output gets."""
    ours, theirs = _flat(base.config), _flat(finetuned.config)
    return [
        f"{name}'s config has {key} {_shown(theirs[key])}, the base's {_shown(value)}: {kept}'s is kept."
        for key, value in ours.items()
        if key in theirs and theirs[key] != value and not IGNORED.search(key)
    ]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Value]:
    """Nested settings by dotted keys; of rope, wherever transformers has kept it, by `rope.` alone."""
    flat: dict[str, Value] = {}
    for key, value in config.items():
        if key in ("rope_parameters", "rope_scaling") and isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}rope.")
        elif isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            own = {"rope_theta": "rope.rope_theta", "rope.type": "rope.rope_type"}.get(f"{prefix}{key}", prefix + key)
            flat[own] = value if isinstance(value, str | int | float | bool | None) else json.dumps(value)
    return flat


def _shown(value: Value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


@dataclass(frozen=True)
class TextFiles:
    """What a model's small files say of texts. eos: ids that end an answer. tokens: of the tokenizer; None: unknown."""

    eos: tuple[int, ...] | None
    template: str | None
    tokens: int | None


@dataclass(frozen=True)
class KeptTexts:
    """Whose files of texts the output has. tokens: whose tokenizer; None: those of several."""

    generation: str
    template: str
    tokens: str | None


def text_differences(base: Source, name: str, finetuned: Source, kept: KeptTexts) -> list[str]:
    """Likewise of generation_config.json, chat template and tokenizer; only files that differ are read."""
    return list(_text_differences(read_text_files(base, finetuned), name, read_text_files(finetuned, base), kept))


def _text_differences(base: TextFiles, name: str, other: TextFiles, kept: KeptTexts) -> Iterator[str]:
    end = f"{kept.generation}'s is kept."
    if other.eos is not None and base.eos is not None and other.eos != base.eos:
        yield f"{name} ends its answers with the tokens {list(other.eos)}, the base with {list(base.eos)}: {end}"
    end = f"{kept.template}'s is kept."
    if other.template != base.template:
        said = (
            "another chat template than the base"
            if base.template and other.template
            else "a chat template, the base none"
        )
        yield f"{name} has {said}: {end}" if other.template else f"the base has a chat template, {name} none: {end}"
    if other.tokens is not None and base.tokens is not None and other.tokens != base.tokens and kept.tokens:
        yield f"{name}'s tokenizer has {other.tokens:,} tokens, the base's {base.tokens:,}: {kept.tokens}'s is kept."


def read_text_files(source: Source, other: Source) -> TextFiles:
    """other: the model to compare with; files that both promise to be alike are not read."""
    generation = _read(source, other, "generation_config.json")
    eos = generation.get("eos_token_id")
    tokenizer = _read(source, other, "tokenizer.json")
    return TextFiles(
        None if eos is None else tuple(sorted(eos if isinstance(eos, list) else [eos])),
        _template(source, other),
        _count(tokenizer) if tokenizer else None,
    )


def _template(source: Source, other: Source) -> str | None:
    for file in TEMPLATE_FILES:
        if file in source.files:
            if _alike(source, other, file):
                return source.files[file].promised
            return source.fetch(file).read_text(encoding="utf-8", errors="replace")
    template = _read(source, other, "tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str | None) else json.dumps(template)


def _read(source: Source, other: Source, file: str) -> dict[str, Any]:
    """A JSON file; empty if it is absent, unreadable, or the same in both."""
    if file not in source.files or _alike(source, other, file):
        return {}
    try:
        return read_json(source, file)
    except CheckpointError:
        return {}  # only compared here; copied as it is


def _alike(source: Source, other: Source, file: str) -> bool:
    """Whether both promise the same content; False if either promises none."""
    promised = source.files[file].promised
    return promised is not None and file in other.files and other.files[file].promised == promised


def _count(tokenizer: Mapping[str, Any]) -> int | None:
    """Tokens of a tokenizer.json, those that were added to it included."""
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    if not isinstance(vocabulary, dict | list):
        return None
    pieces = vocabulary if isinstance(vocabulary, dict) else [entry[0] for entry in vocabulary if entry]
    added = [token.get("content") for token in tokenizer.get("added_tokens") or () if isinstance(token, dict)]
    return len({*pieces, *added})
