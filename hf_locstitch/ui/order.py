"""What the form asks for, checked, and as the fields of a recipe: nothing but repos on the Hub."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_locstitch.checkpoints.ref import REPO_ID, REVISION
from hf_locstitch.errors import RecipeError
from hf_locstitch.plan.push_target import parse_target
from hf_locstitch.stitch.method import MaskedMethod
from hf_locstitch.stitch.methods import METHODS

MOST_FINETUNES = 16
LONGEST = 200  # characters of a ref
DENSITY = 0.1


def offered_methods() -> list[tuple[str, str]]:
    """(title, name) of the methods that need no data, the paper's own first."""
    found = [(METHODS.find(name).title, name) for name in METHODS.names() if not METHODS.find(name).needs_data]
    return sorted(found, key=lambda one: (one[1] != "locstitch", one[0].casefold()))


def takes_density(method: str) -> bool:
    """Whether masks are found for it."""
    return issubclass(METHODS.find(method), MaskedMethod)


def default_density(method: str) -> float:
    """The method's own, where masks are found for it."""
    return float(getattr(METHODS.find(method), "default_density", None) or DENSITY)


@dataclass(frozen=True)
class Order:
    """One merge as it was asked for. push_to: org/name, empty while only a plan is asked for."""

    base: str
    finetuned: tuple[str, ...]
    method: str = "locstitch"
    density: float = DENSITY
    scale: float = 1.0
    push_to: str = ""
    private: bool = False

    def recipe_fields(self) -> dict[str, Any]:
        """For `make_recipe`."""
        localized = (
            {"localizer": {"method": "magnitude", "density": self.density}} if takes_density(self.method) else {}
        )
        target = {"push_to": self.push_to, "private": self.private} if self.push_to else {}
        return {
            "base": self.base,
            "finetuned": list(self.finetuned),
            "method": self.method,
            "scale": self.scale,
            **localized,
            **target,
        }

    def pushed_to(self, repo: str, private: bool) -> Order:
        """The same with a target. Raises RecipeError."""
        repo = repo.strip()
        try:
            target = parse_target(repo)
        except ValueError as error:
            raise RecipeError(f"{repo[:LONGEST]!r} cannot be pushed to: it {error}. Write your-name/model.") from error
        return replace(self, push_to=target.ref, private=private)

    def key(self, owner: str) -> str:
        """The same for the same merge by the same person: 16 hex digits."""
        facts = json.dumps([owner, self.recipe_fields()], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:16]


def make_order(
    base: str | None, finetuned: Sequence[str] | None, method: str, percent: float | None, scale: float | None
) -> Order:
    """An order from what stands in the form.

    Args:
        base: org/name or org/name@revision.
        finetuned: Likewise, one or several.
        method: The name of one that needs no data.
        percent: Density in percent.
        scale: Factor on the stitched task vectors.

    Raises:
        RecipeError: With the first thing that is missing or wrong.
    """
    models = [text.strip() for text in finetuned or () if text and text.strip()]
    if not (base or "").strip():
        raise RecipeError("no base is chosen. Search the model that the others were finetuned from, or paste its name.")
    if not models:
        raise RecipeError("no finetuned model is chosen. Add one or more that were finetuned from the base.")
    if len(models) > MOST_FINETUNES:
        raise RecipeError(f"{len(models)} models are more than the {MOST_FINETUNES} that one merge takes here.")
    if method not in (name for _, name in offered_methods()):
        raise RecipeError(f"there is no method {method!r} here. Choose one from the list.")
    percent, scale = _number("density", percent), _number("scale", scale)
    if not 0 < percent <= 100:
        raise RecipeError(f"a density of {percent:g} % keeps nothing, or more than all. Choose one from 0.1 to 100 %.")
    refs = [check_repo(text) for text in [str(base).strip(), *models]]
    if twice := next((ref for ref in refs if refs.count(ref) > 1), None):
        raise RecipeError(f"{twice} is chosen twice. Choose different models.")
    return Order(refs[0], tuple(refs[1:]), method, round(percent / 100, 6), scale)


def _number(name: str, value: object) -> float:
    """What stands in a field for a number. Raises RecipeError if that is empty, or no finite number."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    raise RecipeError(f"the {name} is {'empty' if value is None else 'no finite number'}. Enter a number.")


def check_repo(text: str | None) -> str:
    """A repo on the Hub, with its owner, or with @revision; never a folder. Raises RecipeError."""
    ref = (text or "").strip().removeprefix("https://huggingface.co/").rstrip("/")
    repo, at, revision = ref.partition("@")
    named = "/" in repo and len(ref) <= LONGEST and REPO_ID.fullmatch(repo) and ".." not in ref
    if named and (not at or REVISION.fullmatch(revision)):
        return ref
    raise RecipeError(f"{ref[:LONGEST]!r} is not the name of a model on the Hub. Write org/name, or org/name@revision.")


def suggested_target(owner: str, order: Order) -> str:
    """A name for the merge in a namespace."""
    base = order.base.partition("@")[0].rpartition("/")[2]
    return f"{owner}/{base[:80]}-{order.method if order.method != 'locstitch' else 'stitched'}"
