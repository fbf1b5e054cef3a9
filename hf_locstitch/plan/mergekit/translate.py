"""From a config of mergekit's to the fields of a recipe for the same merge, and what differs all the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any, NamedTuple

from hf_locstitch.errors import RecipeError
from hf_locstitch.plan.mergekit.config import MergekitConfig, ModelRef, read_config
from hf_locstitch.plan.mergekit.inputs import Findings, Inputs, read_inputs
from hf_locstitch.plan.mergekit.layers import Layout, read_layout
from hf_locstitch.plan.mergekit.methods import REFUSED, TRANSLATED, MergekitMethod
from hf_locstitch.plan.mergekit.parameters import Settings, vary
from hf_locstitch.plan.validation import listed

DTYPES = ("float32", "bfloat16", "float16")


class Translation(NamedTuple):
    """fields: of a recipe. notes: how the result differs from mergekit's, as clauses."""

    fields: dict[str, Any]
    notes: tuple[str, ...]


def translate(fields: Mapping[str, Any], where: str, layout_of: Callable[[str], Layout] = read_layout) -> Translation:
    """layout_of: the tensors of a model, by its ref; used for what differs between layers or tensors only.

    Raises RecipeError with everything that has no counterpart, and CheckpointError.
    """
    config = read_config(fields, where)
    method, found = _method(config.merge_method, where), Findings()
    inputs = read_inputs(config, method, found)
    recipe: dict[str, Any] = {}
    if inputs is not None:
        if method.varied is not None and vary(config, inputs, method):
            method = method.varied
        reader = Settings(config, method, inputs, cache(lambda: layout_of(inputs.base)), found)
        reader.check_layers()
        settings = {"method.name": method.name, **method.also, **reader.read()}
        recipe = {"base": inputs.base, "finetuned": inputs.entries, **_nested(settings)}
        recipe |= _of_output(config, inputs, found)
    if found.problems:
        raise RecipeError(f"{where} is a config of mergekit's that cannot be translated: {listed(found.problems)}.")
    return Translation(recipe, (*dict.fromkeys(found.notes), *method.notes))


def _method(name: str, where: str) -> MergekitMethod:
    if name in TRANSLATED:
        return TRANSLATED[name]
    near = get_close_matches(name, TRANSLATED, n=1, cutoff=0.7)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(TRANSLATED)}"
    reason = REFUSED.get(name, f"it is none that is known here ({hint})")
    raise RecipeError(f"{where} is a config of mergekit's with merge_method {name}, which is not translated: {reason}.")


def _nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """`{"method.name": x}` as `{"method": {"name": x}}`."""
    fields: dict[str, Any] = {}
    for path, value in dotted.items():
        outer, _, inner = path.partition(".")
        if inner:
            fields.setdefault(outer, {})[inner] = value
        else:
            fields[outer] = value
    return fields


def _of_output(config: MergekitConfig, inputs: Inputs, found: Findings) -> dict[str, Any]:
    """dtype, tokenizer and chat template."""
    fields: dict[str, Any] = {"tokenizer": _tokenizer(config, inputs, found)}
    if dtype := config.out_dtype or config.dtype:
        fields["dtype"] = dtype.removeprefix("torch.")
        if fields["dtype"] not in DTYPES:
            found.problems.append(f"the dtype {dtype} is no dtype of an output here ({', '.join(DTYPES)})")
    if config.chat_template == "auto":
        found.notes.append(
            "chat_template: auto takes the template that most of the models have; here it is the tokenizer's, or that "
            "of --chat-template NAME"
        )
    elif config.chat_template is not None:
        found.problems.append(
            "chat_template names a template of mergekit's, or is the text of one; write it to a file, drop the key, "
            "and give --chat-template FILE"
        )
    return fields


def _tokenizer(config: MergekitConfig, inputs: Inputs, found: Findings) -> str:
    """Without a setting mergekit copies the base's."""
    if config.tokenizer is not None and config.tokenizer_source is not None:
        found.problems.append("tokenizer and tokenizer_source are both given; drop one")
    own = config.tokenizer
    if own is not None and (own.tokens or own.pad_to_multiple_of):
        found.problems.append(
            f"tokenizer.{'tokens' if own.tokens else 'pad_to_multiple_of'} has no counterpart: here rows of tokens "
            "come from the finetunes that have them, and padding stays the base's; drop it"
        )
    source = own.source if own is not None else config.tokenizer_source or ModelRef(path="base")
    if source.path == "union":
        found.notes.append(
            "a token that several finetunes added has the mean of their rows; in mergekit these take part in the method"
        )
    if source.path in ("base", "union") or source.path == inputs.base:
        return "base" if source.path == inputs.base else source.path
    for one, name in zip(inputs.sources, inputs.names, strict=True):
        if one.model == source:
            return name
    found.problems.append(f"the tokenizer is that of {source}, which is not one of the models; use one of theirs")
    return "base"
