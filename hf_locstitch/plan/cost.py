"""How much I/O, disk and memory a plan will take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_locstitch.checkpoints.byte_ranges import Piece, byte_ranges, most_held, stored
from hf_locstitch.checkpoints.checkpoint import Checkpoint
from hf_locstitch.checkpoints.read_ahead import IN_ALL, LARGEST
from hf_locstitch.errors import RecipeError
from hf_locstitch.localize.job import Cost as LocalizingCost
from hf_locstitch.plan.division import divided_by_file, own_pieces, part_of, rounds
from hf_locstitch.plan.plans import LocalizePlan, MergePlan, Plan, StitchPlan
from hf_locstitch.plan.whole_tensors import awaited, whole_tensors_memory
from hf_locstitch.runtime.dtypes import ITEM_BYTES
from hf_locstitch.runtime.human import human
from hf_locstitch.runtime.processes import launched
from hf_locstitch.runtime.settings import BATCH, COMPACT_FROM, COMPACT_SLACK
from hf_locstitch.stitch.fit_cost import Cost as FitCost

Here = frozenset[tuple[str, str]]  # (input, file) on this machine
SPILL_BYTES = 8  # position and |task vector| of one candidate; its value comes on top
SPILL_MARGIN = 1.25  # candidates kept per coordinate chosen; the bound is set from a sample
PEFT_BYTES = 350_000_000  # of imported torch, transformers and PEFT; measured
XET_BYTES = 150_000_000  # of hf_xet and its buffers; measured, up to
LAYERS = 8  # copies of an adapter's largest layer: two are held, three in the making, others freed but not given back
RISING_MARGIN = 1.05  # the same where the bound rises while files come, after tidying up; a bin of scores is .8 % wide


@dataclass(frozen=True)
class Cost:
    """All in bytes. download: what is not in the cache yet. disk: peak of output and temporary files."""

    read: int
    download: int
    write: int
    disk: int
    memory: int


def estimate(plan: Plan, here: Here) -> Cost:
    """Upper bounds; the spill is a guess that assumes few ties at the threshold."""
    needed = plan.needed
    passes = [plan.scanned, plan.written_from(plan.shards)]
    stored = plan.localized_inputs if isinstance(plan, StitchPlan) else {}
    read = download = 0
    for name, checkpoint in plan.inputs.items():
        sizes = {shard.file: shard.size for shard in checkpoint.shards if shard.file in needed[name]}
        missing = {file: size for file, size in sizes.items() if (name, file) not in here}
        times = [list(byte_ranges(checkpoint, pieces.get(name, ()))) for pieces in passes]
        read += sum(sizes[file] for files in ([sizes] if name in stored else times) for file in files)
        if plan.settings.cache or name != "base" or "base" in plan.kept_for(plan.shards):
            download += sum(missing.values())
        else:
            download += sum(missing.get(file, 0) for files in times for file in files)
    write = sum(shard.nbytes for shard in plan.shards)
    disk = _output(plan) + _spill(plan, here) + _masks(plan) + (0 if plan.settings.cache else _streams(plan, here))
    fitting = fit_cost(plan)
    disk += fitting.disk if fitting else 0
    # One after the other.
    memory = max(plan.settings.memory, fitting.peak if fitting else 0, whole_tensors_memory(plan))
    return Cost(read, download, write, disk, memory + adapters_memory(plan) + downloads_memory(download))


def check_memory(plan: Plan) -> None:
    """Raises RecipeError if fitting values takes more memory than is allowed."""
    limit, fitting = plan.settings.limit, fit_cost(plan)
    if limit is not None and fitting is not None and fitting.peak > limit:
        raise RecipeError(
            f"--max-memory {human(limit)} is too little: with the smallest parts that can be solved for by themselves, "
            f"fitting values takes {human(fitting.peak)}. Allow that much, or use "
            f"{'--stitch mean' if plan.recipe.stitch else '--method average'}."
        )


def adapters_memory(plan: Plan) -> int:
    """Of the libraries that compute layers with adapters, and of the layers: two are held, one is being made."""
    sizes = [adapter.largest_layer for adapter in plan.adapters.values()]
    return PEFT_BYTES + LAYERS * sum(sizes) if sizes else 0


def downloads_memory(download: int) -> int:
    """Of bytes that came before their turn, and of hf_xet where it is used. download: bytes."""
    if not download:
        return 0
    from hf_locstitch.checkpoints import xet

    return min(download, IN_ALL * LARGEST) + (XET_BYTES if xet.is_usable() else 0)


def files_here(plan: Plan) -> Here:
    """The files to be read that are already on this machine."""
    sources = {name: checkpoint.source for name, checkpoint in plan.inputs.items()}
    return frozenset(
        (name, file) for name, files in plan.needed.items() for file in files if sources[name].cached(file) is not None
    )


def fit_cost(plan: Plan) -> FitCost | None:
    """The cost of fitting values; None if none are fitted."""
    fitting = plan.recipe.fitting
    return fitting.cost(plan) if fitting is not None and not isinstance(plan, StitchPlan) else None


def localizing_cost(plan: Plan) -> LocalizingCost | None:
    """The cost of finding masks, beyond reading the models; None if there is none."""
    return plan.localizer.cost(plan) if isinstance(plan, MergePlan | LocalizePlan) and plan.masked else None


def _output(plan: Plan) -> int:
    """Finished shards are deleted once uploaded, unless they are kept in a folder or for the cache: one for each
    process is being written, one waits, and one is on its way."""
    sizes = sorted(shard.nbytes for shard in plan.shards)
    return sum(sizes if plan.settings.cache or plan.recipe.out is not None else sizes[-2 - launched() :])


def _spill(plan: Plan, here: Here) -> int:
    if isinstance(plan, StitchPlan):
        kept = sum(4 * one.ones + one.shards[1].size for one in plan.localized_inputs.values())
        return kept + sum(8 * one.ones for one in plan.merged_inputs.values())  # a position and a value, float32
    if not plan.masked:
        return 0
    all_here = all((name, file) in here for name, files in plan.needed.items() for file in files)
    streamed = not plan.settings.cache or not all_here or bool(plan.adapters)
    value = max(
        (ITEM_BYTES[c.info(t).dtype] for c in plan.finetuned.values() for t in c.tensors if c.info(t).floating),
        default=4,
    )
    size = SPILL_BYTES + value
    if not streamed:
        return len(plan.finetuned) * min(plan.n, math.ceil(plan.k * SPILL_MARGIN)) * size
    live = min(plan.n, math.ceil(plan.k * RISING_MARGIN)) * size
    batch = BATCH * plan.settings.workers * plan.settings.chunk * size
    most = min(COMPACT_FROM * live + launched() * (COMPACT_SLACK + batch), plan.n * size)
    return math.ceil(len(plan.finetuned) * most + live)  # one at a time is copied while it is compacted


def _masks(plan: Plan) -> int:
    return len(plan.finetuned) * math.ceil(mask_bits(plan.k / plan.n) * plan.n / 8) if plan.masked and plan.n else 0


def _streams(plan: Plan, here: Here) -> int:
    """Bytes that have arrived and are still to be read, in the pass that holds the most."""
    owned = divided_by_file(plan, launched())
    in_turn = [shard for together in rounds(plan.shards, owned) for shard in together]
    scanned = [own_pieces(plan.scanned, own) for own in owned]
    written = [plan.written_from(part_of(in_turn, own)) for own in owned]
    passes = [
        sum(_held(plan, here, name, pieces) for of_one in of_all for name, pieces in of_one.items())
        for of_all in (scanned, written)
    ]
    if not plan.scanned:
        return max(passes)
    kept = {name: _bytes(plan.inputs[name], pieces) for name, pieces in plan.kept_for(plan.shards).items()}
    place = kept.pop("base", 0)  # which the output takes, shard by shard
    largest = launched() * max((shard.nbytes for shard in plan.shards), default=0)
    return max(passes) + sum(kept.values()) + (largest + max(0, place - _output(plan)) if place else 0)


def _held(plan: Plan, here: Here, name: str, pieces: Sequence[Piece]) -> int:
    checkpoint = plan.inputs[name]
    if all((name, file) in here for file in byte_ranges(checkpoint, pieces)):
        return 0
    ahead = max(plan.settings.window // launched(), awaited(plan, checkpoint))
    return min(most_held(checkpoint, pieces) + ahead, _bytes(checkpoint, pieces))


def _bytes(checkpoint: Checkpoint, pieces: Sequence[Piece]) -> int:
    return sum(stop - start for piece in pieces for _, start, stop in stored(checkpoint, *piece))


def mask_bits(density: float) -> float:
    """Bits per element that a stored mask takes, about: the entropy, never above 1."""
    if density in (0.0, 1.0):
        return 0.0 if density == 0.0 else 1.0
    return min(1.0, -density * math.log2(density) - (1 - density) * math.log2(1 - density)) * 1.02
