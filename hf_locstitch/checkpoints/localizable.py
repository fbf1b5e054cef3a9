"""Which tensors the masks range over, told from names, dtypes and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from hf_locstitch.checkpoints.header import TensorInfo

# The transformer blocks, under the names that architectures give them on disk.
BLOCKS = re.compile(r"(^|\.)(layers?|h|blocks?|resblocks)\.\d+\.")
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
