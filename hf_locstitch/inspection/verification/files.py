"""The files of a merge against its manifest, and its recipe against both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hf_locstitch.artifacts.manifest import FILE, Manifest, weights_sha256
from hf_locstitch.checkpoints.checkpoint import CARD
from hf_locstitch.checkpoints.side_files import WEIGHTS
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.inspection.verification.report import Finding
from hf_locstitch.plan.recipe import Recipe

UNLISTED = frozenset({FILE, ".gitattributes"})  # the manifest itself, and a file that the Hub adds
SCORES = ".eval_results/"  # anybody may add scores to a repo


def check_files(source: Source, record: Manifest, advance: Callable[[int], object]) -> Iterator[Finding]:
    """Every listed file is present, unchanged. An unlisted one is an error if it could be taken for weights."""
    for file, entry in record.outputs.items():
        yield from _check_file(source, file, entry)
        advance(entry.get("size", 0))
    unlisted = source.files.keys() - record.outputs.keys() - UNLISTED
    for file in sorted(file for file in unlisted if not file.startswith(SCORES)):
        harmless = not file.endswith((*WEIGHTS, ".index.json"))
        size = f"{source.files[file].size} bytes"
        yield Finding("files", file, "size", size, f"absent ({FILE} does not list it)", warning=harmless)


def _check_file(source: Source, file: str, entry: Mapping[str, Any]) -> Iterator[Finding]:
    size, sha256 = entry.get("size"), entry.get("sha256")
    if file not in source.files:
        yield Finding("files", file, "size", "absent", f"{size} bytes")
        return
    edited = file == CARD  # people edit it in the browser, on the Hub
    prefix = "edited since the merge: " if edited else ""
    if source.files[file].size != size:
        actual, expected = f"{source.files[file].size} bytes", f"{size} bytes"
        yield Finding("files", file, f"{prefix}size", actual, expected, warning=edited)
    elif (got := source.sha256(file)) != sha256:
        yield Finding("files", file, f"{prefix}sha256", got, str(sha256), warning=edited)


def check_recipe(recipe: Recipe, record: Manifest) -> Iterator[Finding]:
    """The pinned recipe asks for what the manifest records."""
    asked: dict[str, Any] = {"method": recipe.method.name, "scale": recipe.scale}
    done: dict[str, Any] = {"method": record.method, "scale": record.scale}
    if not recipe.localized:  # localized checkpoints have their own localizers
        asked["localizer"] = recipe.localizer.model_dump(mode="json") if recipe.localizer else None
        done["localizer"] = record.localizer
    fitting = recipe.fitting
    if fitting is not None or record.stitch is not None:
        asked["stitch"] = fitting.as_record() if fitting else "mean"
        fields = asked["stitch"] if fitting else ("method",)
        done["stitch"] = {key: record.stitch.get(key) for key in fields} if record.stitch else "mean"
    inputs = [("base", recipe.base), *((entry.name, entry) for entry in recipe.entries)]
    asked["inputs"] = [(name, entry.ref, entry.sha256) for name, entry in inputs]
    taken = [record.localized.get(entry.name, entry) for entry in record.inputs]
    done["inputs"] = [(entry.name, entry.ref, None if entry.commit else weights_sha256(entry.files)) for entry in taken]
    for field, value in asked.items():
        if value != done[field]:
            yield Finding("recipe", "locstitch.yaml", field, str(value), f"{done[field]} as in {FILE}")
