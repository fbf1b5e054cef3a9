"""A model's weights as its headers tell: which tensor lies where. Only safetensors are ever opened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NoReturn

from yaml import YAMLError

from hf_locstitch.checkpoints.folder import FolderSource
from hf_locstitch.checkpoints.header import Header, TensorInfo, header_length, parse_header
from hf_locstitch.checkpoints.ref import Ref
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.errors import CheckpointError
from hf_locstitch.runtime.human import some

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FIRST_READ = 100_000  # bytes; most headers fit, as the Hub's own client assumes

# What a repo may hold instead of safetensors, and what its owner can do about it.
UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
REMEDY_UNSAFE = (
    "Convert it first: load it with transformers and call save_pretrained(), "
    "or use the converter at https://huggingface.co/spaces/safetensors/convert"
)


@dataclass(frozen=True)
class Shard:
    """One safetensors file. size: bytes."""

    file: str
    size: int
    header: Header


@dataclass(frozen=True)
class Checkpoint:
    """tensors: name on disk -> (shard, where in it), in the order of the shards and of their bytes.

    config: of config.json. card: the metadata at the head of README.md. Either may be empty.
    """

    source: Source
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    card: Mapping[str, Any]
    tensors: Mapping[str, tuple[Shard, TensorInfo]] = field(repr=False)

    @property
    def label(self) -> str:
        return self.source.label

    def info(self, name: str) -> TensorInfo:
        return self.tensors[name][1]


def open_source(ref: Ref) -> Source:
    """Raises CheckpointError if there is nothing there, or not for us."""
    if ref.folder is not None:
        return FolderSource(ref.folder)
    from hf_locstitch.checkpoints.hub import open_repo  # heavy, and not needed for folders

    return open_repo(str(ref.repo), ref.revision)


def open_checkpoint(ref: Ref) -> Checkpoint:
    """Read the headers (and nothing else) of what `ref` names. Raises CheckpointError."""
    return read_checkpoint(open_source(ref))


def read_checkpoint(source: Source) -> Checkpoint:
    config = _config(source)
    _refuse_quantized(source, config)
    files = _weight_files(source)
    with ThreadPoolExecutor(min(8, len(files))) as pool:
        shards = tuple(pool.map(lambda file: read_shard(source, file), files))
    tensors: dict[str, tuple[Shard, TensorInfo]] = {}
    for shard in shards:
        for info in shard.header.tensors:
            if info.name in tensors:
                raise CheckpointError(
                    f"{source.label} holds {info.name} twice, in {tensors[info.name][0].file} and in {shard.file}. "
                    "Save the model again with save_pretrained()."
                )
            tensors[info.name] = (shard, info)
    _check_index(source, tensors)
    return Checkpoint(source, shards, config, read_card(source), tensors)


def read_shard(source: Source, file: str) -> Shard:
    """The header of a safetensors file. Raises CheckpointError."""
    where, size = f"{source.label}/{file}", source.files[file].size
    raw = source.read_start(file, min(FIRST_READ, size))
    if (needed := header_length(raw, size, where)) > len(raw):
        raw = source.read_start(file, needed)
    return Shard(file, size, parse_header(raw, size, where))


def read_json(source: Source, file: str) -> dict[str, Any]:
    """A small JSON object of the source. Raises CheckpointError if it is none."""
    try:
        content = json.loads(source.fetch(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{source.label}/{file} is not valid JSON ({error}). Fetch it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{source.label}/{file} should hold a JSON object, not {type(content).__name__}.")
    return content


def _config(source: Source) -> dict[str, Any]:
    return read_json(source, "config.json") if "config.json" in source.files else {}


def read_card(source: Source) -> dict[str, Any]:
    """The metadata at the head of README.md; empty if there is none."""
    if "README.md" not in source.files:
        return {}
    from huggingface_hub.repocard import metadata_load

    try:
        return metadata_load(source.fetch("README.md")) or {}
    except (ValueError, YAMLError):
        return {}  # a card that does not parse hinders nobody


def _refuse_quantized(source: Source, config: Mapping[str, Any]) -> None:
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown method") if isinstance(quantization, dict) else quantization
        raise CheckpointError(
            f"{source.label} is quantized ({method}); task vectors need the full weights. "
            "Name the unquantized checkpoint it was made from."
        )


def _weight_files(source: Source) -> list[str]:
    """The files that hold the weights, in order; the index decides where there is one, as in transformers."""
    files = source.files
    if SINGLE in files:
        return [SINGLE]
    if INDEX in files:
        weight_map = read_json(source, INDEX).get("weight_map") or {}
        shards = sorted(set(weight_map.values()))
        if absent := [shard for shard in shards if shard not in files]:
            raise CheckpointError(f"{source.label} lacks {some(absent)}, which its {INDEX} names. Fetch it again.")
        if shards:
            return shards
    if "adapter_config.json" in files:
        raise CheckpointError(
            f"{source.label} is a PEFT adapter without its base's weights. Merge it first: "
            "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder), and name the folder."
        )
    loose = [file for file in files if file.endswith(".safetensors") and "/" not in file]
    if len(loose) == 1:
        return loose
    _raise_no_weights(source, loose)


def _raise_no_weights(source: Source, loose: list[str]) -> NoReturn:
    if any(file.startswith("values/") for file in source.files) and "locstitch.json" in source.files:
        raise CheckpointError(
            f"{source.label} is a localized checkpoint, not a whole model. Put it into its base: "
            "hf-locstitch stitch --base REF --localized REF... --out DIR."
        )
    if loose:
        raise CheckpointError(
            f"{source.label} has {len(loose)} safetensors files ({some(loose)}) but neither {SINGLE} nor {INDEX}, "
            "so which of them make up the model is unknown. Save the model again with save_pretrained()."
        )
    if gguf := [file for file in source.files if file.endswith(".gguf")]:
        raise CheckpointError(
            f"{source.label} holds GGUF weights only ({some(gguf)}), which are quantized. "
            "Name the safetensors checkpoint they were made from."
        )
    if unsafe := [file for file in source.files if file.endswith(UNSAFE_SUFFIXES)]:
        raise CheckpointError(
            f"{source.label} holds no safetensors, only {some(unsafe)}; such files can run code when loaded "
            f"and are never opened. {REMEDY_UNSAFE}."
        )
    raise CheckpointError(f"{source.label} holds no weights (no {SINGLE}, no {INDEX}). Check the name.")


def _check_index(source: Source, tensors: Mapping[str, tuple[Shard, TensorInfo]]) -> None:
    if SINGLE in source.files or INDEX not in source.files:
        return
    weight_map = read_json(source, INDEX)["weight_map"]
    if absent := [name for name in weight_map if name not in tensors]:
        raise CheckpointError(
            f"{source.label}: {INDEX} names {len(absent)} tensors that no shard holds ({some(absent)}). Fetch it again."
        )
