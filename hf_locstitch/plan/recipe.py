"""Recipes: the fields of a YAML recipe, of the command line's flags and of `merge_from_hub`."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from hf_locstitch.checkpoints.names import LONGEST_NAME, SafeName
from hf_locstitch.checkpoints.ref import expand_home
from hf_locstitch.localize.localizer import Localizer
from hf_locstitch.localize.localizers import LOCALIZERS
from hf_locstitch.plan.compare_options import CompareOptions
from hf_locstitch.plan.push_target import PushTarget, parse_target
from hf_locstitch.plan.validation import validated
from hf_locstitch.runtime.registry import Registry
from hf_locstitch.stitch.fitting import OnInputs, Stitcher
from hf_locstitch.stitch.method import MaskedMethod, Method, TensorMethod
from hf_locstitch.stitch.methods import METHODS
from hf_locstitch.stitch.per_tensor import PerTensor
from hf_locstitch.stitch.stitchers import MEAN, STITCHERS
from hf_locstitch.tasks.benchmarks import EvaluateOptions
from hf_locstitch.tasks.evaluation_sets import EvaluationSet
from hf_locstitch.tasks.leaks import UsedData, used_set
from hf_locstitch.tasks.sets import LocalizationSet

if TYPE_CHECKING:
    AnyLocalizer: TypeAlias = Localizer
    AnyMethod: TypeAlias = Method
    AnyStitcher: TypeAlias = Stitcher
else:  # one of the registered components, by name
    AnyLocalizer, AnyMethod, AnyStitcher = LOCALIZERS.union("method"), METHODS.union("name"), STITCHERS.union("method")

LOG = logging.getLogger("hf_locstitch")
# Fields already settled in localized checkpoints, or that need whole models.
SETTLED = ("localizer", "data", "stitch", "include", "exclude", "rest_from", "files_from", "tokenizer", "embeddings",
           "chat_template", "evaluate")  # fmt: skip
OF_TOKENS = ("tokenizer", "embeddings", "chat_template")  # those of them that models with the masks of a merge settle


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Input(Strict):
    """A checkpoint. ref: a folder or org/name[/subfolder][@revision]. sha256: expected of its weights, if given."""

    ref: str = Field(min_length=1)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"ref": str(value)} if isinstance(value, str | Path) else value


class Finetuned(Input):
    """name: what masks, tables and the card call it; the last part of ref by default."""

    name: SafeName | None = None


class Localized(Finetuned):
    """A localized checkpoint; or with `mask`, a finetuned model whose mask a merge holds.

    mask: the merge. Its name: that of the mask there; the entry's own by default. Its sha256: of the mask's file.
    """

    mask: Finetuned | None = None


class Recipe(Strict):
    """One merge. Every field but `base` and one of `finetuned` and `localized` has a default."""

    base: Input
    localized: tuple[Localized, ...] = Field(default=(), max_length=64)
    """Localized checkpoints, which hold masks and values already, in place of `finetuned`; or finetuned models with the
    masks that a merge holds of them (`mask: org/merged`)."""
    finetuned: tuple[Finetuned, ...] = Field(default=(), max_length=64)
    method: AnyMethod = Field(default_factory=lambda: METHODS.find("locstitch")())
    """By name, or its fields: `{name: regmean, alpha: 0.5}`."""
    localizer: AnyLocalizer | None = None
    """How masks are found, by name or its fields; the method's default if it has masks, nothing if it has none."""
    data: dict[str, LocalizationSet] | tuple[LocalizationSet, ...] = ()
    """A localization set for each finetune, by name or in order, for the localizers that look at data, and for a refit
    or RegMean that is given no other."""
    stitch: AnyStitcher | None = None
    """How the values under the masks are found: `mean` (None) of the finetuned ones, or a `refit` of them."""
    scale: float = Field(default=1.0, allow_inf_nan=False)
    weights: dict[str, PerTensor] | tuple[PerTensor, ...] = ()
    """Factor on each finetune's task vector, by name or in order: a number, or numbers by globs of tensors
    (`{"*.mlp.*": 0.8, "*": 0.5}`, the first that matches); 1 where none is given."""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rest_from: str | None = None
    """Name of the finetune that gives the tensors that are not localized; the base by default."""
    files_from: str | None = None
    """Name of the finetune that gives config, tokenizer and the like; as `rest_from` by default."""
    tokenizer: str | None = None
    """Which tokens the output has: `base`, those of a finetune by its name, or `union` (None): the base's and after
    them those that finetunes added."""
    embeddings: str | None = None
    """What the rows of the base's tokens are in embeddings and heads: `base`, a finetune's by its name, the finetunes'
    `mean`, or `localize`: merged as other tensors. None: as `include` and the method have it."""
    chat_template: str | None = None
    """Whose chat template the output gets: `base`, a finetune's name, or a file. None: that of the tokenizer, or that
    of the only finetune whose tokens are added if the base has none."""
    also_copy: tuple[str, ...] = ()
    """Globs of more files to copy, beside those that a model is known to need."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the output's floating-point tensors. `auto`: the base's dtype of each tensor, also where `rest_from` gives its
    values; a tensor that the base lacks keeps its own."""
    shard_size: ByteSize | None = Field(default=None, gt=0)
    """Largest output file in bytes ("5GB"); the base's own division by default."""
    allow_non_finite: bool = False
    figures: bool = True
    """Whether a merge with masks draws them."""
    strict: bool = False
    """Whether warnings are errors: those of the plan before the work begins, others before anything is published."""
    evaluate: EvaluateOptions | None = None
    """What the finished merge is evaluated on; nothing by default."""
    compare: CompareOptions | None = None
    """What `compare` tries; no matter for one merge."""
    out: Path | None = None
    adapter: Path | None = None
    """A folder for the merge as a PEFT adapter over its base, beside `out` or `push_to`."""
    push_to: str | None = None
    """org/name, or org/name@branch; the branch is made where there is none."""
    private: bool = False
    create_pr: bool = False
    """Whether the result is proposed to `push_to` as a pull request."""

    @property
    def target(self) -> PushTarget | None:
        """What `push_to` and `create_pr` ask for."""
        return None if self.push_to is None else parse_target(self.push_to, self.create_pr)

    @property
    def fitting(self) -> OnInputs | None:
        """How values are fitted to inputs, if they are."""
        return self.stitch or (self.method if isinstance(self.method, OnInputs) else None)

    @property
    def fit_sets(self) -> Mapping[str, LocalizationSet] | Sequence[LocalizationSet]:
        """The inputs that values are fitted to."""
        return self.fitting.data if self.fitting else ()

    @property
    def used_data(self) -> list[UsedData]:
        """What masks are found with and values fitted to: no test of the merge."""
        localized = self.data if self.localizer is not None and self.localizer.needs_data else ()
        return [
            *(used_set(asked, "masks were found") for asked in _each(localized)),
            *(used_set(asked, "values were fitted") for asked in _each(self.fit_sets)),
        ]

    @property
    def entries(self) -> tuple[Finetuned, ...]:
        """What is merged into the base."""
        return self.finetuned or self.localized

    @field_validator("finetuned", "localized", mode="before")
    @classmethod
    def _one_alone(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | Path) else value

    @field_validator("finetuned")
    @classmethod
    def _something_to_merge(cls, value: tuple[Finetuned, ...], info: ValidationInfo) -> tuple[Finetuned, ...]:
        localized = info.data.get("localized")
        if localized == () and not value:
            raise PydanticCustomError("missing", "Field required")
        if localized and value:
            raise ValueError(
                "finetuned models and localized checkpoints cannot be merged together; localize all of them"
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def _read_old_spellings(cls, value: Any) -> Any:
        """regmean's settings used to be under `stitch`."""
        stitch = value.get("stitch") if isinstance(value, dict) else None
        own = {"method": stitch} if isinstance(stitch, str) else stitch
        if not isinstance(own, dict) or own.get("method") != "regmean":
            return value
        LOG.warning("stitch: {method: regmean, …} is the old spelling of method: {name: regmean, …}; use the new one.")
        method = value.get("method", "regmean")
        if method not in ("regmean", {"name": "regmean"}):
            raise ValueError(f"stitch: regmean needs method regmean, not {method}")
        settings = {key: setting for key, setting in own.items() if key != "method"}
        return {**value, "method": {"name": "regmean", **settings}, "stitch": None}

    @field_validator("method", mode="before")
    @classmethod
    def _method_by_name(cls, value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        if isinstance(value, dict) and value.get("name") not in METHODS.names():
            name = str(value.get("name"))
            raise ValueError(f"unknown method {name!r} ({METHODS.hint(name)})")
        return value

    @field_serializer("method")
    def _dump_method(self, value: Method) -> Any:
        return value.dump()

    @field_validator("localizer", mode="before")
    @classmethod
    def _default_localizer(cls, value: Any) -> Any:
        value = {"method": value} if isinstance(value, str) else value
        value = {"method": "magnitude", **value} if isinstance(value, dict) else value
        if isinstance(value, dict) and value["method"] not in LOCALIZERS.names():
            raise ValueError(f"unknown localizer {value['method']!r} ({LOCALIZERS.hint(str(value['method']))})")
        return value

    @field_validator("stitch", mode="before")
    @classmethod
    def _stitch_by_name(cls, value: Any) -> Any:
        value = {"method": value} if isinstance(value, str) else value
        if not isinstance(value, dict):
            return value
        value = {"method": "refit", **value}
        if value["method"] == MEAN and len(value) == 1:
            return None
        if value["method"] not in STITCHERS.names():
            name = str(value["method"])
            raise ValueError(f"unknown stitch {name!r} (choose from {', '.join([MEAN, *STITCHERS.names()])})")
        return value

    @model_validator(mode="after")
    def _data_suits_fitting(self) -> Recipe:
        fitting = self.fitting
        if fitting is None or self.localized:
            return self
        if self.stitch is not None and self.method.name != "locstitch":
            raise ValueError(f"stitch: {self.stitch.method} needs method locstitch, not {self.method.name}")
        given = fitting.data or self.data
        without = fitting.data_optional and not given
        if without and (idle := sorted(fitting.model_fields_set - {"method", "device", "data"})):
            raise ValueError(f"{fitting.called} without data has no {idle[0]}: give --data, or drop the setting")
        if (count := len(given)) != len(self.finetuned) and not without:
            raise ValueError(
                f"{fitting.called} needs one --data entry of {'' if fitting.labelled else 'un'}labelled inputs per "
                "finetune: expected "
                f"{len(self.finetuned)}, got {count}"
            )
        if self.allow_non_finite:
            raise ValueError(
                f"allow_non_finite cannot be combined with {fitting.called}: no values can be fitted to NaN or infinity"
            )
        return self

    @model_validator(mode="after")
    def _data_suits_localizer(self) -> Recipe:
        localizer = self.localizer if self.localizer is not None and self.localizer.needs_data else None
        own = self.fitting is not None and self.fitting.data
        if self.data and localizer is None and (self.fitting is None or own):
            raise ValueError(
                "data is given, but only these use any: the localizers mask and saliency, stitch: refit, and the "
                f"methods {', '.join(name for name in METHODS.names() if METHODS.find(name).needs_data)}"
            )
        if localizer is not None and len(self.data) != len(self.finetuned):
            raise ValueError(
                f"{localizer.method} needs one --data entry per finetune: expected {len(self.finetuned)}, "
                f"got {len(self.data)}"
            )
        if localizer is not None and self.allow_non_finite:
            raise ValueError(
                "allow_non_finite cannot be combined with a localizer that uses data: its loss would not be finite"
            )
        return self

    @model_validator(mode="after")
    def _fitting_takes_the_data(self) -> Recipe:
        """A refit or RegMean that is given no inputs of its own is fitted to the recipe's."""
        if self.fitting is not None and not self.fitting.data and self.data:
            field = "stitch" if self.stitch is not None else "method"
            object.__setattr__(self, field, self.fitting.model_copy(update={"data": self.data}))
        return self

    @model_validator(mode="after")
    def _localized_settle_the_rest(self) -> Recipe:
        if self.localized and self.method.name != "locstitch":
            raise ValueError(f"localized checkpoints are merged by method locstitch, not {self.method.name}")
        whole = [entry for entry in self.localized if entry.mask is not None]
        given = [field for field in SETTLED if getattr(self, field) and not (whole and field in OF_TOKENS)]
        if self.localized and given:
            raise ValueError(f"{', '.join(given)} cannot be set for localized checkpoints: this needs whole models")
        if self.localized and self.embeddings == "localize":
            raise ValueError("embeddings: localize cannot be set for localized checkpoints: their masks settle it")
        if self.embeddings == "mean" and 0 < len(whole) < len(self.localized):
            raise ValueError("embeddings: mean needs whole models, but a localized checkpoint has no rows of its own")
        return self

    @model_validator(mode="after")
    def _one_choice_of_tokens(self) -> Recipe:
        taken = [field for field in ("rest_from", "files_from") if getattr(self, field)]
        given = [field for field in ("tokenizer", "embeddings") if getattr(self, field)]
        if taken and given:
            raise ValueError(
                f"{given[0]} cannot be combined with {taken[0]}, which gives tokenizer and embeddings, too: use one of "
                "the two"
            )
        return self

    @model_validator(mode="after")
    def _finetunes_suit_method(self) -> Recipe:
        count, method = len(self.entries), self.method
        if misfit := method.misfit(count):
            raise ValueError(misfit)
        if self.allow_non_finite and isinstance(method, TensorMethod) and method.linear_algebra:
            raise ValueError(f"allow_non_finite cannot be combined with {method.name}: it decomposes matrices")
        if self.weights and not method.weighted:
            raise ValueError(
                f"{method.name} takes no weights: its finetunes count alike. Leave them out, or choose a method "
                "that takes them, such as task-arithmetic"
            )
        if isinstance(self.weights, tuple) and self.weights and len(self.weights) != count:
            raise ValueError(f"weights needs one for each finetune: expected {count}, got {len(self.weights)}")
        return self

    @model_validator(mode="after")
    def _localizer_suits_method(self) -> Recipe:
        if self.localized:
            return self
        if not isinstance(self.method, MaskedMethod):
            if self.localizer is not None:
                raise ValueError(f"{self.method.name} uses whole models: it takes no localizer, density or scope")
            return self
        magnitude = LOCALIZERS.find("magnitude")
        localizer = self.localizer or magnitude()
        if type(localizer) is magnitude and "density" not in localizer.model_fields_set:
            given = localizer.model_dump(exclude={"density"})
            object.__setattr__(self, "localizer", magnitude(density=self.method.default_density, **given))
        return self

    @field_validator("out", "adapter")
    @classmethod
    def _expand_home(cls, value: Path | None) -> Path | None:
        return None if value is None else expand_home(value)

    @field_validator("out", "adapter")
    @classmethod
    def _leaves_room_beside(cls, value: Path | None) -> Path | None:
        if value is not None and (length := len(os.fsencode(value.name))) > LONGEST_NAME:
            raise ValueError(
                f"its name must be at most {LONGEST_NAME} bytes long, but has {length}: the work is done in a folder "
                "beside it with a longer one"
            )
        return value

    @field_validator("push_to")
    @classmethod
    def _is_target(cls, value: str | None) -> str | None:
        if value is not None:
            parse_target(value)
        return value

    @model_validator(mode="after")
    def _private_needs_push(self) -> Recipe:
        if self.private and self.push_to is None:
            raise ValueError("private applies to the pushed repo: it needs push_to")
        if self.create_pr and self.push_to is None:
            raise ValueError("create_pr opens a pull request in the pushed repo: it needs push_to")
        if self.create_pr and self.private:
            raise ValueError("private applies to a new repo, and a pull request needs one that exists: drop one")
        return self


PARTS: Mapping[str, type[BaseModel] | Registry[Any]] = {
    "base": Input,
    "finetuned": Finetuned,
    "localized": Localized,
    "data": LocalizationSet,
    "evaluate": EvaluateOptions,
    "evaluate.data": EvaluationSet,
    "compare": CompareOptions,
    "compare.select": EvaluateOptions,
    "compare.select.data": EvaluationSet,
    "localizer": LOCALIZERS,
    "method": METHODS,
    "stitch": STITCHERS,
}


def make_recipe(fields: Mapping[str, Any], where: str = "request") -> Recipe:
    """Validate. Raises RecipeError with every fault at once; for an unknown key it suggests the nearest one."""
    return validated(Recipe, fields, where, PARTS)


def _each(sets: Mapping[str, LocalizationSet] | Sequence[LocalizationSet]) -> list[LocalizationSet]:
    return list(sets.values() if isinstance(sets, Mapping) else sets)
