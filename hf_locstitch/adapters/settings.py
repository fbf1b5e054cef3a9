"""The settings of an adapter, written by strangers: checked, and as PEFT's own config."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from hf_locstitch.checkpoints.adapter import ADAPTER_CONFIG, AdapterCheckpoint
from hf_locstitch.errors import CheckpointError
from hf_locstitch.runtime.human import some

LARGEST = 1 << 24  # of any whole number in the config: ranks, counts and sizes, but not seeds
LONGEST = 4000  # characters of a text: some are regular expressions
EXPRESSIONS = ("modules", "pattern", "parameters")  # how the names of settings end that hold regular expressions
REPEATS = re.compile(r"(?<!\\)(?:[*+]|\{\d*,\d*\})")
REPEATED_GROUP = re.compile(r"(?<!\\)\)(?:[*+]|\{\d*,\d*\})")
MOST_REPEATS = 5  # in one of them: with more, or with repeats inside repeats, matching a name could take for ever
SEEDS = ("seed", "key")  # how the names of those end
# Settings that import modules, open other files, or repeat layers that the base has once.
REFUSED = ("megatron_config", "layer_replication", "arrow_config")

# The class of transformers for each task of PEFT, where the architecture of the base does not decide.
TASK_CLASSES: Mapping[str, str] = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "CAUSAL_LM": "AutoModelForCausalLM",
}
OF_ANOTHER_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


def peft_config(adapter: AdapterCheckpoint) -> Any:
    """A peft.PeftConfig. Raises CheckpointError if the adapter is of a kind that cannot be merged, or malformed."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig

    where = f"{adapter.label}/{ADAPTER_CONFIG}"
    if adapter.kind not in list(PEFT_TYPE_TO_CONFIG_MAPPING):
        raise CheckpointError(
            f"{where} has the peft_type {adapter.kind!r}, which the installed PEFT does not know. Upgrade it: "
            "pip install --upgrade peft."
        )
    if faults := [*_faults(adapter.settings)]:
        raise CheckpointError(f"{where} is not one of an adapter that can be merged: {'; '.join(faults)}.")
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[adapter.kind]  # pyright: ignore[reportArgumentType]
    if not hasattr(tuner, "merge_and_unload"):
        raise not_mergeable(adapter, "it adds to the model's inputs or activations and changes no weight")
    if adapter.kind == "XLORA":
        raise not_mergeable(adapter, "it mixes other adapters, in another way for each input")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = PeftConfig.from_peft_type(**adapter.settings)
    except Exception as error:  # whatever PEFT's dataclasses make of a stranger's values
        raise CheckpointError(f"PEFT cannot read {where} ({short(error)}). Save the adapter again.") from error
    config.inference_mode = True
    return config


def not_mergeable(adapter: AdapterCheckpoint, reason: str) -> CheckpointError:
    """The error for a kind of adapter that has no task vector."""
    return CheckpointError(
        f"{adapter.label} is a {adapter.kind} adapter, which cannot be merged into weights: {reason}. Use a full "
        "finetune, or an adapter of another kind such as LoRA."
    )


def model_classes(adapter: AdapterCheckpoint, base: Mapping[str, Any]) -> list[str]:
    """Classes of transformers that the adapter may have been trained on, the likeliest first. base: its config."""
    import transformers

    settings = adapter.settings
    task, mapping = settings.get("task_type"), settings.get("auto_mapping")
    trained_on = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    architectures = base.get("architectures")
    own = [*architectures[:1]] if isinstance(architectures, list) else []
    of_task = [TASK_CLASSES[task]] if isinstance(task, str) and task in TASK_CLASSES else []
    ordered = [*of_task, *own] if task in OF_ANOTHER_HEAD else [*own, *of_task]
    names = [name for name in (trained_on, *ordered, "AutoModel") if isinstance(name, str)]
    return [name for name in dict.fromkeys(names) if _builds_models(getattr(transformers, name, None))]


def _builds_models(found: Any) -> bool:
    return hasattr(found, "from_config") or hasattr(found, "_from_config")


def short(error: BaseException) -> str:
    """A library's error in one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def _faults(settings: Mapping[str, Any]) -> Iterator[str]:
    if refused := [name for name in REFUSED if settings.get(name)]:
        yield f"it sets {some(refused)}"
    for path, value in _leaves(settings):
        seed = path.rpartition(".")[2].endswith(SEEDS)
        if isinstance(value, int | float) and not isinstance(value, bool) and not seed and not abs(value) <= LARGEST:
            yield f"{path} is {value}, beyond {LARGEST:,}"
        if isinstance(value, str) and path.partition(".")[0].endswith(EXPRESSIONS) and _takes_long(value):
            yield f"{path} is an expression that could take for ever to match ({value[:60]!r})"
        if isinstance(value, str) and len(value) > LONGEST:
            yield f"{path} is a text of {len(value):,} characters, more than {LONGEST:,}"


def _takes_long(expression: str) -> bool:
    return bool(REPEATED_GROUP.search(expression)) or len(REPEATS.findall(expression)) > MOST_REPEATS


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The plain values in nested settings, and the keys of mappings, which are regular expressions in some."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield (path or "a key"), str(key)
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, path)
    else:
        yield path, value
