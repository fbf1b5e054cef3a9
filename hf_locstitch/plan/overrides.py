"""A recipe's fields with others laid over them, under the names that the flags of `merge` have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_locstitch.localize.localizers import LOCALIZERS
from hf_locstitch.stitch.methods import METHODS

# Names for the settings of the localizer -> its fields.
LOCALIZER: Mapping[str, str] = {"localizer": "method", "density": "density", "scope": "scope"}


def overridden(fields: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """fields: as in a recipe. given: fields that replace these; and a localizer, by name or its fields, a density and a
    scope, which are settings of the localizer, or the density one of the method that has its own."""
    given = {key: as_fields("method", value) if key == "localizer" else value for key, value in given.items()}
    own = with_density(given.get("method", fields.get("method")), given.get("density"))
    if own is not None:
        given = {**{key: value for key, value in given.items() if key != "density"}, "method": own}
    localizing = {field: given[key] for key, field in LOCALIZER.items() if key in given and key != "localizer"}
    rest = {key: value for key, value in given.items() if key not in LOCALIZER}
    if localizing or "localizer" in given:
        named = given.get("localizer", {})
        rest["localizer"] = {**_kept(as_fields("method", fields.get("localizer")), named), **named, **localizing}
    return {**fields, **rest}


def _kept(localizer: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """What stays of a recipe's localizer if another takes its place: the settings that this one has, too."""
    name = named.get("method")
    if name not in LOCALIZERS.names():
        return dict(localizer)
    return {key: value for key, value in localizer.items() if key in LOCALIZERS.find(name).model_fields}


def as_fields(key: str, value: Any) -> dict[str, Any]:
    """The fields of a component that a recipe may also call by its name, which is their `key`."""
    return {key: value} if isinstance(value, str) else dict(value or {})


def with_density(method: Any, density: float | None) -> dict[str, Any] | None:
    """A method, as a recipe has it, with this density in place of all that it had; None if density is a field of its
    localizer instead."""
    fields = as_fields("name", method) if isinstance(method, str | Mapping) else {}
    if density is None or fields.get("name") not in METHODS.names():
        return None
    if "density" not in METHODS.find(fields["name"]).model_fields:
        return None
    return {**{key: value for key, value in fields.items() if key != "densities"}, "density": density}
