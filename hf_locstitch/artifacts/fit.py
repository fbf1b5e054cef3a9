"""Whether localized checkpoints fit a base and one another, judging by headers and manifests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from hf_locstitch.artifacts.manifest import InputRecord
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.runtime.human import more


class Localized(Protocol):
    """A finetune with its mask, wherever that and the values are. base: what it was localized against."""

    @property
    def label(self) -> str: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def base(self) -> InputRecord: ...


def localized_mismatches(base: Checkpoint, checkpoint: Localized) -> Iterator[str]:
    """Why the base is not the one that was localized against, judging by headers."""
    if missing := [name for name in checkpoint.shapes if name not in base.tensors]:
        yield f"{checkpoint.label} has {missing[0]}, which the base {base.label} lacks{more(len(missing))}"
    shared = [(base.info(name), shape) for name, shape in checkpoint.shapes.items() if name in base.tensors]
    if wrong := [(info, shape) for info, shape in shared if info.shape != shape or not info.floating]:
        info, shape = wrong[0]
        yield (
            f"{info.name} is {list(shape)} in {checkpoint.label} but {info.dtype} {list(info.shape)} in the base "
            f"{base.label}{more(len(wrong))}"
        )
    if base.source.pinned == checkpoint.base.ref and checkpoint.base.commit is not None:
        return
    known = {shard.file: base.source.files[shard.file].sha256 for shard in base.shards}
    due = checkpoint.base.files
    unlike = sorted(known.keys() ^ due.keys()) or [file for file in due if known[file] not in (None, due[file])]
    if unlike:  # the hashes of a local folder are known only once it is read
        yield (
            f"{checkpoint.label} was localized against {checkpoint.base.ref}, where {unlike[0]} is "
            f"{_hash(due.get(unlike[0], 'absent'))}; in the base {base.label} it is "
            f"{_hash(known.get(unlike[0], 'absent'))}. Use the base that it was localized against"
        )


def _hash(value: str | None) -> str:
    return "present" if value is None else value if value == "absent" else f"sha256 {value[:12]}…"


def unlike(localized: Sequence[Localized]) -> Iterator[str]:
    """Why localized checkpoints cannot be stitched together."""
    first = localized[0]
    for other in localized[1:]:
        if other.base.files != first.base.files:
            yield (
                f"{first.label} was localized against the base {first.base.ref}, {other.label} against {other.base.ref}"
            )
        if apart := sorted(other.shapes.keys() ^ first.shapes.keys()):
            has, lacks = (other, first) if apart[0] in other.shapes else (first, other)
            yield (
                f"the mask of {has.label} ranges over {apart[0]}, that of {lacks.label} does not{more(len(apart))}: "
                "localize them with the same --include and --exclude"
            )
