"""The tensors of a model and the layers that they are in; and settings that follow them, as numbers by globs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape

from hf_locstitch.checkpoints.localizable import BLOCKS, localizable
from hf_locstitch.checkpoints.opening import open_checkpoint
from hf_locstitch.checkpoints.ref import parse_ref
from hf_locstitch.plan.mergekit.config import Branch
from hf_locstitch.stitch.per_tensor import PerTensor


@dataclass(frozen=True)
class Layout:
    """names: of the tensors that are merged. stacks: of layers, by what their names begin with up to the number, the
    names in each layer."""

    names: tuple[str, ...]
    stacks: Mapping[str, Mapping[int, tuple[str, ...]]]


def read_layout(ref: str) -> Layout:
    """From headers. Raises RecipeError, CheckpointError."""
    model = open_checkpoint(parse_ref(ref))
    return layout_of(localizable((info for _, info in model.tensors.values()), ("*",), ()))


def layout_of(names: Sequence[str]) -> Layout:
    stacks: dict[str, dict[int, tuple[str, ...]]] = {}
    for name in names:
        if found := BLOCKS.search(name):
            start, _, number = name[: found.end() - 1].rpartition(".")
            layers = stacks.setdefault(f"{start}.", {})
            layers[int(number)] = (*layers.get(int(number), ()), name)
    return Layout(tuple(names), stacks)


def by_globs(branches: Sequence[Branch], default: float | None, layout: Layout) -> tuple[PerTensor, list[str]]:
    """A setting by globs of tensors, and the names of tensors that it leaves out, if it has no default.

    The first branch whose filter is in a tensor's name counts. Values that are spread over the layers begin with the
    first layer and end with the last; tensors outside have the first value.
    """
    globs: dict[str, float] = {}
    left = list(layout.names)
    for branch in branches:
        matching = [name for name in left if branch.filter is None or branch.filter in name]
        for glob, value in _globs(branch, matching, layout):
            globs.setdefault(glob, value)
        left = [name for name in left if name not in matching]
    if left and default is not None:
        globs["*"] = default
        left = []
    return globs, left


def _globs(branch: Branch, matching: Sequence[str], layout: Layout) -> Iterator[tuple[str, float]]:
    wanted, first = set(matching), branch.values[0]
    if len(branch.values) > 1:
        for start, layers in layout.stacks.items():
            last = max(layers)
            for number, names in sorted(layers.items()):
                inside = [name for name in names if name in wanted]
                wanted -= set(inside)
                value = _between(branch.values, number / last if last else 1.0)
                yield from ((glob, value) for glob in _of_layer(f"{start}{number}.", names, inside, branch.filter))
    if wanted:
        yield "*" if branch.filter is None else f"*{escape(branch.filter)}*", first


def _of_layer(start: str, names: Sequence[str], wanted: Sequence[str], part: str | None) -> list[str]:
    """Globs for some tensors of a layer, those with a part of a name in theirs. start: of all their names."""
    if part is None or len(wanted) == len(names):
        return [f"{escape(start)}*"] if wanted else []
    glob = f"{escape(start)}*{escape(part)}*"
    exact = {name for name in names if fnmatchcase(name, glob)} == {name for name in names if part in name}
    return [glob] if wanted and exact else [escape(name) for name in wanted]


def _between(values: Sequence[float], t: float) -> float:
    """On the straight lines through values at equal distances; t: from the first (0) to the last (1)."""
    place = t * (len(values) - 1)
    first = int(place)
    second = min(len(values) - 1, first + 1)
    share = place - first
    return float(f"{(1 - share) * values[first] + share * values[second]:.12g}")
