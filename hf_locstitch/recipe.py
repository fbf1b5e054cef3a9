"""What is asked for: the fields of a YAML recipe, of the command line's flags and of `merge_from_hub`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from hf_locstitch.checkpoints.ref import REPO_ID
from hf_locstitch.data.sets import LocalizationSet
from hf_locstitch.errors import RecipeError
from hf_locstitch.localize.localizer import LOCALIZERS, Localizer
from hf_locstitch.localize.magnitude import Magnitude
from hf_locstitch.localize.with_data import WithData
from hf_locstitch.methods import Dense, Masked, find_method, method_names
from hf_locstitch.refit.config import FITTINGS, Fitting, Refit, RegMean, read_stitch

WHERE = ("out", "push_to", "private")
# What localized checkpoints have settled, or what takes whole models.
SETTLED = ("localizer", "data", "stitch", "include", "exclude", "rest_from", "files_from", "evaluate")
NAME_PATTERN = r"^[A-Za-z0-9][\w.-]*$"  # becomes a file name: masks/NAME.safetensors


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Input(Strict):
    """A checkpoint. ref: a folder, org/name or org/name@revision. sha256: what its weights must be, if given."""

    ref: str = Field(min_length=1)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"ref": value} if isinstance(value, str) else value


class Finetuned(Input):
    """name: what masks, tables and the card call it; the last part of ref by default."""

    name: str | None = Field(default=None, pattern=NAME_PATTERN)


class Evaluate(Strict):
    """lm-eval's tasks for the finished merge, its base, its finetunes and their plain average.

    tasks: NAME or NAME:SHOTS. suite: a bundle of tasks. limit: examples a task, all by default. batch_size: the largest
    that fits by default. include_path: a folder of further task files.
    """

    tasks: tuple[str, ...] = ()
    suite: Literal["paper", "quick"] | None = None
    limit: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    include_path: Path | None = None
    chat_template: bool = False
    parents: bool = True
    average: bool = False

    @model_validator(mode="after")
    def _names_tasks(self) -> Evaluate:
        if not self.tasks and self.suite is None:
            raise ValueError("names neither tasks nor a suite")
        return self


class Recipe(Strict):
    """One merge. Every field but `base` and one of `finetuned` and `localized` has a default."""

    base: Input
    localized: tuple[Finetuned, ...] = Field(default=(), max_length=64)
    """Localized checkpoints, which hold masks and values already, in place of `finetuned`."""
    finetuned: tuple[Finetuned, ...] = Field(default=(), max_length=64)
    method: str = "locstitch"
    localizer: Localizer | None = None
    """How masks are found; the method's default if it has masks, nothing if it has none."""
    data: dict[str, LocalizationSet] | tuple[LocalizationSet, ...] = ()
    """A localization set for each finetune, by name or in order, for the localizers that look at data, and for a refit
    or RegMean that is given no other."""
    stitch: Fitting | None = None
    """How the values under the masks are found: `mean` (None) of the finetuned ones, or a `refit` of them. With method
    regmean: how that fits whole models."""
    scale: float = Field(default=1.0, allow_inf_nan=False)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rest_from: str | None = None
    """Name of the finetune that gives the tensors that are not localized; the base by default."""
    files_from: str | None = None
    """Name of the finetune that gives config, tokenizer and the like; as `rest_from` by default."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    shard_size: ByteSize | None = Field(default=None, gt=0)
    """Largest output file in bytes ("5GB"); the base's own division by default."""
    allow_non_finite: bool = False
    figures: bool = True
    """Whether a merge with masks draws them."""
    evaluate: Evaluate | None = None
    """What the finished merge is evaluated on; nothing by default."""
    out: Path | None = None
    push_to: str | None = None
    private: bool = False

    @property
    def entries(self) -> tuple[Finetuned, ...]:
        """What is merged into the base."""
        return self.finetuned or self.localized

    @field_validator("finetuned")
    @classmethod
    def _something_to_merge(cls, value: tuple[Finetuned, ...], info: ValidationInfo) -> tuple[Finetuned, ...]:
        localized = info.data.get("localized")
        if localized == () and not value:
            raise PydanticCustomError("missing", "Field required")
        if localized and value:
            raise ValueError("finetuned models and localized checkpoints do not go into one merge; localize them all")
        return value

    @field_validator("method")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in method_names():
            near = get_close_matches(value, method_names(), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(method_names())}"
            raise ValueError(f"unknown method ({hint})")
        return value

    @field_validator("localizer", mode="before")
    @classmethod
    def _default_localizer(cls, value: Any) -> Any:
        return {"method": "magnitude", **value} if isinstance(value, dict) else value

    @field_validator("stitch", mode="before")
    @classmethod
    def _read_stitch(cls, value: Any) -> Any:
        return read_stitch(value)

    @model_validator(mode="after")
    def _data_suits_stitch(self) -> Recipe:
        method = find_method(self.method)
        if self.stitch is None and isinstance(method, Dense) and method.fitted:
            object.__setattr__(self, "stitch", RegMean())
        if self.stitch is None or self.localized:
            return self
        due = "locstitch" if isinstance(self.stitch, Refit) else "regmean"
        if self.method != due:
            raise ValueError(f"stitch: {self.stitch.method} goes with method {due}, not with {self.method}")
        what = "a refit" if isinstance(self.stitch, Refit) else method.title
        found = len(self.stitch.data or self.data)
        if found != len(self.finetuned):
            raise ValueError(
                f"{what} looks at data: {len(self.finetuned)} sets of unlabelled inputs are needed, one for each "
                f"finetune, not {found}"
            )
        if self.allow_non_finite:
            raise ValueError(f"allow_non_finite does not go with {what}: nothing can be fitted to what is no number")
        return self

    @model_validator(mode="after")
    def _data_suits_localizer(self) -> Recipe:
        looks = isinstance(self.localizer, WithData)
        if self.data and not looks and (self.stitch is None or self.stitch.data):
            raise ValueError(
                "data is given, but only the localizers mask and saliency look at data, stitch: refit, and method "
                "regmean"
            )
        if looks and len(self.data) != len(self.finetuned):
            raise ValueError(
                f"the localizer looks at data: {len(self.finetuned)} localization sets are needed, one for each "
                f"finetune, not {len(self.data)}"
            )
        if looks and self.allow_non_finite:
            raise ValueError(
                "allow_non_finite does not go with a localizer that looks at data: no loss would be a number"
            )
        return self

    @model_validator(mode="after")
    def _localized_settle_the_rest(self) -> Recipe:
        if self.localized and self.method != "locstitch":
            raise ValueError(f"localized checkpoints are merged by method locstitch, not {self.method}")
        given = [field for field in SETTLED if getattr(self, field)]
        if self.localized and given:
            raise ValueError(f"{', '.join(given)} cannot be said of localized checkpoints: it takes whole models")
        return self

    @model_validator(mode="after")
    def _localizer_suits_method(self) -> Recipe:
        if self.localized:
            return self
        method = find_method(self.method)
        if isinstance(method, Dense) and self.localizer is not None:
            raise ValueError(f"{self.method} uses whole models: it takes no localizer, density or scope")
        localizer = self.localizer or Magnitude()
        if isinstance(method, Masked) and type(localizer) is Magnitude and "density" not in localizer.model_fields_set:
            given = localizer.model_dump(exclude={"density"})
            object.__setattr__(self, "localizer", Magnitude(density=method.density, **given))
        return self

    @field_validator("push_to")
    @classmethod
    def _is_repo_id(cls, value: str | None) -> str | None:
        if value is not None and ("/" not in value or not REPO_ID.fullmatch(value)):
            raise ValueError("must be org/name")
        return value

    @model_validator(mode="after")
    def _private_needs_push(self) -> Recipe:
        if self.private and self.push_to is None:
            raise ValueError("private says who may see the pushed repo: it needs push_to")
        return self


def load_recipe(path: Path) -> dict[str, Any]:
    """The fields of a YAML recipe, not yet validated. Raises RecipeError if it is no mapping."""
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}. Check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(fields, dict):
        raise RecipeError(f"{path} should hold fields such as `base:` and `finetuned:`, not {type(fields).__name__}.")
    return fields


def make_recipe(fields: Mapping[str, Any], where: str = "the request") -> Recipe:
    """Validate. Raises RecipeError with every fault at once; an unknown key is answered with the nearest one."""
    try:
        return Recipe.model_validate(dict(fields))
    except ValidationError as error:
        faults = [_fault(fault) for fault in error.errors(include_url=False)]
        raise RecipeError(f"{where} is wrong: " + "; ".join(faults) + ".") from error


def _fault(fault: Any) -> str:
    loc = [str(part) for part in fault["loc"]]
    if len(loc) > 1 and loc[0] in ("localizer", "stitch"):  # pydantic names the member of the union
        loc = [loc[0], *loc[2:]]
    if fault["type"] == "extra_forbidden":
        known = _fields_at([str(part) for part in fault["loc"]][:-1])
        near = get_close_matches(loc[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        return f"unknown key {'.'.join(loc)!r} ({hint})"
    if fault["type"] == "missing":
        return f"{'.'.join(loc)!r} is missing"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{'.'.join(loc)}: {message}, not {fault['input']!r}" if loc else message


def _fields_at(loc: list[str]) -> list[str]:
    """The keys that are known where an unknown one stood."""
    model: type[BaseModel] = {
        "base": Input,
        "finetuned": Finetuned,
        "localized": Finetuned,
        "localizer": LOCALIZERS.get(loc[1] if len(loc) > 1 else "", Magnitude),
        "data": LocalizationSet,
        "stitch": FITTINGS.get(loc[1] if len(loc) > 1 else "", Refit),
        "evaluate": Evaluate,
    }.get(loc[0] if loc else "", Recipe)
    return list(model.model_fields)


def dump_recipe(recipe: Recipe) -> str:
    """YAML that asks for the same merge: what differs from the defaults, not where it goes or how it is judged."""
    fields = recipe.model_dump(mode="json", exclude={*WHERE, "evaluate"}, exclude_defaults=True)
    if recipe.localizer is not None:
        fields["localizer"] = recipe.localizer.model_dump(mode="json")
    if recipe.data:
        fields["data"] = _dump_sets(recipe.data)
    if recipe.stitch is not None:
        sets = {"data": _dump_sets(recipe.stitch.data)} if recipe.stitch.data else {}
        fields["stitch"] = {**recipe.stitch.dump(), **sets}
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def _dump_sets(sets: Mapping[str, LocalizationSet] | Sequence[LocalizationSet]) -> Any:
    if isinstance(sets, Mapping):
        return {name: asked.dump() for name, asked in sets.items()}
    return [asked.dump() for asked in sets]
