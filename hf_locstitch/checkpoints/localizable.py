"""Which tensors the masks range over, told from names, dtypes and shapes alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from hf_locstitch.checkpoints.header import TensorInfo

# The transformer blocks, under the names that architectures give them on disk.
BLOCKS = re.compile(
    r"(^|\.)((?!conv_|in_)\w*(layers?|blocks?)|h|ffns|attentions|layer_norm[12]|self_attends|conformer|mixers)\.\d+\."
)
# What is seldom merged: embeddings, heads, poolers.
ENDS = re.compile(
    r"(^|[._])(\w*embed\w*|wte|wpe|shared|\w*head|classifier|score|pooler|\w*projector|norm|ln_f)([._]|$)"
)
MISSED = 0.6  # a smaller share of what is no end of the model, and blocks seem to be missed
NAMED = 3  # groups of tensors left out that are named
# State that checkpoints carry inside the blocks but nobody trains.
BUFFERS = re.compile(
    r"(^|\.)(inv_freq|masked_bias|running_mean|running_var|num_batches_tracked|position_ids|"
    r"token_type_ids|relative_position_index|relative_coords_table)$"
)
CAUSAL_MASK = re.compile(r"\.(attn|attention)\.bias$")  # GPT-2, GPT-NeoX: a constant triangle [1, 1, n, n]


def is_buffer(info: TensorInfo) -> bool:
    return bool(BUFFERS.search(info.name)) or (bool(CAUSAL_MASK.search(info.name)) and len(info.shape) == 4)


def localizable(tensors: Iterable[TensorInfo], include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Names of the floating-point tensors that are localized.

    Default: those of the transformer blocks. `include` globs replace that default, `exclude` globs take away; they
    match whole names on disk, case-sensitive. Buffers are included by their own name only.
    """
    floating = [info for info in tensors if info.floating]
    if include:
        named = [info for info in floating if not is_buffer(info) or info.name in include]
        chosen = [info.name for info in named if _matches(info.name, include)]
    else:
        chosen = [info.name for info in floating if BLOCKS.search(info.name) and not is_buffer(info)]
    return [name for name in chosen if not _matches(name, exclude)]


@dataclass(frozen=True)
class Reach:
    """How much of a model is localized. share: of all floating-point elements; of_inner: of those that are not in
    embeddings, heads and the like. left: globs of the largest groups of such that are left out, with their share of
    these."""

    share: float
    of_inner: float
    left: tuple[tuple[str, float], ...]


def reach(tensors: Iterable[TensorInfo], chosen: Collection[str]) -> Reach:
    """tensors: of a model; chosen: names of those that are localized."""
    chosen = frozenset(chosen)
    floating = [info for info in tensors if info.floating and not is_buffer(info)]
    inner = [info for info in floating if info.name in chosen or not ENDS.search(info.name)]
    left: Counter[str] = Counter()
    for info in inner:
        if info.name not in chosen:
            left[_group(info.name)] += info.numel
    total, within = sum(info.numel for info in floating), sum(info.numel for info in inner)
    own = sum(info.numel for info in floating if info.name in chosen)
    largest = tuple((glob, count / within) for glob, count in left.most_common(NAMED))
    return Reach(own / max(total, 1), own / max(within, 1), largest)


def _group(name: str) -> str:
    """A glob of a tensor and its like: up to the first number, or all of the module that it is in."""
    numbered = re.match(r"(.*?)\.\d+\.", name)
    return f"{numbered[1]}.*" if numbered else f"{name.rpartition('.')[0] or name}*"


def missed_blocks(found: Reach, where: str) -> list[str]:
    """A warning where less is localized than a model of blocks has in its blocks."""
    if found.of_inner >= MISSED or not found.left:
        return []
    listed = ", ".join(f"{glob} ({100 * share:.0f} %)" for glob, share in found.left)
    return [
        f"masks range over {100 * found.of_inner:.0f} % of what {where} has beside embeddings and heads: some of its "
        f"blocks may have names that are not known. The largest groups left out are {listed}; --include takes globs, "
        "in place of the default."
    ]


def unknown_globs(names: Sequence[str], globs: Iterable[str], where: str, what: str = "tensor") -> list[str]:
    """A sentence for each glob that matches no name, with the nearest names. where: they are from; what: they name."""
    problems = []
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            near = get_close_matches(glob, names, n=2, cutoff=0.3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            problems.append(f"the glob {glob!r} matches no {what} in {where}{hint}")
    return problems


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)
