"""The record of a merge: locstitch.json for machines, locstitch.yaml to run it again."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_locstitch._version import __version__
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.source import file_sha256
from hf_locstitch.errors import CheckpointError
from hf_locstitch.plan import MergePlan
from hf_locstitch.recipe import Finetuned, Input, dump_recipe

FILE = "locstitch.json"
RECIPE_FILE = "locstitch.yaml"
LIBRARIES = ("torch", "safetensors", "huggingface_hub", "numpy")

FileHashes = Mapping[str, Mapping[str, str]]  # input -> shard -> sha256


@dataclass(frozen=True)
class InputRecord:
    """ref: org/name@commit, or ./folder for a local one, whose path is nobody's business. files: shard -> sha256."""

    role: str
    name: str
    ref: str
    commit: str | None
    files: dict[str, str]


@dataclass(frozen=True)
class MaskRecord:
    """density: what was asked for; real_density = ones / N."""

    file: str
    ones: int
    density: float
    real_density: float


@dataclass(frozen=True)
class Manifest:
    """covered_by[c]: coordinates that c masks cover. overlap: pair -> coordinates in both, and their Jaccard index.

    outputs: file -> size in bytes and sha256, of every file but the manifest itself.
    """

    hf_locstitch: str
    method: str
    localizer: dict[str, Any]
    scale: float
    inputs: list[InputRecord]
    N: int
    k: int
    masks: dict[str, MaskRecord]
    covered_by: list[int]
    overlap: list[dict[str, Any]]
    warnings: list[str]
    versions: dict[str, str]
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


def make_manifest(
    plan: MergePlan, files: FileHashes, covered: npt.NDArray[np.int64], pairs: npt.NDArray[np.int64]
) -> Manifest:
    """covered: [models + 1]; pairs: [models, models]; both in the order of the finetunes."""
    names = list(plan.finetuned)
    ones = {name: int(pairs[i, i]) for i, name in enumerate(names)}
    density = plan.recipe.localizer.density
    covered = covered.copy()
    covered[0] = plan.n - covered[1:].sum()
    return Manifest(
        hf_locstitch=__version__,
        method=plan.recipe.method,
        localizer=plan.recipe.localizer.model_dump(mode="json"),
        scale=plan.recipe.scale,
        inputs=[_input_record(plan, name, checkpoint, files[name]) for name, checkpoint in plan.inputs.items()],
        N=plan.n,
        k=plan.k,
        masks={
            name: MaskRecord(f"masks/{name}.safetensors", ones[name], density, ones[name] / plan.n if plan.n else 0.0)
            for name in names
        },
        covered_by=[int(count) for count in covered],
        overlap=[
            _pair(names[i], names[j], int(pairs[i, j]), ones)
            for i in range(len(names))
            for j in range(i + 1, len(names))
        ],
        warnings=list(plan.warnings),
        versions={
            "python": platform.python_version(),
            **{library: version(library) for library in LIBRARIES},
        },
    )


def _input_record(plan: MergePlan, name: str, checkpoint: Checkpoint, files: Mapping[str, str]) -> InputRecord:
    role = "base" if checkpoint is plan.base else "finetuned"
    return InputRecord(role, name, checkpoint.source.pinned, checkpoint.source.commit, dict(files))


def _pair(one: str, other: str, both: int, ones: Mapping[str, int]) -> dict[str, Any]:
    either = ones[one] + ones[other] - both
    return {"masks": [one, other], "both": both, "jaccard": both / either if either else 0.0}


def finish(record: Manifest, stage: Path, seconds: float) -> Manifest:
    """The record with the output's files hashed."""
    paths = sorted(path for path in stage.rglob("*") if path.is_file())
    outputs = {
        path.relative_to(stage).as_posix(): {"size": path.stat().st_size, "sha256": file_sha256(path)} for path in paths
    }
    written = {"written": sum(entry["size"] for entry in outputs.values())}
    return replace(record, outputs=outputs, bytes=written, seconds=round(seconds, 3))


def to_json(record: Manifest) -> str:
    return json.dumps(asdict(record), indent=2, ensure_ascii=False) + "\n"


def weights_sha256(files: Mapping[str, str]) -> str:
    """One hash for a checkpoint's weights: of its shards' names and hashes."""
    return hashlib.sha256("".join(f"{file} {digest}\n" for file, digest in sorted(files.items())).encode()).hexdigest()


def pinned_recipe(plan: MergePlan, files: FileHashes) -> str:
    """YAML that makes the same merge again: repos at their commits, local folders by the hash of their weights."""

    def pin(name: str, checkpoint: Checkpoint) -> dict[str, str]:
        pinned = {"ref": checkpoint.source.pinned}
        return pinned if checkpoint.source.commit else {**pinned, "sha256": weights_sha256(files[name])}

    recipe = plan.recipe.model_copy(
        update={
            "base": Input(**pin("base", plan.base)),
            "finetuned": tuple(
                Finetuned(**pin(name, checkpoint), name=name) for name, checkpoint in plan.finetuned.items()
            ),
        }
    )
    return (
        "# The merge that made this model; run it again: hf-locstitch merge locstitch.yaml --out DIR\n"
        + dump_recipe(recipe)
    )


def check_pins(plan: MergePlan, files: FileHashes) -> None:
    """Raises CheckpointError if an input's weights are not those that the recipe asks for."""
    for name, entry in zip(plan.inputs, (plan.recipe.base, *plan.recipe.finetuned), strict=True):
        got = weights_sha256(files[name])
        if entry.sha256 not in (None, got):
            raise CheckpointError(
                f"the weights of {plan.inputs[name].label} have sha256 {got}, but the recipe asks for {entry.sha256}: "
                "it was made from other weights. Name the right checkpoint, or drop sha256 from the recipe."
            )
