"""Where config, tokenizer and chat template of a finetune are not the base's: warnings, as the output has one's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_locstitch.checkpoints.checkpoint import Checkpoint, read_json
from hf_locstitch.checkpoints.plain_config import Value, plain_settings
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.checkpoints.vocabulary import read_vocabulary, same_vocabulary
from hf_locstitch.errors import CheckpointError

# Of training, saving and labels, or told by the tensors' shapes: they do not change what the merged weights mean.
IGNORED = re.compile(
    r"(^|\.)(_.*|architectures|auto_map|.*version|torch_dtype|dtype|use_cache|gradient_checkpointing|.*dropout.*|.*pdrop|"
    r"drop_path_rate|initializer.*|init_std|.*_init|output_.*|return_dict|id2label|label2id|num_labels|problem_type|"
    r"finetuning_task|task_specific_params|vocab_size|router_aux_loss_coef|.*loss.*|keys_to_ignore.*|pretraining_tp|"
    r"attn_implementation|max_window_layers|name_or_path|unsloth_.*|tokenizer_class|processor_class|torchscript|use_bfloat16)(\.|$)"
)
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
END = "eos_token_id"
TOKENS = {"bos_token_id": "begins", END: "ends", "pad_token_id": "pads"}
NAMED = 3  # tokens that a sentence shows


@dataclass(frozen=True)
class KeptTexts:
    """Whose config and files of texts the output has; what is a finetune's own is nothing to warn it of.

    special: whose tokens begin, end and pad texts; ends: whose end them, too. template: None if the user has said
    which. tokens: whose tokenizer; None: those of several.
    """

    config: str
    special: str
    template: str | None
    tokens: str | None
    ends: str | None = None

    def has_token(self, token: str, name: str) -> bool:
        """Whether a finetune's own token begins, ends or pads the output's texts."""
        return name == self.special or (token == END and name == self.ends)


def config_differences(base: Checkpoint, name: str, finetuned: Checkpoint, kept: KeptTexts) -> list[str]:
    """One line for each setting that both configs have and that differs."""
    ours, theirs = plain_settings(base.config), plain_settings(finetuned.config)
    unlike = [key for key, value in ours.items() if key in theirs and theirs[key] != value and not IGNORED.search(key)]
    return [
        f"{name}'s config has {key} {_shown(theirs[key])}, the base's {_shown(ours[key])}: {_meaning(key, name, kept)}."
        for key in unlike
        if (token := _token(key)) is None or not kept.has_token(token, name)
    ]


def _token(key: str) -> str | None:
    """Which special token a setting says, if it does."""
    return next((token for token in TOKENS if key.endswith(token)), None)


def _meaning(key: str, name: str, kept: KeptTexts) -> str:
    """What it means for the merge that a setting is one model's."""
    if (token := _token(key)) is not None:
        return f"{kept.special}'s is kept, so the merge {TOKENS[token]} texts with it"
    return f"{kept.config}'s is kept, with which {'the base' if kept.config == name else name} was not trained"


def _shown(value: Value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


@dataclass(frozen=True)
class TextFiles:
    """What a model's small files say of texts. special: ids of the tokens that begin, end and pad texts, as far as they
    are stated."""

    special: Mapping[str, tuple[int, ...]]
    template: str | None


def text_differences(base: Source, name: str, finetuned: Source, kept: KeptTexts) -> list[str]:
    """Likewise of generation_config.json and chat template; only files that differ are read."""
    return list(_text_differences(read_text_files(base, finetuned), name, read_text_files(finetuned, base), kept))


def _text_differences(base: TextFiles, name: str, other: TextFiles, kept: KeptTexts) -> Iterator[str]:
    end = f"{kept.special}'s is kept."
    for token, does in TOKENS.items():
        ours, theirs = base.special.get(token), other.special.get(token)
        if ours is not None and theirs is not None and ours != theirs and not kept.has_token(token, name):
            s = "s" if len(theirs) > 1 else ""
            yield f"{name} {does} its texts with the token{s} {_ids(theirs)}, the base with {_ids(ours)}: {end}"
    end = f"{kept.template}'s is kept."
    if kept.template not in (None, name) and other.template != base.template:
        said = (
            "another chat template than the base"
            if base.template and other.template
            else "a chat template, the base none"
        )
        yield f"{name} has {said}: {end}" if other.template else f"the base has a chat template, {name} none: {end}"


def token_differences(base: Source, name: str, finetuned: Source, kept: KeptTexts) -> list[str]:
    """Likewise of the tokenizer."""
    ours, theirs = _tokens(base, finetuned), _tokens(finetuned, base)
    if kept.tokens in (None, name) or ours is None or theirs is None or ours == theirs:
        return []
    return [f"{_vocabularies(ours, name, theirs)}: {kept.tokens}'s is kept."]


def _ids(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids))


def _vocabularies(base: Mapping[str, int], name: str, other: Mapping[str, int]) -> str:
    """How two tokenizers differ."""
    if base.keys() == other.keys():
        moved = [token for token in other if other[token] != base[token]]
        return f"{name}'s tokenizer gives {len(moved):,} of its {len(other):,} tokens other ids than the base's"
    more, fewer = ([token for token in one if token not in two] for one, two in ((other, base), (base, other)))
    said = [
        f"{len(tokens):,} {adverb} ({', '.join(map(repr, tokens[:NAMED]))}{', …' if len(tokens) > NAMED else ''})"
        for tokens, adverb in ((more, "more"), (fewer, "fewer"))
        if tokens
    ]
    return f"{name}'s tokenizer has {len(other):,} tokens, the base's {len(base):,}; {' and '.join(said)}"


def read_text_files(source: Source, other: Source) -> TextFiles:
    """other: the model to compare with; files that both promise to be alike are not read."""
    generation = _read(source, other, "generation_config.json")
    special = {token: _listed(generation[token]) for token in TOKENS if generation.get(token) is not None}
    return TextFiles(special, _template(source, other))


def _listed(ids: Any) -> tuple[int, ...]:
    return tuple(sorted(one for one in (ids if isinstance(ids, list) else [ids]) if isinstance(one, int)))


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


def _tokens(source: Source, other: Source) -> Mapping[str, int] | None:
    """Token -> id; None if they are not known, or the same in both."""
    if same_vocabulary(source, other):
        return None
    try:
        known = read_vocabulary(source)
    except CheckpointError:
        return None  # only compared here
    return None if known is None else known.ids
