"""The form of mergekit's configs, as far as they are read. Source: mergekit 0.1.5, config.py and common.py."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from math import isfinite
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from hf_locstitch.errors import RecipeError
from hf_locstitch.plan.validation import listed

OWN_KEYS = ("base", "finetuned", "localized", "method", "localizer")  # of recipes
ITS_KEYS = ("merge_method", "models", "slices", "modules", "experts")


def is_mergekit(fields: Mapping[str, Any]) -> bool:
    """Whether this is a config of mergekit, not a recipe."""
    return any(key in fields for key in ITS_KEYS) and not any(key in fields for key in OWN_KEYS)


class Branch(NamedTuple):
    """A parameter's value where the tensor's name holds `filter`, or anywhere. values: one, or at least two that are
    spread over the layers, with straight lines between them."""

    filter: str | None
    values: tuple[float, ...]

    @property
    def constant(self) -> bool:
        return self.filter is None and len(self.values) == 1


def read_setting(value: Any) -> tuple[Branch, ...]:
    """A number, a list of numbers over the layers, `{filter, value}`, or a list of these. Raises ValueError."""
    value = [value] if isinstance(value, Mapping) else value
    if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        return tuple(_condition(one) for one in value)
    return (Branch(None, _numbers(value)),)


def _condition(entry: Mapping[str, Any]) -> Branch:
    if unknown := [key for key in entry if key not in ("filter", "value")]:
        raise ValueError(f"a condition has `filter` and `value`, not {unknown[0]!r}")
    wanted = entry.get("filter")
    if wanted is not None and not isinstance(wanted, str):
        raise ValueError(f"a filter is a part of tensors' names, not {wanted!r}")
    return Branch(None if wanted == "*" else wanted, _numbers(entry.get("value")))


def _numbers(value: Any) -> tuple[float, ...]:
    try:
        numbers = tuple(float(one) for one in (value if isinstance(value, list) else [value]))
    except (TypeError, ValueError, OverflowError):
        raise ValueError("it is no number, nor a list of numbers") from None
    if not numbers or not all(map(isfinite, numbers)):
        raise ValueError("a list without numbers" if not numbers else "NaN and infinity are no values of a parameter")
    return numbers


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelRef(Strict):
    """path: as a ref of this program, with its revision. adapter: likewise, laid over it."""

    path: str = Field(min_length=1)
    adapter: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """`path@revision+adapter`, or `{model: …, lora: …}`, each part also `{path: …, revision: …}`."""
        if isinstance(value, str):
            path, _, adapter = value.partition("+")
            return {"path": path, "adapter": adapter or None}
        if isinstance(value, Mapping) and "model" in value:
            rest = {key: part for key, part in value.items() if key not in ("model", "lora") and part is not None}
            lora = value.get("lora")
            return {"path": _path(value["model"]), "adapter": None if lora is None else _path(lora), **rest}
        return value

    def __str__(self) -> str:
        return self.path if self.adapter is None else f"{self.path}+{self.adapter}"


def _path(value: Any) -> Any:
    if isinstance(value, Mapping) and set(value) <= {"path", "revision"} and value.get("path"):
        return f"{value['path']}@{value['revision']}" if value.get("revision") else str(value["path"])
    return value


Setting = Annotated[tuple[Branch, ...], PlainValidator(read_setting)]
Parameters = dict[str, Setting] | None


class Source(Strict):
    """A model that is merged."""

    model: ModelRef
    parameters: Parameters = None


class LayersOf(Source):
    """Some layers of it."""

    layer_range: tuple[int, int]


class Slice(Strict):
    sources: tuple[LayersOf, ...] = Field(min_length=1)
    base_model: ModelRef | None = None
    parameters: Parameters = None
    residual_weight: float | None = None


class Tokenizer(Strict):
    source: ModelRef = ModelRef(path="union")
    tokens: dict[str, Any] | None = None
    pad_to_multiple_of: int | None = None


class MergekitConfig(Strict):
    merge_method: str
    models: tuple[Source, ...] | None = Field(default=None, min_length=1)
    slices: tuple[Slice, ...] | None = Field(default=None, min_length=1)
    modules: dict[str, Any] | None = None
    base_model: ModelRef | None = None
    parameters: Parameters = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: ModelRef | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None


def read_config(fields: Mapping[str, Any], where: str) -> MergekitConfig:
    """Raises RecipeError with every fault of its form."""
    if "experts" in fields:
        raise RecipeError(
            f"{where} is a config of mergekit-moe (`experts`), which puts several models side by side behind a router: "
            "nothing here does that. Use mergekit-moe."
        )
    try:
        return MergekitConfig.model_validate(dict(fields))
    except ValidationError as error:
        errors = error.errors(include_url=False)
        faults = [_fault(fault) for fault in errors if fault["type"] != "too_short" or not fault["input"]]
        raise RecipeError(f"{where} is not a config of mergekit's that is understood: {listed(faults)}.") from error


def _fault(fault: Any) -> str:
    loc = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = list(MergekitConfig.model_fields) if "." not in loc else []
        near = get_close_matches(loc, known, n=1, cutoff=0.6)
        return f"unknown key {loc!r} ({f'did you mean {near[0]!r}?' if near else 'mergekit has none of that name'})"
    if fault["type"] == "missing":
        return f"{loc!r} is missing"
    return f"{loc}: {fault['msg'].removeprefix('Value error, ')} (got {fault['input']!r})"
