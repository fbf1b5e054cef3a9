"""Making the record of a merge: the manifest, and the recipe that reproduces it."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hf_locstitch.artifacts.localized_checkpoint import LocalizedCheckpoint
from hf_locstitch.artifacts.manifest import (
    InputRecord,
    Manifest,
    MaskRecord,
    values_file,
    weights_sha256,
)
from hf_locstitch.artifacts.merged_finetune import MergedFinetune
from hf_locstitch.artifacts.overlap import Overlap
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.source import file_sha256
from hf_locstitch.errors import CheckpointError, WorkError
from hf_locstitch.plan.plans import LocalizePlan, ModelPlan, Plan, StitchPlan
from hf_locstitch.plan.recipe import Finetuned, Input, Localized, Recipe
from hf_locstitch.plan.recipe_file import dump_recipe
from hf_locstitch.runtime.version import __version__
from hf_locstitch.tasks.sets import LocalizationSet

LIBRARIES = ("torch", "safetensors", "huggingface_hub", "numpy")

NO_EXAMPLES: Mapping[str, int] = MappingProxyType({})
FileHashes = Mapping[str, Mapping[str, str]]  # input -> shard -> sha256


def make_manifest(
    plan: Plan,
    files: FileHashes,
    overlap: Overlap,
    fingerprint: str,
    stitch: dict[str, Any] | None = None,
    examples: Mapping[str, int] = NO_EXAMPLES,
) -> Manifest:
    """The record without what is known only at the end: the output's files and the time.

    examples: how many each mask was found with.
    """
    localized = _localized_inputs(plan)
    masks = _mask_records(plan, overlap, examples) if plan.masked else {}
    smaller = list(_smaller_masks(plan, masks))
    merged = _merged_inputs(plan)
    parts = [*localized.values(), *merged.values()]
    exact = plan.exact_k and not smaller and all(one.record.k is not None for one in parts)
    return Manifest(
        hf_locstitch=__version__,
        method=plan.recipe.method.name,
        localizer=plan.common_localizer,
        scale=plan.recipe.scale,
        inputs=[_input_record(plan, name, checkpoint, files[name]) for name, checkpoint in plan.inputs.items()],
        localized={name: _record("localized", name, plan.inputs[name], files[name]) for name in localized},
        N=plan.n,
        k=plan.k if exact else None,
        masks=masks,
        covered_by=[plan.n - int(overlap.covered[1:].sum()), *overlap.covered[1:].tolist()] if plan.masked else [],
        overlap=overlap.pair_records(list(plan.finetuned)) if plan.masked else [],
        warnings=[*plan.warnings, *smaller],
        versions={"python": platform.python_version(), **_versions(_libraries(plan))},
        fingerprint=fingerprint,
        data={name: found.pinned.dump() for name, found in plan.data.items()}
        | {name: data for name, checkpoint in localized.items() for data in checkpoint.record.data.values()}
        | {name: one.record.data[one.name] for name, one in merged.items() if one.name in one.record.data},
        stitch=stitch,
        vocabulary=plan.vocabulary.as_json() if isinstance(plan, ModelPlan) and plan.vocabulary else None,
    )


def _libraries(plan: Plan) -> tuple[str, ...]:
    """Those whose versions may tell why a second run gave other bytes."""
    return (*LIBRARIES, "transformers", "peft") if plan.adapters else LIBRARIES


def _versions(libraries: Iterable[str]) -> dict[str, str]:
    """Of those that are installed: a merge by magnitude needs no torch."""
    found = {}
    for library in libraries:
        with suppress(PackageNotFoundError):
            found[library] = version(library)
    return found


def _smaller_masks(plan: Plan, masks: Mapping[str, MaskRecord]) -> Iterator[str]:
    """A sentence for each mask that keeps fewer elements than asked for."""
    if plan.exact_k and not isinstance(plan, StitchPlan):
        for name, mask in list(masks.items())[: 1 if plan.joint else None]:
            if mask.ones < plan.k:
                called = "the joint mask" if plan.joint else f"the mask of {name}"
                changed = "are changed by any finetune" if plan.joint else "differ from the base"
                adapted = "; adapters change only the layers that they adapt" if name in plan.adapters else ""
                yield (
                    f"{called} keeps {mask.ones:,} of the {plan.k:,} elements asked for: no more of the localized "
                    f"weights {changed}{adapted}."
                )


def _mask_records(plan: Plan, overlap: Overlap, examples: Mapping[str, int]) -> dict[str, MaskRecord]:
    localized = _localized_inputs(plan)
    parts = {**localized, **_merged_inputs(plan)}
    stored = {name: one.record.masks[one.name].examples for name, one in parts.items()}
    ones = dict(zip(plan.finetuned, overlap.pairs.diagonal().tolist(), strict=True))
    return {
        name: MaskRecord(
            plan.mask_file(name),
            count,
            plan.localizers[name].density,
            count / plan.n if plan.n else 0.0,
            values_file(name) if isinstance(plan, LocalizePlan) else None,
            examples.get(name, stored.get(name)),
            refitted=name in localized and localized[name].refitted,
        )
        for name, count in ones.items()
    }


def _input_record(plan: Plan, name: str, checkpoint: Checkpoint, files: Mapping[str, str]) -> InputRecord:
    localized = _localized_inputs(plan)
    if name in localized:  # the model itself, as its localized checkpoint recorded it
        return replace(localized[name].finetuned, name=name)
    return _record("base" if checkpoint is plan.base else "finetuned", name, checkpoint, files)


def _record(role: str, name: str, checkpoint: Checkpoint, files: Mapping[str, str]) -> InputRecord:
    return InputRecord(role, name, checkpoint.source.pinned, checkpoint.source.commit, dict(files))


def finish(record: Manifest, stage: Path, known: Mapping[str, tuple[int, str]], seconds: float) -> Manifest:
    """The record with the output's files. known: file -> size and SHA-256, for files already hashed."""
    paths = {path.relative_to(stage).as_posix(): path for path in stage.rglob("*") if path.is_file()}
    outputs = {}
    for name in sorted({*paths, *known}):
        size, sha256 = known.get(name) or (paths[name].stat().st_size, file_sha256(paths[name]))
        outputs[name] = {"size": size, "sha256": sha256}
    written = {"written": sum(entry["size"] for entry in outputs.values())}
    return replace(record, outputs=outputs, bytes=written, seconds=round(seconds, 3))


def pinned_recipe(plan: Plan, files: FileHashes) -> str:
    """YAML that reproduces the result: repos at their commits, local folders by the hash of their weights."""

    def pin(name: str, checkpoint: Checkpoint) -> dict[str, str]:
        pinned = {"ref": checkpoint.source.pinned}
        return pinned if checkpoint.source.commit else {**pinned, "sha256": weights_sha256(files[name])}

    parts = plan.finetuned.items()
    recipe = plan.recipe.model_copy(
        update={
            "base": Input(**pin("base", plan.base)),
            **(
                {"localized": tuple(Localized(**pin(name, one), **_pinned_mask(plan, name)) for name, one in parts)}
                if isinstance(plan, StitchPlan)
                else {"finetuned": tuple(Finetuned(**pin(name, one), name=name) for name, one in parts)}
            ),
            "data": {name: found.pinned for name, found in plan.data.items()} or (),
            **_pinned_template(plan),
        }
    )
    recipe = with_fit_data(recipe, {name: found.pinned for name, found in plan.fit_data.items()})
    head = f"# What made this; run it again: hf-locstitch {plan.command} locstitch.yaml --out DIR\n"
    return head + dump_recipe(recipe)


def _pinned_template(plan: Plan) -> dict[str, Any]:
    """A chat template from a file, by its name without the path, as of local folders."""
    asked = plan.recipe.chat_template
    return {"chat_template": f"./{Path(asked).name}"} if asked and asked not in plan.inputs else {}


def _pinned_mask(plan: StitchPlan, name: str) -> dict[str, Any]:
    """The name of a part of a stitch, and the merge that holds its mask, if one does."""
    if (one := plan.merged_inputs.get(name)) is None:
        return {"name": name}
    pinned = {} if one.source.commit else {"sha256": one.mask_sha256}
    return {"name": name, "mask": Finetuned(ref=one.source.pinned, name=one.name, **pinned)}


def with_fit_data(recipe: Recipe, data: Mapping[str, LocalizationSet]) -> Recipe:
    """The recipe with these inputs, by finetune, to fit values to, if it fits any."""
    if recipe.stitch is not None:
        return recipe.model_copy(update={"stitch": recipe.stitch.model_copy(update={"data": data})})
    if recipe.fitting is None:
        return recipe
    return recipe.model_copy(update={"method": recipe.method.model_copy(update={"data": data})})


def _localized_inputs(plan: Plan) -> Mapping[str, LocalizedCheckpoint]:
    return plan.localized_inputs if isinstance(plan, StitchPlan) else {}


def _merged_inputs(plan: Plan) -> Mapping[str, MergedFinetune]:
    return plan.merged_inputs if isinstance(plan, StitchPlan) else {}


def check_strict(recipe: Recipe, record: Manifest) -> None:
    """Raises WorkError if a strict recipe's run warned of what its plan could not know."""
    if recipe.strict and record.warnings:
        raise WorkError(
            f"strict makes errors of warnings: {' '.join(record.warnings)} Nothing was published. Without strict the "
            "same command goes on from what is done."
        )


def check_pins(plan: Plan, files: FileHashes) -> None:
    """Raises CheckpointError if an input's weights are not those that the recipe expects, or that were localized."""
    for name, entry in zip(plan.inputs, (plan.recipe.base, *plan.recipe.entries), strict=True):
        got = weights_sha256(files[name])
        if entry.sha256 not in (None, got):
            raise CheckpointError(
                f"the weights of {plan.inputs[name].label} have sha256 {got}, but the recipe expects {entry.sha256}: "
                "it was made from different weights. Use the right checkpoint, or drop sha256 from the recipe."
            )
    for name, localized in _localized_inputs(plan).items():
        for file, got in files[name].items():
            if got != (due := localized.record.outputs[file]["sha256"]):
                raise CheckpointError(
                    f"{localized.label}/{file} is damaged: it has sha256 {got}, expected {due}. Fetch it again."
                )
        _check_base(plan, localized.label, localized.base, files["base"])
    for name, one in _merged_inputs(plan).items():
        _check_base(plan, one.label, one.base, files["base"])
        if unlike := sorted(one.finetuned.files.items() ^ files[name].items()):
            file = unlike[0][0]
            raise CheckpointError(
                f"{one.source.label} holds the mask of {one.finetuned.ref}, whose {file} has sha256 "
                f"{one.finetuned.files.get(file, 'none, as it is absent')}; in {one.label} it is "
                f"{files[name].get(file, 'absent')}. Use the finetune that was merged."
            )


def _check_base(plan: Plan, label: str, base: InputRecord, files: Mapping[str, str]) -> None:
    """Raises CheckpointError unless what a part of a stitch was localized against is the plan's base."""
    if unlike := [file for file, due in base.files.items() if files.get(file) != due]:
        raise CheckpointError(
            f"{label} was localized against {base.ref}, whose {unlike[0]} has sha256 {base.files[unlike[0]]}; in the "
            f"base {plan.base.label} it is {files.get(unlike[0], 'absent')}. Use the base that it was localized "
            "against."
        )
