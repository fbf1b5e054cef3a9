"""Whether localized checkpoints fit a base and one another, judging by headers and manifests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hf_locstitch.artifacts.localized_checkpoint import LocalizedCheckpoint
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.runtime.human import more


def localized_mismatches(base: Checkpoint, one: LocalizedCheckpoint) -> Iterator[str]:
    """Why the base is not the one that was localized against, judging by headers."""
    if missing := [name for name in one.shapes if name not in base.tensors]:
        yield f"{one.label} has {missing[0]}, which the base {base.label} lacks{more(len(missing))}"
    shared = [(base.info(name), shape) for name, shape in one.shapes.items() if name in base.tensors]
    if wrong := [(info, shape) for info, shape in shared if info.shape != shape or not info.floating]:
        info, shape = wrong[0]
        yield (
            f"{info.name} is {list(shape)} in {one.label} but {info.dtype} {list(info.shape)} in the base "
            f"{base.label}{more(len(wrong))}"
        )
    if base.source.pinned == one.base.ref and one.base.commit is not None:
        return
    known = {shard.file: base.source.files[shard.file].sha256 for shard in base.shards}
    due = one.base.files
    unlike = sorted(known.keys() ^ due.keys()) or [file for file in due if known[file] not in (None, due[file])]
    if unlike:  # the hashes of a local folder are known only once it is read
        yield (
            f"{one.label} was localized against {one.base.ref}, where {unlike[0]} is "
            f"{_hash(due.get(unlike[0], 'absent'))}; in the base {base.label} it is "
            f"{_hash(known.get(unlike[0], 'absent'))}. Use the base that it was localized against"
        )


def _hash(value: str | None) -> str:
    return "present" if value is None else value if value == "absent" else f"sha256 {value[:12]}…"


def unlike(localized: Sequence[LocalizedCheckpoint]) -> Iterator[str]:
    """Why localized checkpoints cannot be stitched together."""
    first = localized[0]
    for one in localized[1:]:
        if one.base.files != first.base.files:
            yield f"{first.label} was localized against the base {first.base.ref}, {one.label} against {one.base.ref}"
        if apart := sorted(one.shapes.keys() ^ first.shapes.keys()):
            has, lacks = (one, first) if apart[0] in one.shapes else (first, one)
            yield (
                f"the mask of {has.label} ranges over {apart[0]}, that of {lacks.label} does not{more(len(apart))}: "
                "localize them with the same --include and --exclude"
            )
