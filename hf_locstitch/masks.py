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
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hf_locstitch import kernels
from hf_locstitch.checkpoints.writer import SafetensorsWriter
from hf_locstitch.chunks import chunks_by_name, for_each
from hf_locstitch.errors import CheckpointError, IntegrityError
from hf_locstitch.kernels import ESCAPE

if TYPE_CHECKING:
    import torch

    from hf_locstitch.checkpoints.header import TensorInfo
    from hf_locstitch.localize.selection import Keeper
    from hf_locstitch.plan import MergePlan

FORMAT = "hf-locstitch mask 1"

Positions = npt.NDArray[np.int64]


def encode_positions(pieces: Iterable[tuple[int, kernels.Positions]]) -> bytes:
    """Ascending flat indices, as stored. pieces: first index of each, and how far behind it the ones lie."""
    deflate = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_HUFFMAN_ONLY)
    coded, last = [], -1
    for first, positions in pieces:
        if len(positions):
            span = first + int(positions[-1]) - last
            content = np.empty(len(positions) + span // ESCAPE, np.uint8)
            count = kernels.gaps(positions, last - first, content)
            last = first + int(positions[-1])
            coded.append(deflate.compress(content[:count].data))
    return b"".join(coded) + deflate.flush() if coded else b""


def decode_positions(coded: bytes) -> Positions:
    """Ascending flat indices. Returns int64 [ones]."""
    content = np.frombuffer(zlib.decompress(coded) if coded else b"", dtype=np.uint8)
    ends = np.flatnonzero(content != ESCAPE)
    return np.cumsum(content, dtype=np.int64)[ends] + np.arange(len(ends))


def iter_positions(coded: bytes, piece: int = 1 << 20) -> Iterator[Positions]:
    """As decode_positions, a part at a time: of `piece` bytes of gaps. Raises zlib.error if the end is missing."""
    if not coded:
        return
    inflate, rest, total, count = zlib.decompressobj(), coded, 0, 0
    while not inflate.eof:
        content = np.frombuffer(inflate.decompress(rest, piece), dtype=np.uint8)
        rest = inflate.unconsumed_tail
        if not len(content) and not rest and not inflate.eof:
            raise zlib.error("incomplete")
        ends = np.flatnonzero(content != ESCAPE)
        yield np.cumsum(content, dtype=np.int64)[ends] + total + count + np.arange(len(ends))
        total, count = total + int(content.sum(dtype=np.int64)), count + len(ends)


def mask_metadata(plan: MergePlan, name: str, ones: int) -> dict[str, str]:
    """What a mask file says about itself; safetensors metadata are texts."""
    return {
        "format": FORMAT,
        "name": name,
        "base": plan.base.source.pinned,
        "finetuned": plan.origins[name],
        "localizer": json.dumps(plan.localizers[name].model_dump(mode="json")),
        "N": str(plan.n),
        "ones": str(ones),
        "shapes": json.dumps({info.name: info.shape for info in plan.localized}, separators=(",", ":")),
    }


def encode_masks(selection: Keeper, own: Collection[str], parts: Path, workers: int) -> dict[str, tuple[int, int]]:
    """Encode the tensors named in `own` into the file `parts`. Returns where each lies: (offset, bytes)."""
    of_each = chunks_by_name(selection.names, selection.chunks)
    chunks = {name: found for name, found in of_each.items() if name in own}
    places: dict[str, tuple[int, int]] = {}
    lock = threading.Lock()
    with parts.open("wb") as file:

        def encode(name: str) -> None:
            coded = encode_positions((chunk.first, selection.kept(chunk).ascending()) for chunk in chunks[name])
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
    """Lay the mask file out from what each process encoded; the sizes are known only now."""
    found = {name: (parts, *place) for parts, places in encoded for name, place in places.items()}
    entries = [(info.name, "U8", (found[info.name][2],), found[info.name][2]) for info in tensors]
    with SafetensorsWriter(path, entries, metadata) as writer:
        for name, (parts, offset, size) in found.items():
            with parts.open("rb") as file:
                file.seek(offset)
                writer.write(name, file.read(size))


def load_mask(ref: str | Path, name: str | None = None) -> dict[str, torch.Tensor]:
    """The mask of one finetune: tensor name on disk -> bool tensor of that tensor's shape.

    ref: a mask file; or a localized checkpoint or merged model (a folder, org/name or org/name@revision), together
    with the finetune's name if it has several masks.
    Raises CheckpointError if there is no such mask, IntegrityError if the file is damaged.
    """
    path = Path(ref)
    if name is not None or not path.is_file():
        path = _mask_in(str(ref), name)
    return read_mask(path)


def _mask_in(ref: str, name: str | None) -> Path:
    from hf_locstitch.checkpoints.checkpoint import open_source
    from hf_locstitch.checkpoints.ref import parse_ref

    source = open_source(parse_ref(ref))
    names = sorted(Path(file).stem for file in source.files if file.startswith("masks/"))
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        raise CheckpointError(
            f"{source.label} has no mask {name!r}: "
            + (f"it has {', '.join(names)}. Name one of them." if names else "it was not made by hf-locstitch.")
        )
    return source.fetch(f"masks/{name}.safetensors")


def read_mask(path: Path) -> dict[str, torch.Tensor]:
    """As load_mask, from a file."""
    import torch

    masks = {}
    for tensor, (shape, positions) in read_positions(path).items():
        mask = torch.zeros(math.prod(shape), dtype=torch.bool)
        mask[torch.from_numpy(positions)] = True
        masks[tensor] = mask.reshape(shape)
    return masks


def read_positions(path: Path) -> Mapping[str, tuple[tuple[int, ...], Positions]]:
    """Shape and flat indices of the ones, for each tensor of a mask file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path} is no mask of hf-locstitch (format {metadata.get('format')!r}, due {FORMAT!r})."
                )
            shapes = json.loads(metadata["shapes"])
            found = {t: (tuple(shape), decode_positions(file.get_tensor(t).tobytes())) for t, shape in shapes.items()}
    except (SafetensorError, zlib.error, KeyError, ValueError) as error:
        raise IntegrityError(f"the mask {path} is damaged ({error}). Fetch it again.") from error
    for tensor, (shape, positions) in found.items():
        if len(positions) and positions[-1] >= math.prod(shape):
            raise IntegrityError(
                f"the mask {path} is damaged: a one at {positions[-1]} of {tensor}, which has {math.prod(shape)} "
                "elements. Fetch it again."
            )
    return found
