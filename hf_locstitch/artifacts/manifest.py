"""The record of a merge, locstitch.json: its types, and the one way to read it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic asks for this one before Python 3.12

from hf_locstitch.checkpoints.names import SafeFile, SafeName
from hf_locstitch.checkpoints.source import Source, file_sha256
from hf_locstitch.errors import CheckpointError
from hf_locstitch.runtime.parsing import JSON_BYTES

FILE = "locstitch.json"
RECIPE_FILE = "locstitch.yaml"  # reproduces the merge
Count = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Pair(TypedDict):
    masks: tuple[str, str]
    both: Count
    jaccard: Share


class _File(TypedDict):
    size: Count
    sha256: str


def _checked(form: type) -> AfterValidator:
    """The value itself, once it has been validated as of this form."""
    adapter = TypeAdapter(form)

    def check(value: dict[str, Any]) -> dict[str, Any]:
        adapter.validate_python(value)
        return value

    return AfterValidator(check)


Pair = Annotated[dict[str, Any], _checked(_Pair)]
OutputFile = Annotated[dict[str, Any], _checked(_File)]


JOINT = "joint"  # the name of a mask that all finetunes share


def mask_file(name: str) -> str:
    return f"masks/{name}.safetensors"


def values_file(name: str) -> str:
    return f"values/{name}.safetensors"


@dataclass(frozen=True)
class InputRecord:
    """ref: org/name@commit, or ./folder for a local one, whose path stays private. files: shard -> sha256."""

    role: str
    name: SafeName
    ref: str
    commit: str | None
    files: dict[SafeFile, str]


@dataclass(frozen=True)
class MaskRecord:
    """density: as requested; real_density = ones / N. examples: of the localization set that it was found with, if any.

    values: file of the finetuned values under the mask, in a localized checkpoint; a model holds them itself. refitted:
    of a stitch, whether they were solved for again in the localized checkpoint that they are from.
    """

    file: str
    ones: Count
    density: Share | None
    real_density: Share
    values: str | None = None
    examples: int | None = None
    refitted: bool = False


@dataclass(frozen=True)
class Manifest:
    """covered_by[c]: coordinates that c masks cover. overlap: pair -> coordinates in both, and their Jaccard index.

    k: ones of each mask; None where they differ. data: finetune -> its localization set, pinned.
    stitch: of a refit, its settings, the chosen lambda and the score of each candidate on held-out inputs (disagreement
    with the finetuned models, loss or error, as `judge` says), its data, pinned, and the tensors that it refitted or
    left as they were; for RegMean all of this except the lambdas; None for the mean.
    localizer, masks, covered_by and overlap are empty for a method without masks; localizer also where masks were found
    in several ways. fingerprint: of recipe and inputs. localized: finetune -> the localized checkpoint through which
    it came. vocabulary: tokens and rows of embeddings and heads, where they are not simply the base's, or another's.
    outputs: file -> size in bytes and sha256, of every file but the manifest itself.
    """

    hf_locstitch: str
    method: str
    localizer: dict[str, Any] | None
    scale: float
    inputs: list[InputRecord]
    N: Count
    k: Count | None
    masks: dict[SafeName, MaskRecord]
    covered_by: list[Count]
    overlap: list[Pair]
    warnings: list[str]
    versions: dict[str, str]
    fingerprint: str
    outputs: dict[SafeFile, OutputFile] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    localized: dict[SafeName, InputRecord] = field(default_factory=dict)
    stitch: dict[str, Any] | None = None
    vocabulary: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError if a mask's file is not the one that its name gives it."""
        for name, mask in self.masks.items():
            if mask.file not in (mask_file(name), mask_file(JOINT)) or mask.values not in (None, values_file(name)):
                raise ValueError(f"the mask {name} must be in {mask_file(name)}, its values in {values_file(name)}")

    @property
    def is_localized(self) -> bool:
        """Whether this is the record of a localized checkpoint, not of a model."""
        return any(mask.values for mask in self.masks.values())


def told(record: Manifest) -> Manifest:
    """The record for people: where all finetunes share a joint mask, it is one mask, and overlaps with nothing."""
    files = {mask.file for mask in record.masks.values()}
    if files != {mask_file(JOINT)} or JOINT in _finetunes(record):
        return record
    mask = next(iter(record.masks.values()))
    covered = [record.N - mask.ones, mask.ones]
    return replace(record, masks={JOINT: mask}, covered_by=covered, overlap=[])


def open_manifest(source: Source) -> Manifest:
    """Raises CheckpointError if the source was not made by hf-locstitch."""
    if FILE not in source.files:
        raise CheckpointError(
            f"{source.label} has no {FILE}, so it was not made by hf-locstitch. Give the folder or repo of a merge "
            "or of a localized checkpoint."
        )
    if (size := source.files[FILE].size) > JSON_BYTES:
        raise CheckpointError(
            f"{source.label}/{FILE} has {size:,} bytes, more than the {JSON_BYTES:,} that are read: it is no manifest "
            "of a merge. Use another one."
        )
    return parse_manifest(source.fetch(FILE).read_bytes(), f"{source.label}/{FILE}")


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Raises CheckpointError naming `where`."""
    try:
        record = TypeAdapter(Manifest).validate_json(content)
        _check_inputs(record)
    except ValueError as error:
        raise CheckpointError(
            f"{where} is not a manifest that this version can read ({_fault(error)}). Fetch it again."
        ) from error
    return record


def _fault(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(str(part) for part in first['loc']) or 'the whole file'}: {first['msg']}"


def _finetunes(record: Manifest) -> list[str]:
    return [entry.name for entry in record.inputs if entry.role != "base"]


def _check_inputs(record: Manifest) -> None:
    """Raises ValueError unless there is one base, and the finetunes have different names."""
    names = _finetunes(record)
    if len(record.inputs) != len(names) + 1 or len({"base", *names}) != len(record.inputs):
        raise ValueError("inputs: they must be one base, and finetunes of different names")


def check_names(record: Manifest) -> None:
    """Raises ValueError unless masks and their overlaps are those of the inputs."""
    if unknown := sorted(record.masks.keys() - set(_finetunes(record))):
        raise ValueError(f"masks: {unknown[0]} is not one of the inputs")
    if unknown := sorted({name for pair in record.overlap for name in pair["masks"]} - record.masks.keys()):
        raise ValueError(f"overlap: {unknown[0]} is not one of the masks")


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
