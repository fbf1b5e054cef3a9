"""Masks as files: one safetensors file a finetune, at about the entropy of a mask.

Each localized tensor is stored under its own name as uint8: the gaps between its ones in flat order (a byte each,
255 meaning "255 zeros more"), deflated with Huffman coding alone. The metadata holds the shapes.
Measured at density 5 %: 0.289 bits an element (entropy 0.286; packed bits take 1).
"""

from __future__ import annotations

import json
import math
import threading
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from psutil import virtual_memory

from hf_locstitch.artifacts.mask_source import MaskSource
from hf_locstitch.checkpoints.header import TensorInfo, TensorSpec
from hf_locstitch.checkpoints.mapped import MappedFile, read_header
from hf_locstitch.checkpoints.writer import SafetensorsWriter
from hf_locstitch.errors import CheckpointError, IntegrityError
from hf_locstitch.runtime.chunks import chunks_by_name, for_each
from hf_locstitch.runtime.parsing import parse_json

if TYPE_CHECKING:
    import torch

    from hf_locstitch.runtime import kernels

FORMAT = "hf-locstitch mask 1"
MOST_ELEMENTS = 2**48  # of a mask, empty dimensions aside

Positions = npt.NDArray[np.int64]
Coded = bytes | memoryview
Shapes = Mapping[str, tuple[int, ...]]


def encode_positions(pieces: Iterable[tuple[int, kernels.Positions]]) -> bytes:
    """Ascending flat indices, as stored. pieces: first index of each, and the offsets of its ones from there."""
    from hf_locstitch.runtime import kernels  # heavy, and not needed for plans

    deflate = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_HUFFMAN_ONLY)
    coded, last = [], -1
    for first, positions in pieces:
        if len(positions):
            span = first + int(positions[-1]) - last
            content = np.empty(len(positions) + span // kernels.ESCAPE, np.uint8)
            count = kernels.gaps(positions, last - first, content)
            last = first + int(positions[-1])
            coded.append(deflate.compress(content[:count].data))
    return b"".join(coded) + deflate.flush() if coded else b""


def iter_positions(coded: Coded, numel: int, piece: int = 1 << 20) -> Iterator[Positions]:
    """As decode_positions, a part at a time: of `piece` bytes of gaps.

    Stops inflating at the first byte beyond `numel` elements. Raises zlib.error, and ValueError if it gets there.
    """
    from hf_locstitch.runtime import kernels

    if not len(coded):
        return
    inflate, rest, last, content = zlib.decompressobj(), coded, -1, np.empty(0, np.uint8)
    while not inflate.eof:
        content = np.frombuffer(inflate.decompress(rest, piece), dtype=np.uint8)
        rest = inflate.unconsumed_tail
        if not len(content) and not rest and not inflate.eof:
            raise zlib.error("incomplete")
        positions = np.empty(len(content), np.int64)
        count, last = kernels.ones(content, last, positions).tolist()
        if last >= numel:
            raise ValueError(f"its gaps reach beyond its {numel} elements")
        yield positions[:count]
    if inflate.unused_data or (len(content) and content[-1] == kernels.ESCAPE):
        raise ValueError("something follows its last one")


def decode_positions(coded: bytes, numel: int) -> Positions:
    """Ascending flat indices among `numel` elements. Returns int64 [ones]. Raises zlib.error, ValueError."""
    return np.concatenate([np.empty(0, np.int64), *iter_positions(coded, numel)])


def mask_metadata(
    name: str, base: str, finetuned: str, localizer: Mapping[str, Any], ones: int, tensors: Sequence[TensorInfo]
) -> dict[str, str]:
    """What a mask file says about itself; safetensors metadata are strings. base, finetuned: pinned."""
    return {
        "format": FORMAT,
        "name": name,
        "base": base,
        "finetuned": finetuned,
        "localizer": json.dumps(localizer),
        "N": str(sum(info.numel for info in tensors)),
        "ones": str(ones),
        "shapes": json.dumps({info.name: info.shape for info in tensors}, separators=(",", ":")),
    }


def encode_masks(selection: MaskSource, own: Collection[str], parts: Path, workers: int) -> dict[str, tuple[int, int]]:
    """Encode the tensors named in `own` into the file `parts`. Returns where each lies: (offset, bytes)."""
    of_each = chunks_by_name(selection.names, selection.chunks)
    chunks = {name: listed for name, listed in of_each.items() if name in own}
    places: dict[str, tuple[int, int]] = {}
    lock = threading.Lock()
    with parts.open("wb") as file:

        def encode(name: str) -> None:
            coded = encode_positions((chunk.first, selection.kept(chunk).positions) for chunk in chunks[name])
            with lock:
                places[name] = file.tell(), len(coded)
                file.write(coded)

        for_each(encode, chunks, workers)
    return places


def assemble_mask(
    path: Path,
    tensors: Sequence[TensorInfo],
    encoded: Sequence[tuple[Path, Mapping[str, tuple[int, int]]]],
    metadata: Mapping[str, str],
) -> None:
    """Write the mask file from what each process encoded; the sizes are known only now."""
    located = {name: (parts, *place) for parts, places in encoded for name, place in places.items()}
    sizes = {info.name: located[info.name][2] for info in tensors}
    entries = [TensorSpec(name, "U8", (size,), size) for name, size in sizes.items()]
    with SafetensorsWriter(path, entries, metadata) as writer:
        for name, (parts, offset, size) in located.items():
            with parts.open("rb") as file:
                file.seek(offset)
                writer.write(name, file.read(size))


class ForeignMask(CheckpointError):
    """A file that is not a mask made by hf-locstitch. fault: what it is instead."""

    def __init__(self, file: str, fault: str) -> None:
        super().__init__(f"{file} is not a mask made by hf-locstitch ({fault}). Use another file.")
        self.file, self.fault = file, fault


class DamagedMask(IntegrityError):
    """fault: what is wrong with the file."""

    def __init__(self, file: str, fault: str) -> None:
        super().__init__(f"the mask {file} is damaged ({fault}). Fetch it again.")
        self.file, self.fault = file, f"damaged ({fault})"


class MaskFile:
    """A mask whose tensors are decoded on demand. shapes: of the localized tensors. ones: as the file states them.

    label: what errors call it, the path by default. Raises ForeignMask, DamagedMask. Safe to share between threads.
    """

    def __init__(self, path: Path, label: str | None = None) -> None:
        self.label = label or str(path)
        try:
            header = read_header(path, self.label)
        except (CheckpointError, OSError) as error:
            raise DamagedMask(self.label, str(error)) from error
        if (form := header.metadata.get("format")) != FORMAT:
            raise ForeignMask(self.label, f"format {form!r}, expected {FORMAT!r}")
        try:
            self.shapes = parse_shapes(header.metadata)
            self.ones = int(header.metadata["ones"])
            self._coded = {info.name: _checked(info) for info in header.tensors}
            if int(header.metadata["N"]) != self.N or not 0 <= self.ones <= self.N:
                raise ValueError(f"N = {header.metadata['N']} and ones = {self.ones} for {self.N} elements")
        except KeyError as error:
            raise DamagedMask(self.label, f"its metadata lacks {error.args[0]!r}") from error
        except ValueError as error:
            raise DamagedMask(self.label, str(error)) from error
        if self._coded.keys() != self.shapes.keys():
            at = min(self._coded.keys() ^ self.shapes.keys())
            raise DamagedMask(self.label, f"its metadata and its tensors disagree on {at}")
        self._file = MappedFile(path)

    @property
    def N(self) -> int:
        """Elements that it ranges over."""
        return sum(map(math.prod, self.shapes.values()))

    def close(self) -> None:
        """Nothing more is read."""
        self._file.close()

    def iter_positions(self, tensor: str) -> Iterator[Positions]:
        """Ascending flat indices of a tensor's ones, a part at a time. Raises KeyError for a tensor it lacks."""
        numel, info, count = math.prod(self.shapes[tensor]), self._coded[tensor], 0
        try:
            for positions in iter_positions(self._file.raw(info.start, info.stop), numel):
                if (count := count + len(positions)) > self.ones:
                    raise ValueError(f"{count} ones or more, where the whole mask has {self.ones}")
                yield positions
        except (zlib.error, ValueError) as error:
            raise DamagedMask(self.label, f"in {tensor}: {error}") from error

    def positions(self, tensor: str) -> Positions:
        """All of them. Returns int64 [ones]."""
        return np.concatenate([np.empty(0, np.int64), *self.iter_positions(tensor)])

    def mask(self, tensor: str) -> torch.Tensor:
        """Returns bool [*shape]."""
        import torch

        try:
            mask = np.zeros(math.prod(self.shapes[tensor]), dtype=bool)  # memory is taken where ones are set only
        except MemoryError as error:
            raise _too_large(self, "this process may not use so much memory") from error
        for positions in self.iter_positions(tensor):
            mask[positions] = True
        return torch.from_numpy(mask).reshape(self.shapes[tensor])


def parse_shapes(metadata: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """The localized tensors' shapes, as a mask file states them. Raises ValueError, KeyError."""
    shapes = parse_json(metadata["shapes"].encode())
    if not isinstance(shapes, dict):
        raise ValueError("its shapes are no mapping of tensors")
    for name, shape in shapes.items():
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"the shape of {name} is no list of sizes")
    if sum(math.prod(size or 1 for size in shape) for shape in shapes.values()) > MOST_ELEMENTS:
        raise ValueError(f"its shapes have more than {MOST_ELEMENTS:,} elements")
    return {name: tuple(shape) for name, shape in shapes.items()}


def _checked(info: TensorInfo) -> TensorInfo:
    if info.dtype != "U8" or len(info.shape) != 1:
        raise ValueError(f"{info.name} is {info.dtype} {list(info.shape)}, expected U8 [bytes]")
    return info


def load_mask(ref: str | Path, name: str | None = None) -> dict[str, torch.Tensor]:
    """The mask of one finetune: tensor name on disk -> bool tensor of that tensor's shape.

    ref: a mask file; or a localized checkpoint or merged model (a folder, org/name or org/name@revision), together
    with the finetune's name if it has several masks.
    Raises CheckpointError if there is no such mask, IntegrityError if the file is damaged.
    """
    path = Path(ref)
    mask = _mask_in(str(ref), name) if name is not None or not path.is_file() else MaskFile(path)
    free = virtual_memory().available
    if free < mask.N:
        raise _too_large(mask, f"{free:,} bytes of memory are free")
    loaded = {tensor: mask.mask(tensor) for tensor in mask.shapes}
    if (ones := sum(np.count_nonzero(values.numpy()) for values in loaded.values())) != mask.ones:
        raise DamagedMask(mask.label, f"{ones} ones, its metadata says {mask.ones}")
    return loaded


def _too_large(mask: MaskFile, why: str) -> CheckpointError:
    return CheckpointError(
        f"the mask {mask.label} ranges over {mask.N:,} elements, which take as many bytes as bool tensors, but {why}. "
        "Use a machine with more memory; load_localized reads the mask of a localized checkpoint a tensor at a time."
    )


def _mask_in(ref: str, name: str | None) -> MaskFile:
    from hf_locstitch.artifacts.manifest import FILE, open_manifest
    from hf_locstitch.checkpoints.checkpoint import open_source
    from hf_locstitch.checkpoints.ref import parse_ref

    source = open_source(parse_ref(ref))
    record = open_manifest(source) if FILE in source.files else None
    files = {Path(file).stem: file for file in sorted(source.files) if file.startswith("masks/")}
    files |= {finetune: mask.file for finetune, mask in (record.masks if record else {}).items()}
    names = sorted(files)
    if name is None and len(set(files.values())) == 1:
        name = names[0]
    if name not in names:
        raise CheckpointError(
            f"{source.label} has no mask {name!r}: "
            + (f"it has {', '.join(names)}. Use one of them." if names else "it was not made by hf-locstitch.")
        )
    mask = MaskFile(source.fetch(files[name]), f"{source.label}/{files[name]}")
    if record and name in record.masks and (due := (record.N, record.masks[name].ones)) != (mask.N, mask.ones):
        raise DamagedMask(mask.label, f"(N, ones) = {mask.N, mask.ones}, its manifest says {due}")
    return mask
