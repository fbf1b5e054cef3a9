"""The record of a merge: locstitch.json for machines, locstitch.yaml to run it again."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hf_locstitch._version import __version__
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.source import file_sha256
from hf_locstitch.errors import CheckpointError
from hf_locstitch.plan import MergePlan
from hf_locstitch.recipe import Finetuned, Input, dump_recipe
from hf_locstitch.refit.config import Fitting

if TYPE_CHECKING:
    from hf_locstitch.merger import Overlap

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
    """density: what was asked for; real_density = ones / N.

    values: file of the finetuned values under the mask, in a localized checkpoint; a model holds them itself.
    """

    file: str
    ones: int
    density: float | None
    real_density: float
    values: str | None = None


@dataclass(frozen=True)
class Manifest:
    """covered_by[c]: coordinates that c masks cover. overlap: pair -> coordinates in both, and their Jaccard index.

    k: ones of each mask; None where they differ. data: finetune -> its localization set, pinned.
    stitch: of a refit, its settings, the lambda that was chosen and the score on held-out inputs of each (disagreement
    with the finetuned models, loss or error, as `judge` says), its data, pinned, and the tensors that it refitted or
    left as they were; of RegMean all that but the lambdas; None for the mean.
    localizer, masks, covered_by and overlap are empty for a method without masks; localizer also where masks were found
    in several ways. fingerprint: of recipe and inputs. localized: finetune -> the localized checkpoint through which
    it came. outputs: file -> size in bytes and sha256, of every file but the manifest itself.
    """

    hf_locstitch: str
    method: str
    localizer: dict[str, Any] | None
    scale: float
    inputs: list[InputRecord]
    N: int
    k: int | None
    masks: dict[str, MaskRecord]
    covered_by: list[int]
    overlap: list[dict[str, Any]]
    warnings: list[str]
    versions: dict[str, str]
    fingerprint: str
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    localized: dict[str, InputRecord] = field(default_factory=dict)
    stitch: dict[str, Any] | None = None

    @property
    def is_localized(self) -> bool:
        """Whether this is the record of a localized checkpoint, not of a model."""
        return any(mask.values for mask in self.masks.values())


def make_manifest(
    plan: MergePlan, files: FileHashes, overlap: Overlap, fingerprint: str, stitch: dict[str, Any] | None = None
) -> Manifest:
    """The record without what is known only at the end: the output's files and the time."""
    return Manifest(
        hf_locstitch=__version__,
        method=plan.recipe.method,
        localizer=plan.common_localizer,
        scale=plan.recipe.scale,
        inputs=[_input_record(plan, name, checkpoint, files[name]) for name, checkpoint in plan.inputs.items()],
        localized={name: _record("localized", name, plan.finetuned[name], files[name]) for name in plan.given},
        N=plan.n,
        k=None if plan.rounded else plan.k,
        masks=_mask_records(plan, overlap) if plan.masked else {},
        covered_by=[plan.n - int(overlap.covered[1:].sum()), *overlap.covered[1:].tolist()] if plan.masked else [],
        overlap=_pairs(list(plan.finetuned), overlap.pairs) if plan.masked else [],
        warnings=list(plan.warnings),
        versions={"python": platform.python_version(), **{library: version(library) for library in LIBRARIES}},
        fingerprint=fingerprint,
        data={name: found.pinned.dump() for name, found in plan.data.items()}
        | {name: data for name, one in plan.given.items() for data in one.record.data.values()},
        stitch=stitch,
    )


def _mask_records(plan: MergePlan, overlap: Overlap) -> dict[str, MaskRecord]:
    ones = dict(zip(plan.finetuned, overlap.pairs.diagonal().tolist(), strict=True))
    return {
        name: MaskRecord(
            f"masks/{name}.safetensors",
            count,
            plan.localizers[name].density,
            count / plan.n if plan.n else 0.0,
            f"values/{name}.safetensors" if plan.target == "localized" else None,
        )
        for name, count in ones.items()
    }


def _input_record(plan: MergePlan, name: str, checkpoint: Checkpoint, files: Mapping[str, str]) -> InputRecord:
    if name in plan.given:  # the model itself, as its localized checkpoint recorded it
        return replace(plan.given[name].finetuned, name=name)
    return _record("base" if checkpoint is plan.base else "finetuned", name, checkpoint, files)


def _record(role: str, name: str, checkpoint: Checkpoint, files: Mapping[str, str]) -> InputRecord:
    return InputRecord(role, name, checkpoint.source.pinned, checkpoint.source.commit, dict(files))


def _pairs(names: Sequence[str], pairs: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
    records = []
    for i, j in combinations(range(len(names)), 2):
        both = int(pairs[i, j])
        either = int(pairs[i, i] + pairs[j, j]) - both
        records.append({"masks": [names[i], names[j]], "both": both, "jaccard": both / either if either else 0.0})
    return records


def finish(record: Manifest, stage: Path, known: Mapping[str, tuple[int, str]], seconds: float) -> Manifest:
    """The record with the output's files. known: file -> size and SHA-256, where they were found before."""
    found = {path.relative_to(stage).as_posix(): path for path in stage.rglob("*") if path.is_file()}
    outputs = {}
    for name in sorted({*found, *known}):
        size, sha256 = known.get(name) or (found[name].stat().st_size, file_sha256(found[name]))
        outputs[name] = {"size": size, "sha256": sha256}
    written = {"written": sum(entry["size"] for entry in outputs.values())}
    return replace(record, outputs=outputs, bytes=written, seconds=round(seconds, 3))


def read_manifest(folder: Path) -> Manifest | None:
    """The record that a merge left in `folder`; None if there is none that this version reads."""
    try:
        fields = json.loads((folder / FILE).read_text(encoding="utf-8"))
        fields["inputs"] = [InputRecord(**entry) for entry in fields["inputs"]]
        fields["localized"] = {name: InputRecord(**entry) for name, entry in fields.get("localized", {}).items()}
        fields["masks"] = {name: MaskRecord(**entry) for name, entry in fields["masks"].items()}
        return Manifest(**fields)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def is_intact(record: Manifest, folder: Path) -> bool:
    """Whether every file that the record names is in `folder` with its size and hash."""
    return all(
        (folder / name).is_file()
        and (folder / name).stat().st_size == entry["size"]
        and file_sha256(folder / name) == entry["sha256"]
        for name, entry in record.outputs.items()
    )


def to_json(record: Manifest) -> str:
    return json.dumps(asdict(record), indent=2, ensure_ascii=False) + "\n"


def weights_sha256(files: Mapping[str, str]) -> str:
    """One hash for a checkpoint's weights: of its shards' names and hashes."""
    return hashlib.sha256("".join(f"{file} {digest}\n" for file, digest in sorted(files.items())).encode()).hexdigest()


def pinned_recipe(plan: MergePlan, files: FileHashes) -> str:
    """YAML that makes the same again: repos at their commits, local folders by the hash of their weights."""

    def pin(name: str, checkpoint: Checkpoint) -> dict[str, str]:
        pinned = {"ref": checkpoint.source.pinned}
        return pinned if checkpoint.source.commit else {**pinned, "sha256": weights_sha256(files[name])}

    recipe = plan.recipe.model_copy(
        update={
            "base": Input(**pin("base", plan.base)),
            "localized" if plan.given else "finetuned": tuple(
                Finetuned(**pin(name, checkpoint), name=name) for name, checkpoint in plan.finetuned.items()
            ),
            "data": {name: found.pinned for name, found in plan.data.items()} or (),
            "stitch": _pinned_stitch(plan),
        }
    )
    head = f"# What made this; run it again: hf-locstitch {plan.command} locstitch.yaml --out DIR\n"
    return head + dump_recipe(recipe)


def _pinned_stitch(plan: MergePlan) -> Fitting | None:
    if plan.recipe.stitch is None:
        return None
    return plan.recipe.stitch.model_copy(
        update={"data": {name: found.pinned for name, found in plan.refit_data.items()}}
    )


def check_pins(plan: MergePlan, files: FileHashes) -> None:
    """Raises CheckpointError if an input's weights are not those that the recipe asks for, or that were localized."""
    for name, entry in zip(plan.inputs, (plan.recipe.base, *plan.recipe.entries), strict=True):
        got = weights_sha256(files[name])
        if entry.sha256 not in (None, got):
            raise CheckpointError(
                f"the weights of {plan.inputs[name].label} have sha256 {got}, but the recipe asks for {entry.sha256}: "
                "it was made from other weights. Name the right checkpoint, or drop sha256 from the recipe."
            )
    for name, one in plan.given.items():
        for file, got in files[name].items():
            if got != (due := one.record.outputs[file]["sha256"]):
                raise CheckpointError(
                    f"{one.label}/{file} is damaged: it has sha256 {got}, its manifest says {due}. Fetch it again."
                )
        if unlike := [file for file, due in one.base.files.items() if files["base"].get(file) != due]:
            got = files["base"].get(unlike[0], "absent")
            raise CheckpointError(
                f"{one.label} was localized against {one.base.ref}, whose {unlike[0]} has sha256 "
                f"{one.base.files[unlike[0]]}; in the base {plan.base.label} it is {got}. Name the base that it was "
                "localized against."
            )
