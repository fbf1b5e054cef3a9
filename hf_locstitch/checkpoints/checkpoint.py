"""A model's weights as described by its headers: which tensor lies where. Only safetensors are ever opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_locstitch.checkpoints.folder import FolderSource
from hf_locstitch.checkpoints.header import Header, TensorInfo, header_length, parse_header
from hf_locstitch.checkpoints.ref import Ref
from hf_locstitch.checkpoints.source import Source
from hf_locstitch.checkpoints.tensor_file import TensorFile
from hf_locstitch.errors import CheckpointError
from hf_locstitch.runtime.parsing import JSON_BYTES, front_matter, parse_json, parse_yaml

STEMS = ("model", "diffusion_pytorch_model")  # of weight files, of transformers and of diffusers
CONFIG = "config.json"
QUANTIZATION = "quantization_config"  # a field of it
CARD = "README.md"
Config = Mapping[str, Any]  # of config.json
CARD_BYTES = 10_000_000  # of a README.md
FIRST_READ = 100_000  # bytes; most headers fit, as the Hub's own client assumes


def single_file(stem: str) -> str:
    """Of a model whose weights are in one file."""
    return f"{stem}.safetensors"


def index_file(stem: str) -> str:
    """Of one whose weights are in several: it says which tensor is where."""
    return f"{stem}.safetensors.index.json"


SINGLE, INDEX = single_file(STEMS[0]), index_file(STEMS[0])


@dataclass(frozen=True)
class Shard:
    """One safetensors file. size: bytes."""

    file: str
    size: int
    header: Header

    def stored(self, start: int, stop: int) -> list[tuple[str, int, int]]:
        """Which bytes of which files are needed for bytes start … stop of a tensor: the first are its own, and others
        belong to it as a whole."""
        return [(self.file, start, stop)]

    def opened(self, files: Mapping[str, TensorFile]) -> TensorFile:
        """What its tensors are read from. files: open, by name."""
        return files[self.file]


@dataclass(frozen=True)
class Checkpoint:
    """tensors: name on disk -> (shard, where in it), in the order of the shards and of their bytes.

    config: of config.json. card: the metadata at the head of README.md. Either may be empty. renamed: names of tensors
    that the files have under others -> those. recut: a tensor that is put together of others, or is a part of another
    -> one of those. dequantized: from what its bfloat16 tensors are computed; else empty.
    """

    source: Source
    shards: tuple[Shard, ...]
    config: Config
    card: Mapping[str, Any]
    tensors: Mapping[str, tuple[Shard, TensorInfo]] = field(repr=False)
    renamed: Mapping[str, str] = field(default_factory=dict, repr=False, kw_only=True)
    recut: Mapping[str, str] = field(default_factory=dict, repr=False, kw_only=True)
    dequantized: str = field(default="", kw_only=True)

    @property
    def label(self) -> str:
        return self.source.label

    @property
    def files(self) -> tuple[str, ...]:
        """The files that the values of its tensors come from."""
        return tuple(shard.file for shard in self.shards)

    @property
    def layout(self) -> Checkpoint:
        """The checkpoint whose files, config and tokenizer a model with these tensors has."""
        return self

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors, by name."""
        return {name: tuple(info.shape) for name, (_, info) in self.tensors.items()}

    def info(self, name: str) -> TensorInfo:
        return self.tensors[name][1]


def open_source(ref: Ref) -> Source:
    """Raises CheckpointError if nothing is there, or it is not accessible."""
    whole = FolderSource(ref.folder) if ref.folder is not None else _open_repo(ref)
    if not ref.path:
        return whole
    from hf_locstitch.checkpoints.part_source import PartSource

    return PartSource(whole, ref.path)


def _open_repo(ref: Ref) -> Source:
    from hf_locstitch.checkpoints.hub import open_repo  # heavy, and not needed for folders

    return open_repo(str(ref.repo), ref.revision)


def read_shard(source: Source, file: str) -> Shard:
    """The header of a safetensors file. Raises CheckpointError."""
    where, size = f"{source.label}/{file}", source.files[file].size
    raw = source.read_start(file, min(FIRST_READ, size))
    if (needed := header_length(raw, size, where)) > len(raw):
        raw = source.read_start(file, needed)
    return Shard(file, size, parse_header(raw, size, where))


def read_json(source: Source, file: str) -> dict[str, Any]:
    """A small JSON object of the source. Raises CheckpointError if it is not one."""
    content = _read_json(source, file)
    if not isinstance(content, dict):
        raise CheckpointError(f"{source.label}/{file} must hold a JSON object, but holds a {type(content).__name__}.")
    return content


def read_json_list(source: Source, file: str) -> list[Any]:
    """Likewise a list."""
    content = _read_json(source, file)
    if not isinstance(content, list):
        raise CheckpointError(f"{source.label}/{file} must hold a JSON list, but holds a {type(content).__name__}.")
    return content


def _read_json(source: Source, file: str) -> Any:
    if (size := source.files[file].size) > JSON_BYTES:
        raise CheckpointError(
            f"{source.label}/{file} has {size:,} bytes, more than the {JSON_BYTES:,} that are read of such a file. "
            "It is not one that a model needs: use another checkpoint."
        )
    try:
        return parse_json(source.fetch(file).read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{source.label}/{file} is not valid JSON ({error}). Fetch it again.") from error


def read_card(source: Source) -> dict[str, Any]:
    """The metadata at the head of README.md; empty if there is none."""
    if CARD not in source.files or source.files[CARD].size > CARD_BYTES:
        return {}
    try:
        fields = parse_yaml(front_matter(source.fetch(CARD).read_text(encoding="utf-8-sig")))
    except ValueError:
        return {}  # a card that does not parse is ignored
    return fields if isinstance(fields, dict) else {}
