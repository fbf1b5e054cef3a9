"""Requests as pydantic models: every fault at once, in words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from hf_locstitch.errors import RecipeError
from hf_locstitch.runtime.human import number_meant
from hf_locstitch.runtime.registry import Registry

Model = TypeVar("Model", bound=BaseModel)
MOST, LONGEST = 20, 500  # faults in a message, characters of each
# Fields that hold a model, or one of several, or some by name; of fields in them, the keys that lead there, with dots.
Parts = Mapping[str, "type[BaseModel] | Registry[Any]"]


def listed(faults: Iterable[str]) -> str:
    """As one clause, each once, and no more and no longer ones than people read."""
    different = list(dict.fromkeys(faults))
    shown = [fault if len(fault) <= LONGEST else f"{fault[: LONGEST - 1]}…" for fault in different[:MOST]]
    return "; ".join(shown) + (f"; and {len(different) - MOST} more" if len(different) > MOST else "")


FLAGS = {"base": "--base REF", "finetuned": "--ft REF...", "data": "--data"}  # that give what a request needs


def validated(model: type[Model], fields: Mapping[str, Any], where: str, parts: Parts) -> Model:
    """The request. Raises RecipeError with every fault; for an unknown key it suggests the nearest one."""
    try:
        return model.model_validate(dict(fields))
    except ValidationError as error:
        found = error.errors(include_url=False)
        meant = {near for fault in found if (near := _nearest(fault, model, parts))}  # not missing, but misspelt
        faults = [
            _fault(fault, model, parts)
            for fault in found
            if not (fault["type"] == "missing" and len(fault["loc"]) == 1 and fault["loc"][0] in meant)
        ]
        raise RecipeError(f"invalid {where}: {listed(faults)}.") from error


def _fault(fault: Any, model: type[BaseModel], parts: Parts) -> str:
    loc = [str(part) for part in fault["loc"]]
    union = parts.get(loc[0]) if loc else None
    if len(loc) > 1 and isinstance(union, Registry) and loc[1] in union.names():  # pydantic names the union's member
        loc = [loc[0], *loc[2:]]
    if fault["type"] == "extra_forbidden":
        near, known = _nearest(fault, model, parts), _fields_at([str(part) for part in fault["loc"]][:-1], model, parts)
        hint = f"did you mean {near!r}?" if near else f"choose from {', '.join(known)}"
        return f"unknown key {'.'.join(loc)!r} ({hint})"
    if fault["type"] == "missing":
        flag = FLAGS.get(".".join(loc))
        return f"{'.'.join(loc)!r} is missing" + (f" ({flag})" if flag else "")
    message, given = fault["msg"].removeprefix("Value error, "), fault["input"]
    if loc[-1:] == ["density"] and fault["type"] == "less_than_equal" and 1 < given <= 100:
        return (
            f"{'.'.join(loc)} is a share of the weights, at most 1, not {given:g}: {given:g} % is {given / 100:g} "
            f"(--density {given / 100:g})"
        )
    if fault["type"] == "float_parsing":
        meant = number_meant(given)
        hint = "" if meant is None else f" (did you mean {meant:g}?)"
        return f"{'.'.join(loc)}: {given!r} is not a number{hint}"
    if fault["type"] == "tuple_type":
        words = re.split(r"[\s,]+", given.strip()) if isinstance(given, str) else []
        message = "must be a list" + (f", such as [{', '.join(words)}]" if words else "")
    return f"{'.'.join(loc)}: {message} (got {fault['input']!r})" if loc else message


def _nearest(fault: Any, model: type[BaseModel], parts: Parts) -> str | None:
    """The valid key that an unknown one is most like; None if there is none, or another fault."""
    if fault["type"] != "extra_forbidden":
        return None
    *within, key = (str(part) for part in fault["loc"])
    return next(iter(get_close_matches(key, _fields_at(within, model, parts), n=1, cutoff=0.5)), None)


def _fields_at(loc: list[str], model: type[BaseModel], parts: Parts) -> list[str]:
    """The valid keys at the place of an unknown one."""
    sizes = (size for size in range(len(loc), 0, -1) if ".".join(loc[:size]) in parts)
    inside = next(sizes, 0)
    part = parts[".".join(loc[:inside])] if inside else model
    if not isinstance(part, Registry):
        return list(part.model_fields)
    rest = loc[inside:]
    named = [part.find(rest[0])] if rest and rest[0] in part.names() else part.all()
    return [field for component in named for field in component.model_fields]
